"""A frozen backbone from any checkpoint: ours, or another library's; whole, or refused."""

import pickle
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import ResNet

from fastrot.errors import UserError
from fastrot.files import Damaged, as_json, read_json, sha256_of
from fastrot.models.key_names import to_torchvision
from fastrot.models.resnet import build_model

# blocks a stage, and whether they are bottlenecks
_ARCHS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
_COUNTER = "num_batches_tracked"  # plays no part in evaluation; old files lack it


@dataclass(frozen=True)
class Origin:
    """Where a backbone's weights come from.

    path     the file read, as given or found; sha256 of its bytes. Both None for random weights.
    arch     torchvision's name.  names: whose key names the file used.
    skipped  keys of the file that are no part of the backbone.
    run      the pretraining run's folder, or None.
    seed     of random weights, else None.
    """

    arch: str
    path: str | None = None
    sha256: str | None = None
    names: str | None = None
    skipped: tuple[str, ...] = ()
    run: str | None = None
    seed: int | None = None

    def facts(self) -> dict[str, Any]:
        """What identifies the weights, for a feature store's manifest."""
        return {k: v for k, v in asdict(self).items() if k not in ("skipped",)}

    def says(self) -> str:
        """A line for a person."""
        if self.path is None or self.sha256 is None:
            return f"{self.arch}, weights drawn at random from seed {self.seed}"
        heads = f"; passed over {len(self.skipped)} keys: {_short(self.skipped)}" if self.skipped else ""
        return f"{self.arch} from {self.path} (names: {self.names}; sha256 {self.sha256[:12]}){heads}"


def backbone_of(checkpoint: str | None, seed: int | None, arch: str) -> tuple[ResNet, Origin]:
    """The backbone asked for: a checkpoint's, or one drawn from a seed. Raises UserError."""
    if checkpoint is not None and seed is None:
        return load_backbone(checkpoint)
    if checkpoint is None and seed is not None:
        return random_backbone(arch, seed)
    raise UserError("name either --checkpoint C or --random-init SEED")


def random_backbone(arch: str, seed: int) -> tuple[ResNet, Origin]:
    """The control: an untrained ResNet whose batch norms keep mean 0 and variance 1."""
    model = build_model(arch, 1, seed)
    model.fc = nn.Identity()
    return _frozen(model), Origin(arch, seed=seed)


def load_backbone(path: str) -> tuple[ResNet, Origin]:
    """A ResNet in eval mode of a checkpoint's weights, fp32, without a head, and their origin.

    path  a run folder, one of its checkpoints, a .safetensors file, or a file of torch.save (opened with
          weights_only=True: nothing in it executes).
    Raises UserError where the file is unreadable, no ResNet is in it, or a key of the backbone is missing,
    unknown or of another shape.
    """
    file, run = find_file(path)
    state, skipped, names = to_torchvision(read_state(file), str(file))
    arch = arch_of(state, str(file))
    with torch.device("meta"):  # weights are not drawn only to be replaced
        model = getattr(torchvision.models, arch)()
    model.fc = nn.Identity()
    _refuse_differences(state, model, arch, file)
    counters = {key: torch.tensor(0) for key in model.state_dict() if key.endswith(_COUNTER)}
    # copied: a file's tensors lie at any alignment, and sums may depend on it
    state = {
        key: value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        for key, value in state.items()
    }
    model.load_state_dict(counters | state, assign=True)
    return _frozen(model), Origin(arch, str(file), sha256_of(file), names, tuple(skipped), str(run) if run else None)


def find_file(path: str) -> tuple[Path, Path | None]:
    """The file of weights behind a path, and the run folder it belongs to, if any."""
    given = Path(path)
    if given.is_file():
        return given, run_of(given)
    if not given.exists():
        raise UserError(f"{path}: no such file or folder")
    if (given / "latest").exists():  # a run's checkpoints/
        given = given.parent
    candidates = [given / "backbone.safetensors"]
    if (given / "checkpoints").is_dir():
        steps = sorted((given / "checkpoints").glob("step-*"), reverse=True)
        candidates += [step / "backbone.safetensors" for step in steps]
    for file in candidates:
        if file.is_file():
            return file, run_of(file)
    raise UserError(f"{path}: holds no backbone.safetensors; name a run folder, a checkpoint or a file")


