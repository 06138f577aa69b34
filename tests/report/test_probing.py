"""fastrot svm, lowshot, knn and linear as a user runs them, on feature stores; every error's one line."""

import json

import numpy as np
import pytest

from fastrot.probes.linear import linear
from fastrot.probes.neighbours import knn
from fastrot.probes.svm import COSTS, voc_svm


def write_store(folder, x, labels, classes=()):
    folder.mkdir()
    np.save(folder / "feature4.npy", x.astype(np.float16))
    np.save(folder / "feature5.npy", x[:, :30].astype(np.float32))
    np.save(folder / "labels.npy", labels)
    (folder / "manifest.json").write_text(json.dumps({"classes": list(classes)}))
    return folder


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """(train, test) with class matrices, (bank, queries) with one label a row."""
    root, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    hidden = rng.standard_normal((300, 5))
    x = np.maximum(hidden @ rng.standard_normal((5, 90)) + rng.standard_normal((300, 90)), 0)
    y = (hidden[:, :3] > 1.2).astype(np.int8)
    y[::29] = -1
    names = ("cat", "dog", "sofa")
    voc = write_store(root / "train", x[:200], y[:200], names), write_store(root / "test", x[200:], y[200:], names)
    kind = hidden[:, :4].argmax(1).astype(np.int64)
    return *voc, write_store(root / "bank", x[:200], kind[:200]), write_store(root / "queries", x[200:], kind[200:])


def test_svm_prints_and_writes_the_table_of_every_layer(fastrot, stores, tmp_path):
    train, test, *_ = stores
    done = fastrot("svm", "--train", train, "--test", test, "--out", tmp_path / "svm.json", "--json")
    result = done.json
    assert json.loads((tmp_path / "svm.json").read_text()) == result
    arrays = [np.load(folder / name) for folder in (train, test) for name in ("feature5.npy", "labels.npy")]
    want = voc_svm(*arrays)
    layer = result["layers"]["feature5"]
    assert layer["average_precision"] == pytest.approx(want.average_precision)
    assert layer["costs"] == want.costs.tolist() and result["cost_grid"] == list(COSTS)
    assert set(result["layers"]) == {"feature4", "feature5"} and result["best_layer"] in result["layers"]
    assert "best layer" in done.err and "11-point" in done.err


def test_a_class_without_images_is_left_out_and_said(fastrot, stores, tmp_path):
    train, test, *_ = stores
    labels = np.load(test / "labels.npy")
    labels[labels[:, 2] == 1, 2] = 0
    bare = write_store(tmp_path / "bare", np.load(test / "feature4.npy"), labels)
    done = fastrot("svm", "--train", train, "--test", bare, "--layers", "feature5", "--json")
    layer = done.json["layers"]["feature5"]
    assert layer["per_class"][2] is None and done.json["left_out"] == [2]
    assert layer["average_precision"] == pytest.approx(np.mean(layer["per_class"][:2]))
    assert "sofa" in done.err


def test_lowshot_says_which_cost_saw_the_test_set(fastrot, stores):
    train, test, *_ = stores
    done = fastrot("lowshot", "--train", train, "--test", test, "--layers", "feature5", "--k", "1,4,96", "--json")
    layer = done.json["layers"]["feature5"]
    assert list(layer["k"]) == ["1", "4"] and layer["left_out"] == [96]
    assert "oracle" in done.err and "cross-validated" in done.err and "k = 96" in done.err
    four = layer["k"]["4"]
    assert four["oracle"]["mean"] == max(entry["mean"] for entry in four["by_cost"])
    assert four["oracle"]["min"] <= four["oracle"]["mean"] <= four["oracle"]["max"]
    assert (
        np.mean(four["oracle"]["draws"]) == pytest.approx(four["oracle"]["mean"]) and len(four["oracle"]["draws"]) == 5
    )
    assert layer["k"]["1"]["cross_validated_costs"] == [[1.0] * 3] * 5


