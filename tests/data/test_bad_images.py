"""The list of images replaced while running: counted over ranks and resumes, and its limit."""

import pytest

from fastrot.data.bad_images import BadImages
from fastrot.errors import Fault


@pytest.mark.parametrize("most", [0, 1, 3])
def test_just_max_bad_images_are_borne_and_one_more_is_not(tmp_path, most):
    bad = BadImages(tmp_path / "bad_images.jsonl", "d", most)
    for row in range(most):
        bad.add(f"{row}.jpg", row, "broken")
        bad.add(f"{row}.jpg", row, "broken")  # known: listed once
    assert bad.count == most
    with pytest.raises(
        Fault, match=f"{most + 1} unreadable images, more than data.max_bad {most}; the last: x.jpg: why"
    ):
        bad.add("x.jpg", 9, "why")


def test_what_other_ranks_and_earlier_starts_listed_counts(tmp_path):
    first, second = (BadImages(tmp_path / "bad_images.jsonl", "d", 10) for _ in range(2))
    first.add("a", 0, "why")
    second.add("b", 1, "why")
    BadImages(tmp_path / "bad_images.jsonl", "other", 10).add("c", 2, "why")
    assert (first.count, second.count) == (2, 2)
    assert BadImages(tmp_path / "bad_images.jsonl", "d", 10).count == 2
    assert BadImages(None, "d", 10).count == 0
