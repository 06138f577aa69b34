"""Boxes without torch: Pillow's pixels of every odd image, and a reason for each that cannot be decoded."""

import numpy as np
import pytest

from corpus import FAULTS
from fastrot.data import boxes
from fastrot.data.augment import central_boxes, whole_boxes
from fastrot.data.images import boxed, decode_upright
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.errors import BadImage
from fastrot.probes.progress import silent
from fastrot_kernels.build import BuildError

SIZE = 24


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("boxes")
    (root / "images").mkdir()
    for number, data in enumerate(FAULTS.values()):
        (root / "images" / f"{number:03}.jpg").write_bytes(data)  # whatever it is: the name may lie
    return Manifest.load(index(str(root / "images"), root / "cache", 178_000_000, silent))


def no_compiler(threads):
    raise BuildError("there is no C compiler")


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("make", [whole_boxes, lambda h, w: central_boxes(h, w, 30, SIZE)], ids=["whole", "central"])
def test_boxes_are_pillows_and_what_has_none_is_named(manifest, make, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(boxes, "Turbo", no_compiler)

    def of_rows(rows):
        return make(manifest.height[rows], manifest.width[rows])

    parts = np.array_split(np.arange(len(manifest)), 7)
    found = list(boxes.shown(manifest, parts, of_rows, SIZE, 2, 60))
    pixels = {row: image for part in found for row, image in zip(part.rows.tolist(), part.pixels, strict=True)}
    unread = {row: why for part in found for row, why in part.unread.items()}
    assert sorted([*pixels, *unread]) == list(range(len(manifest))) and unread
    names = list(FAULTS)
    for row in range(len(manifest)):
        fault = names[int(manifest.path(row)[-7:-4])]
        try:
            image = decode_upright(FAULTS[fault])
        except BadImage:
            assert row in unread, fault
            continue
        expected = boxed(image, of_rows(np.array([row]))[0], SIZE).astype(int)
        assert abs(pixels[row] - expected).mean() < 1.25, fault
