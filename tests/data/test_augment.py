"""Evaluation's boxes against torchvision's own crop."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as T

from fastrot.data.augment import central_boxes


@pytest.mark.parametrize(
    "height, width", [(20, 20), (20, 21), (20, 23), (20, 25), (21, 20), (27, 20), (21, 21), (23, 31)]
)
@pytest.mark.parametrize("crop", [8, 9, 17, 20])
def test_a_central_box_lies_where_torchvision_crops(height, width, crop):
    """The short side as it is, so nothing is resized: odd margins are where roundings differ (half to even)."""
    pixels = torch.arange(height * width).view(1, height, width)
    top, left, h, w = central_boxes(np.array([height]), np.array([width]), min(height, width), crop)[0].tolist()
    assert (h, w) == (crop, crop) and top == int(top) and left == int(left)
    assert torch.equal(
        T.center_crop(pixels, [crop, crop]), pixels[:, int(top) : int(top + h), int(left) : int(left + w)]
    )