def test_ctrl_c_ends_the_draws_with_a_line(fastrot, stores, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastrot.probes.lowshot._one_draw", interrupted)
    done = fastrot("lowshot", "--train", stores[0], "--test", stores[1], "--k", "1")
    assert done.code == 130 and done.errors == ["fastrot: stopped by Ctrl-C"]


def test_lowshot_takes_published_draws(fastrot, stores, tmp_path):
    train, test, *_ = stores
    labels, rng = np.load(train / "labels.npy"), np.random.default_rng(3)
    for sample in range(1, 6):
        targets = np.full(labels.shape, -1.0)
        for c, column in enumerate(labels.T):
            for value, count in ((1, 2), (0, 38)):
                targets[rng.choice(np.flatnonzero(column == value), count, replace=False), c] = value
        np.save(tmp_path / f"train_targets_sample{sample}_k2.npy", targets)
    words = ["lowshot", "--train", train, "--test", test, "--layers", "feature5", "--k", "2,4", "--draws", tmp_path]
    result = fastrot(*words, "--json").json
    assert list(result["layers"]["feature5"]["k"]) == ["2"] and result["layers"]["feature5"]["left_out"] == [4]
    assert result["seed"] is None


def test_knn_gives_what_the_room_gives(fastrot, stores):
    *_, bank, queries = stores
    done = fastrot("knn", "--train", bank, "--test", queries, "--k", "5,20", "--json")
    arrays = [np.load(folder / name) for folder in (bank, queries) for name in ("feature4.npy", "labels.npy")]
    want = knn(*arrays, ks=[5, 20])
    got = done.json["layers"]["feature4"]["k"]
    assert {k: (v["top1"], v["top5"]) for k, v in got.items()} == {str(k): pair for k, pair in want.items()}
    for one in got.values():
        assert len(one["right"]) == 100 and one["right"].count("1") == pytest.approx(one["top1"])
    assert "feature4, k = 20" in done.err


def test_linear_gives_what_the_room_gives_and_says_that_it_is_not_the_protocol(fastrot, stores, tmp_path):
    *_, bank, queries = stores
    words = ("linear", "--features", bank, "--test", queries, "--epochs", "2", "--out", tmp_path / "linear.json")
    done = fastrot(*words, "--json")
    arrays = [np.load(folder / name) for folder in (bank, queries) for name in ("feature4.npy", "labels.npy")]
    want = linear(*arrays, epochs=2)
    got = done.json["layers"]["feature4"]
    assert (got["top1"], got["rate"], got["decay"]) == pytest.approx((want.top1, want.rate, want.decay))
    assert len(got["right"]) == 100 and got["right"].count("1") == pytest.approx(got["top1"])
    assert done.json["protocol"] is False and "the protocol's augmented heads" in done.err
    assert json.loads((tmp_path / "linear.json").read_text()) == done.json
    for wrong in (("linear",), ("linear", "--features", bank), ("linear", "--features", bank, "--checkpoint", "x")):
        assert fastrot(*wrong).code == 2


def test_what_cannot_be_probed_is_one_line(fastrot, stores, tmp_path):
    train, test, bank, queries = stores
    narrow = write_store(tmp_path / "narrow", np.ones((4, 30)), np.zeros(4, np.int64))
    broken = write_store(tmp_path / "broken", np.ones((4, 30)), np.zeros(5, np.int64))
    pickled = write_store(tmp_path / "pickled", np.ones((4, 30)), np.zeros(4, np.int64))
    np.save(pickled / "feature4.npy", np.array([{}], object), allow_pickle=True)
    others = write_store(tmp_path / "others", np.ones((4, 90)), np.ones((4, 3), np.int8), ("cat", "dog", "table"))
    spoiled = write_store(
        tmp_path / "spoiled", np.where(np.arange(180).reshape(6, 30) == 100, np.nan, 1), np.zeros(6, np.int64)
    )
    for words, line in (
        (("svm", "--train", tmp_path, "--test", test), "no feature store"),
        (("svm", "--train", bank, "--test", queries), "expected class matrices"),
        (("knn", "--train", train, "--test", test), "expected one label a row"),
        (("knn", "--train", bank, "--test", queries, "--layers", "feature9"), "--layers feature9: not in both stores"),
        (("knn", "--train", bank, "--test", narrow, "--layers", "feature4"), "90 features a row"),
        (("knn", "--train", broken, "--test", queries), "expected float32, float16, bfloat16 [5, D]"),
        (("knn", "--train", pickled, "--test", queries), "not a plain numpy array"),
        (("svm", "--train", train, "--test", others), "name other classes"),
        (("knn", "--train", spoiled, "--test", spoiled, "--k", "1"), "spoiled/feature4.npy: row 3 is not finite"),
        (("knn", "--train", bank, "--test", queries, "--out", tmp_path), "is a folder; name a file"),
        (("knn", "--train", bank, "--test", queries, "--k", "500"), "k = 500 needs as many rows"),
        (("knn", "--train", bank, "--test", queries, "--out", tmp_path / "no" / "x.json"), "create it first"),
        (("lowshot", "--train", train, "--test", test, "--draws", tmp_path / "none"), "no such folder"),
    ):
        done = fastrot(*words)
        assert done.code == 2 and len(done.errors) == 1 and line in done.errors[0], done.err


def test_an_override_is_no_option_of_a_probe(fastrot, stores):
    done = fastrot("knn", "--train", stores[2], "--test", stores[3], "optim.lr=1")
    assert done.code == 2 and "unknown option optim.lr=1" in done.err