def run_of(file: Path) -> Path | None:
    """The run folder that a checkpoint's file lies in."""
    for folder in file.resolve().parents[:3]:
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            return folder
    return None


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by flat names, nested containers joined by dots; other values are passed over."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(_flat(torch.load(file, map_location="cpu", weights_only=True), ""))
    except pickle.UnpicklingError:
        raise UserError(
            f"{file}: holds objects other than tensors, which could execute; "
            "save its state dict alone (torch.save(model.state_dict(), ...)) where you trust it"
        ) from None
    except Exception as error:  # torch's unpickler raises any type on damaged files
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: cannot be read as weights ({line})") from None


def _flat(tree: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield prefix[:-1], tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}{key}.")


def arch_of(state: dict[str, Tensor], where: str) -> str:
    """torchvision's name of the ResNet whose backbone this is. Raises UserError."""
    blocks = tuple(len({key.split(".")[1] for key in state if key.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in state
    arch = _ARCHS.get((blocks, bottleneck))
    if arch is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise UserError(f"{where}: stages of {blocks} {kind} blocks; known: {', '.join(_ARCHS.values())}")
    return arch


def _refuse_differences(state: dict[str, Tensor], model: ResNet, arch: str, file: Path) -> None:
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = [key for key in want if key not in state and not key.endswith(_COUNTER)]
    unknown = [key for key in state if key not in want]
    shapes = [f"{k} {tuple(state[k].shape)}, not {want[k]}" for k in want if k in state and state[k].shape != want[k]]
    for what, keys in (("not in it", missing), ("of no place in it", unknown), ("of another shape", shapes)):
        if keys:
            raise UserError(f"{file}: not a whole {arch}: {len(keys)} backbone keys {what}: {_short(keys)}")


def _short(keys: Sequence[str], count: int = 4) -> str:
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")


def _frozen(model: ResNet) -> ResNet:
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def checkpoint_of(origin: Origin) -> Path | None:
    """The checkpoint of the run that holds these weights, with its state and its head; None where it is gone."""
    if origin.run is None:
        return None
    beside = Path(str(origin.path)).parent
    if (beside / "state.json").is_file():
        return beside
    for file in sorted((Path(origin.run) / "checkpoints").glob("step-*/backbone.safetensors"), reverse=True):
        if sha256_of(file) == origin.sha256:  # a run's own backbone.safetensors is a copy of one of these
            return file.parent
    return None


def pretraining(origin: Origin) -> dict[str, Any]:
    """What the run of a checkpoint says of itself: config (YAML text), environment, state. Empty for foreign ones."""
    if origin.run is None or origin.path is None:
        return {}
    run, step = Path(origin.run), checkpoint_of(origin)
    out: dict[str, Any] = {"config": (run / "config.yaml").read_text()}
    for name, file in (("environment", run / "environment.json"), ("state", step and step / "state.json")):
        if file and file.is_file():
            try:
                out[name] = read_json(file, dict[str, Any])
            except (OSError, ValueError) as error:
                raise UserError(f"{file}: cannot be read ({error}); name another checkpoint") from None
    return out


def training_log(origin: Origin) -> list[dict[str, Any]]:
    """The lines of the run's metrics.jsonl up to the checkpoint's step; none for foreign weights."""
    if origin.run is None:
        return []
    last = pretraining(origin).get("state", {}).get("step")
    out = []
    for line in (Path(origin.run) / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            values = as_json(line.encode(), dict[str, Any])
        except Damaged:
            continue  # the half line of a run that goes on
        if last is None or (isinstance(values.get("step"), int) and values["step"] < last):
            out.append(values)
    return out


def training_command(origin: Origin) -> str | None:
    """A command that a shell can run and that trains such weights; None for foreign ones."""
    if origin.run is None:
        return None
    words = pretraining(origin).get("environment", {}).get("command") or [""]
    rest = [word for word in words[1:] if not word.startswith("--local_rank")]  # a launcher's own
    match Path(words[0]).name:
        case "train.py":
            return shlex.join(["fastrot", "train", *rest])
        case "fastrot" | "cli.py":
            return shlex.join(["fastrot", *rest])
    return shlex.join(["fastrot", "train", "--config", str(Path(origin.run) / "config.yaml")])
