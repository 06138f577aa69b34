"""The list of bad images outlives a kill in the middle of a line."""

import json

from fastrot.data.bad_images import BadImages


def test_a_half_written_line_hides_no_other_and_stops_nobody(tmp_path):
    path = tmp_path / "bad_images.jsonl"
    BadImages(path, "s", 9).add("a.jpg", 0, "cut")
    with path.open("a") as file:
        file.write('{"path": "b.jpg", "sou')
    again = BadImages(path, "s", 9)
    assert again.count == 1
    again.add("c.jpg", 2, "cut")
    assert [line["path"] for line in map(json.loads, path.read_text().splitlines()[::2])] == ["a.jpg", "c.jpg"]
    assert BadImages(path, "s", 9).count == 2
    assert BadImages(path, "other", 9).count == 0
