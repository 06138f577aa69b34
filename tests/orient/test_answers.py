"""An answer turns with its image, and its line says what it is."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax

from fastrot.errors import UserError
from fastrot.orient import answers
from fastrot.orient.answers import Answer, Unread, combined, normalised

LOGITS = arrays(
    np.float32, st.tuples(st.integers(1, 9), st.just(4), st.just(4)), elements=st.floats(-300, 300, width=32)
)


def test_what_four_views_say_is_averaged_over_the_turn_that_they_agree_on():
    logits = np.random.default_rng(0).normal(0, 3, (50, 4, 4)).astype(np.float32)
    of_views = log_softmax(logits.astype(np.float64), 2)
    expected = np.zeros((50, 4))
    for image in range(50):
        for turn in range(4):
            expected[image, turn] = sum(of_views[image, shown, (turn + shown) % 4] for shown in range(4)) / 4
    assert np.allclose(combined(logits), log_softmax(expected, 1), rtol=0, atol=1e-12)


@given(LOGITS, st.integers(0, 3), st.sampled_from([1.0, 0.3, 2.7]))
def test_the_answer_turns_with_the_image_bit_for_bit(logits, k, temperature):
    """An image that is turned by k more shows with s turns what it showed with k + s."""
    found = normalised(combined(logits), temperature)
    of_turned = normalised(combined(np.roll(logits, -k, 1)), temperature)
    assert of_turned.tobytes() == np.roll(found, k, 1).tobytes()


def test_a_temperature_divides_log_probabilities():
    scores = np.random.default_rng(1).normal(0, 5, (20, 4))
    assert np.allclose(normalised(scores, 2.5), log_softmax(scores / 2.5, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("exif", "turn", "tag"),
    [(None, 0, "none"), (1, 0, "none"), (6, 0, "right"), (3, 1, "wrong"), (1, 2, "missing"), (None, 3, "missing")],
)
def test_a_tag_is_what_the_answer_says_of_it(exif, turn, tag):
    sure = np.log(np.roll([0.97, 0.01, 0.01, 0.01], turn))
    found = answers.answer("/a.jpg", 5, None, exif, sure, 0.9)
    assert (found.tag, found.clockwise, found.decided) == (tag, 90 * turn, True)
    unsure = answers.answer("/a.jpg", 5, None, exif, sure, 0.98)
    assert (unsure.tag, unsure.decided, unsure.confidence) == ("none", False, pytest.approx(0.97))


def test_two_turns_that_are_as_likely_decide_nothing():
    assert not answers.answer("/a.jpg", 0, None, 1, np.log([0.4, 0.1, 0.4, 0.1]), 0.0).decided


def test_a_file_of_answers_is_read_as_it_was_written(tmp_path):
    odd = b'/photos/\xff "x"\n.jpg'.decode(errors="surrogateescape")
    written = [
        Answer(odd, 3, "2019", 90, (0.1, 0.7, 0.1, 0.1), True, 6),
        Unread("/photos/b.jpg", None, "empty file"),
        Answer("shards.tar at byte 512", 4, None, 0, (0.4, 0.3, 0.2, 0.1), False, None),
    ]
    out = tmp_path / "orient.jsonl"
    out.write_text("".join(one.line() + "\n" for one in written))
    assert list(answers.read(out)) == [written[0], written[2]]
    assert json.loads(out.read_text().splitlines()[0]) == {
        "file": odd, "row": 3, "class": "2019", "clockwise": 90, "probabilities": [0.1, 0.7, 0.1, 0.1], "decided": True,
        "exif": 6, "tag": "wrong",
    }  # fmt: skip


@pytest.mark.parametrize("line", ["nonsense", "{}", "[1]", '{"file": "/a", "row": "x"}'])
def test_a_file_that_holds_no_answers_is_refused(tmp_path, line):
    out = tmp_path / "orient.jsonl"
    out.write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is no answer of fastrot orient"):
        list(answers.read(out))
    with pytest.raises(UserError, match="cannot be read"):
        list(answers.read(Path(tmp_path / "none.jsonl")))
