"""A rotation network: a run of `fastrot train`, with torch, or an ONNX file, with onnxruntime alone."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fastrot import machine
from fastrot.errors import UserError
from fastrot.files import as_json, read_json
from fastrot.orient.answers import TURNS

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torchvision.models import ResNet

    from fastrot.config import Config
    from fastrot.runs.checkpoint import Checkpoint

Triple = tuple[float, float, float]
TRUST = "orientation.json"  # in a run's folder, and of a file's metadata
SHOWS = "fastrot.shows"  # of an ONNX file's metadata: `Shows` as JSON
_UNSURE = 0.5  # least probability where nobody calibrated


@dataclass(frozen=True)
class Shows:
    """How whole images are made ready for a network.

    size       pixels, of a side of what it sees.
    fit        squash: the whole image resized to size x size; crop: short side resized to `resize`, the centre taken.
    mean, std  of the channels, RGB, on the 0..1 scale.
    """

    size: Annotated[int, Field(ge=8)]
    fit: Literal["squash", "crop"]
    resize: int
    mean: Triple
    std: Triple

    def to_json(self) -> str:
        return json.dumps(vars(self))


@dataclass(frozen=True)
class Trust:
    """How far a network's probabilities can be believed: they are divided by `temperature` before the softmax, and from
    `threshold` on an answer counts. measured: what was found on which images; None where nobody calibrated. weights: the
    sha256 of the network's model.safetensors."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    threshold: Annotated[float, Field(ge=0, le=1)] = _UNSURE
    measured: dict[str, Any] | None = None
    weights: str | None = None

    def to_json(self) -> str:
        return json.dumps(vars(self))


class Network(Protocol):
    """What answers are asked of. shows: how images are made ready; says: what it is, for a person."""

    shows: Shows
    says: str

    @property
    def trust(self) -> Trust: ...

    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Upright uint8 [n, S, S, 3] -> [n, 4 shown, 4]: row s is of the image turned by s quarter turns counter-clockwise."""


def open_network(path: str) -> Network:
    """Of a run folder, one of its checkpoints, or an .onnx file. Raises UserError."""
    return OnnxNetwork(Path(path)) if path.endswith(".onnx") else RunNetwork(path)


class OnnxNetwork:
    """What `fastrot export --to onnx --head` wrote: views float32 [n, 3, S, S] -> logits [n, 4]. It runs on the CPU."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; name what fastrot export --to onnx --head wrote")
        self._session = _session(path)
        known = self._session.get_modelmeta().custom_metadata_map
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if SHOWS not in known or len(inputs) != 1 or len(outputs) != 1:
            raise UserError(f"{path}: no rotation network of fastrot's; write one with fastrot export --to onnx --head")
        if outputs[0].shape[-1] != TURNS:
            raise UserError(f"{path}: tells {outputs[0].shape[-1]} classes apart, not the four turns of an image")
        self._input = inputs[0].name
        try:
            self.shows = as_json(known[SHOWS].encode(), Shows)
            self.trust = as_json(known.get(TRUST, "{}").encode(), Trust)
        except ValueError as error:
            raise UserError(f"{path}: its metadata cannot be read ({error}); export it again") from None
        self.says = f"{path}, by onnxruntime on the CPU"

    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        mean, std = (255 * np.array(values, np.float32) for values in (self.shows.mean, self.shows.std))
        upright = ((pixels - mean) / std).transpose(0, 3, 1, 2)
        views = np.stack([np.rot90(upright, turn, (2, 3)) for turn in range(TURNS)], 1)
        (found,) = self._session.run(None, {self._input: views.reshape(-1, *views.shape[2:])})
        return np.asarray(found, np.float32).reshape(-1, TURNS, TURNS)


def _session(path: Path) -> "InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = machine.cores()
    options.log_severity_level = 3  # errors alone, which are raised too
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, each a type of its own
        raise UserError(f"{path}: no ONNX file that can be run ({str(error).splitlines()[0]})") from None


class RunNetwork:
    """The best checkpoint of a run of `fastrot train`, or the checkpoint named, on the GPU where there is one."""

    def __init__(self, path: str):
        import torch
        from torch.fx.experimental.optimization import fuse

        from fastrot.config import load
        from fastrot.engine import AUTOCAST
        from fastrot.runs import checkpoint
        from fastrot.runs.build import set_torch_flags

        found, folder = checkpoint.trained(path, "fastrot train")
        config = load(str(folder / "config.yaml"), [])[0]
        set_torch_flags(config)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu":  # more threads than cores wait for one another
            torch.set_num_threads(machine.cores())
        model = fuse(_rotation_model(found, config.model.arch))  # norms become part of their convolutions
        self.model = model.to(self._device, memory_format=torch.channels_last)
        self._precision = AUTOCAST.get(config.engine.precision)
        self.shows = shows_of(config)
        self.path, self.run = found.path, folder
        self.weights = checkpoint.weights_sha256(found.path)
        self.says = f"{found.path}, by torch on the {self._device.type.upper().replace('CUDA', 'GPU')}"

    @cached_property
    def trust(self) -> Trust:
        """As calibrated. Raises UserError where another checkpoint of the run was."""
        return _trust_of(self.run, self.weights)

    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        from fastrot_kernels import rotate_views

        x = torch.from_numpy(pixels).to(self._device)
        flips = x.new_zeros(len(x))
        turns = torch.arange(TURNS, dtype=torch.uint8, device=x.device).expand(len(x), TURNS).contiguous()
        mean, std = ([255 * value for value in values] for values in (self.shows.mean, self.shows.std))
        views = rotate_views(x, flips, turns, mean, std, torch.float32)
        with (
            torch.inference_mode(),
            torch.autocast(x.device.type, self._precision, enabled=self._precision is not None),
        ):
            found: NDArray[np.float32] = self.model(views).float().cpu().numpy()
        return found.reshape(-1, TURNS, TURNS)


def shows_of(config: "Config") -> Shows:
    """As a run's evaluation shows images."""
    from fastrot.data.build import short_side

    data = config.data
    return Shows(data.crop, data.fit, short_side(config), data.mean, data.std)


def _rotation_model(found: "Checkpoint", arch: str) -> "ResNet":
    """The network of a run of rotations, for evaluation. Raises UserError where it learnt something else."""
    from fastrot.models.resnet import build_model

    head = found.model.get("fc.bias")
    if head is None or "backbone" in found.state.defining:
        raise UserError(f"{found.path}: is of no run of fastrot train, which alone learns the four turns of an image")
    if len(head) != TURNS:
        raise UserError(f"{found.path}: tells {len(head)} classes apart, not the four turns of an image")
    model = build_model(arch, TURNS, 0)
    model.load_state_dict(found.model)
    return model.eval().requires_grad_(False)


def _trust_of(run: Path, weights: str) -> Trust:
    path, todo = run / TRUST, "fastrot orient --calibrate writes it anew"
    try:
        found = read_json(path, Trust)
    except FileNotFoundError:
        return Trust()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {todo}") from None
    if found.weights != weights:
        raise UserError(f"{path}: is of another checkpoint's weights; {todo}")
    return found
