"""Odd images: the score against its formula, and planted ones against scikit-learn's AUROC."""

import json

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

import compass
from fastrot.orient.odd import anomaly

USUAL, ODD = 20, 10


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return compass.write_onnx(tmp_path_factory.mktemp("network") / "compass.onnx")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    turns = {f"usual/{at}.jpg": 0 for at in range(USUAL)} | {f"odd/{at}.jpg": None for at in range(ODD)}
    return compass.write(tmp_path_factory.mktemp("photos"), turns)


def test_the_score_is_the_cross_entropy_of_the_four_turns():
    logits = np.random.default_rng(0).normal(0, 3, (9, 4, 4))
    p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    want = [log_loss(range(4), one, labels=range(4)) for one in p]
    np.testing.assert_allclose(anomaly(logits), want)
    assert anomaly(np.zeros((1, 4, 4)))[0] == pytest.approx(np.log(4))


def test_planted_images_come_first_and_the_sheet_shows_them(fastrot, network, photos, tmp_path):
    out = tmp_path / "odd.jsonl"
    done = fastrot("odd", photos, "--checkpoint", network, "--out", out, "--json").json
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert done["images"] == len(lines) == USUAL + ODD and done["unreadable"] == 0
    scores = [line["score"] for line in lines]
    assert scores == sorted(scores, reverse=True) and np.median(scores) == pytest.approx(done["median_score"])
    assert roc_auc_score([line["class"] == "odd" for line in lines], scores) == 1
    page = (tmp_path / "odd.html").read_text()
    assert page.count('<img src="data:image/jpeg') == USUAL + ODD and page.index("odd/") < page.index("usual/")


def test_without_a_file_the_oddest_are_printed_and_nothing_is_written(fastrot, network, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = fastrot("odd", photos, "--checkpoint", network)
    assert done.code == 0 and "/odd/" in done.out and not any(tmp_path.iterdir())


def test_wrong_words_are_refused(fastrot, network, photos, tmp_path):
    for words, says in (
        ((photos, "--checkpoint", network, "--out", tmp_path / "a.csv"), "expected a name ending in .jsonl"),
        ((photos, "--checkpoint", tmp_path / "none.onnx"), "no such file"),
        ((tmp_path / "none", "--checkpoint", network), "none"),
        ((photos, "--checkpoint", network, "--out", tmp_path / "none" / "a.jsonl"), "cannot be written"),
    ):
        done = fastrot("odd", *words)
        assert done.code == 2 and len(done.errors) == 1 and says in done.errors[0], done.err
