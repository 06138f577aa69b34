"""`fastrot export`: a backbone under another library's names, and a model card beside it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastrot import terminal
from fastrot.errors import UserError
from fastrot.files import replacing, sha256_of, write_text
from fastrot.models.backbone import Origin, load_backbone, pretraining, training_command, training_log
from fastrot.models.key_names import to_library
from fastrot.models.resnet import backbone_state

_SUFFIXES = (".safetensors", ".pth")

# what torch.save holds for a library's own loader; safetensors always holds the tensors alone
_PTH: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    **dict.fromkeys(("mmpretrain", "mmdetection"), lambda state: {"meta": {"author": "fastrot"}, "state_dict": state}),
    "detectron2": lambda state: {"model": state, "__author__": "fastrot", "matching_heuristics": True},
}

_LOADS = {
    "torchvision": """\
model = torchvision.models.{arch}()
print(model.load_state_dict(state, strict=False))  # missing: fc.weight, fc.bias; unexpected: none""",
    "timm": """\
model = timm.create_model("{arch}", num_classes=0)
print(model.load_state_dict(state))""",
    "mmpretrain": """\
# in a config: backbone = dict(type="ResNet", depth={depth}, style="pytorch",
#   init_cfg=dict(type="Pretrained", checkpoint="{file}", prefix="backbone."))""",
    "mmdetection": """\
# in a config, and so in mmsegmentation's: backbone = dict(type="ResNet", depth={depth}, style="pytorch",
#   init_cfg=dict(type="Pretrained", checkpoint="{file}"))
# img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)""",
    "detectron2": """\
# MODEL.WEIGHTS = "{file}" (.pth); RGB input, MODEL.RESNETS.STRIDE_IN_1X1 False, DEPTH {depth}
# PIXEL_MEAN [123.675, 116.28, 103.53], PIXEL_STD [58.395, 57.12, 57.375]""",
}


def export(checkpoint: str, to: str, out: str) -> dict[str, Any]:
    """Write the backbone of `checkpoint` to `out` (.safetensors or .pth) and a card to the same name, .md.

    to  a key of names.EXPORTS. Returns what --json prints. Raises UserError.
    """
    path = Path(out)
    if path.suffix not in _SUFFIXES:
        raise UserError(f"--out {out}: expected a name ending in {' or '.join(_SUFFIXES)}")
    model, origin = load_backbone(checkpoint)
    state = {name: value.contiguous() for name, value in to_library(backbone_state(model), to).items()}
    try:
        with replacing(path) as scratch:
            if path.suffix == ".safetensors":
                save_file(state, scratch, metadata={"format": "pt", "names": to, "arch": origin.arch})
            else:
                torch.save(_PTH[to](state) if to in _PTH else state, scratch)
        digest = sha256_of(path)
        what = f"A backbone without a head, under {to}'s key names. {_input(pretraining(origin))}"
        write_text(path.with_suffix(".md"), card(origin, path.name, digest, what, _loading(to, path.name, origin.arch)))
    except (OSError, RuntimeError, SafetensorError) as error:  # the latter two where the folder is missing
        raise UserError(f"--out {out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    terminal.table(
        "export",
        [
            ("from", origin.says()),
            ("names", to),
            ("outputs", f"{path} (sha256 {digest[:12]}), {path.with_suffix('.md')}"),
        ],
    )
    return {"out": out, "card": str(path.with_suffix(".md")), "sha256": digest, "keys": len(state), "arch": origin.arch}


