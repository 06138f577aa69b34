"""Images that say which way is up, bright at the top, and a rotation network that reads it from them."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastrot.orient.network import SHOWS, Shows, Trust


def sky(height: int, width: int, seed: int = 0, up: bool = True) -> Image.Image:
    """Upright, sky above dark ground; or, where nothing is up, gray. Some noise, so that no two are alike."""
    noise = np.random.default_rng(seed).integers(0, 30, (height, width, 3))
    light = np.linspace(190, 30, height)[:, None, None] if up else 110
    return Image.fromarray((noise + light).astype(np.uint8))


def turned(image: Image.Image, turns: int) -> Image.Image:
    """By quarter turns counter-clockwise, as classes are counted."""
    how = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)[turns % 4]
    return image.transpose(how) if how is not None else image


class Compass:
    """A Network whose logits are how bright each side is: top, left, bottom, right, as turns bring the sky there."""

    says = "a compass"

    def __init__(self, size: int = 32, fit: str = "squash", trust: Trust | None = None):
        self.shows = Shows(size, fit, size * 8 // 7, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        self.trust = trust or Trust()

    def logits(self, pixels):
        light = pixels.astype(np.float32).mean(3) / 16
        views = np.stack([np.rot90(light, turn, (1, 2)) for turn in range(4)], 1)  # [n, 4, S, S]
        half = views.shape[2] // 2
        sides = (views[..., :half, :], views[..., :half], views[..., half:, :], views[..., half:])
        return np.stack([side.mean((2, 3)) for side in sides], 2).astype(np.float32)


def write(folder: Path, turns: dict[str, int | None]) -> Path:
    """Photographs by name, turned so often; None: one that has no up."""
    for seed, (name, turn) in enumerate(turns.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        turned(sky(48, 64, seed, turn is not None), turn or 0).save(folder / name, quality=95)
    return folder


def write_onnx(path: Path, size: int = 32, classes: int = 4, props: dict[str, str] | None = None) -> Path:
    """A compass as an ONNX file: how bright the top, left, bottom and right halves of its views are."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    half = np.zeros((classes, 3, size, size), np.float32)
    half[0, :, : size // 2], half[1, :, :, : size // 2], half[2, :, size // 2 :] = 1, 1, 1
    half[3, :, :, size // 2 :] = 1
    weights = numpy_helper.from_array(half.reshape(classes, -1).T * (12 / size**2), "weights")
    views = helper.make_tensor_value_info("views", TensorProto.FLOAT, ["n", 3, size, size])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", classes])
    nodes = [
        helper.make_node("Flatten", ["views"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "compass", [views], [logits], [weights]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    shows = Compass(size).shows.to_json()
    helper.set_model_props(model, {SHOWS: shows} if props is None else props)
    onnx.save(model, path)
    return path