def card(origin: Origin, file: str, digest: str, what: str, use: str, measured: Sequence[str] = ()) -> str:
    """The model card: what, data, recipe, accuracy, licence, hashes, commands. Markdown.

    what      a sentence or two: what the file is, what goes in.  use: Python that loads it.
    measured  lines that follow the accuracy of training.
    """
    assert origin.path is not None, "weights of a file"
    facts = pretraining(origin)
    tuned = "backbone" in facts.get("state", {}).get("defining", {})
    learnt = "trained on from another backbone" if tuned else "pretrained by predicting image rotations"
    lines = [
        f"# {origin.arch}, {learnt if facts else 'of unknown training'}",
        "",
        f"{what} The stride of a bottleneck is on its 3x3 convolution.",
        "",
        "```python",
        *use.splitlines(),
        "```",
        "",
        "## Files",
        "| file | sha256 |",
        "|---|---|",
        f"| {file} | `{digest}` |",
        f"| made from {Path(str(origin.path)).name} | `{origin.sha256}` |",
        "",
        "## Accuracy",
        _accuracy(training_log(origin), tuned),
        "",
        *measured,
        "## Licence",
        "None is set. Who publishes the weights names one here; the terms of the images they learnt from may bind it.",
        "",
        *_recipe(facts, training_command(origin)),
    ]
    return "\n".join(lines) + "\n"


def _input(facts: dict[str, Any]) -> str:
    """Colours and size that the weights are used to."""
    if not facts:
        return "Input: RGB in [0, 1]; which size and normalisation it is used to is not known."
    data = yaml.safe_load(facts["config"])["data"]
    mean, std = (", ".join(f"{value:g}" for value in data[name]) for name in ("mean", "std"))
    side = data["crop"]
    return f"Input: RGB in [0, 1], minus ({mean}), over ({std}); trained at {side} x {side}, other sizes pass."


def _accuracy(log: list[dict[str, Any]], tuned: bool) -> str:
    """The last held-out accuracy up to these weights, beside chance."""
    held_out = [line["held_out_accuracy"] for line in log if "held_out_accuracy" in line]
    if not held_out:
        return "Not known: no held-out images were judged while it was trained."
    what = "accuracy on the classes it learnt" if tuned else "rotation accuracy"
    chance = "" if tuned else " (chance 25 %)"
    return f"Held-out {what}: {100 * held_out[-1]:.1f} %{chance}. How good the features are, `fastrot page` measures."


def _loading(to: str, file: str, arch: str) -> str:
    if file.endswith(".safetensors"):
        read = f'state = safetensors.torch.load_file("{file}")\n'
    else:
        read = f'state = torch.load("{file}", weights_only=True)\n'
    use = _LOADS[to].format(arch=arch, file=file, depth=arch.removeprefix("resnet"))
    return use if use.startswith("#") else read + use


def _recipe(facts: dict[str, Any], command: str | None) -> list[str]:
    """What the run of the checkpoint says of itself; for foreign weights, that nothing is known."""
    if not facts:
        return [
            "## Training",
            "",
            "The weights come from a file of another library; nothing is known of their training.",
        ]
    config, environment, state = yaml.safe_load(facts["config"]), facts.get("environment", {}), facts.get("state", {})
    data, optim = config["data"], config["optim"]
    defining = state.get("defining", {})
    seen = f"{state['step']:,} steps, {state['position']:,} images" if state else "a finished run"
    rows = [
        ("data", f"`{data['train']}`, content `{environment.get('data', {}).get('content') or defining.get('data')}`"),
        *([("held out", f"`{data['val']}`, by whose accuracy the best checkpoint was chosen")] if data["val"] else []),
        ("seen", seen),
        ("crop", f"{data['crop']} pixels, area {data['scale']}, flip {data['flip']}"),
        ("views", f"{config['rotation']['views']} turns an image, {optim['images_per_step']} images a step"),
        (
            "optimiser",
            f"{optim['name']}, lr {optim['lr']}, momentum {optim['momentum']}, decay {optim['weight_decay']}",
        ),
        ("schedule", f"{optim['schedule']} over {optim['epochs']} epochs, {optim['warmup_epochs']} of them warm-up"),
        ("precision", config["engine"]["precision"]),
        ("seed", config["run"]["seed"]),
        ("versions", json.dumps(environment.get("versions", {}))),
    ]
    return [
        "## Training",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        f"To train such weights: `{command}`. The whole config:",
        "",
        "```yaml",
        facts["config"].rstrip(),
        "```",
    ]
