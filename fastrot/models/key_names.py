"""What libraries call the parts of a ResNet: one table, read in both directions.

Inside fastrot a backbone's keys are torchvision's. A library's name of a key is its prefix plus the
key, rewritten by its rules.
"""

import re
from dataclasses import dataclass

from torch import Tensor

from fastrot.errors import UserError

_STEM = r"(conv1|bn1)\."
_STAGE = r"layer([1-4])\."
BACKBONE = re.compile(rf"{_STEM}|{_STAGE}")
_OURS = re.compile(r"^(backbone\.(stem\.)?(body\.)?|roi_heads\.box_head\.)")  # C4's box head holds stage 4


@dataclass(frozen=True)
class Library:
    """How one library names a ResNet.

    prefix  what stands before every key.  rules  (pattern, replacement) from torchvision's key to the
    library's, applied in order; back  the same from the library's to torchvision's.
    """

    prefix: str = ""
    rules: tuple[tuple[str, str], ...] = ()
    back: tuple[tuple[str, str], ...] = ()


# detectron2: stages are res2 .. res5, a norm hangs on its convolution
_DETECTRON2 = (
    (r"^(conv1\.)", r"stem.\1"),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer1\.", "res2."),
    (r"^layer2\.", "res3."),
    (r"^layer3\.", "res4."),
    (r"^layer4\.", "res5."),
    (r"\.bn([123])\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
_FROM_DETECTRON2 = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.", ""),
    (r"^res2\.", "layer1."),
    (r"^res3\.", "layer2."),
    (r"^res4\.", "layer3."),
    (r"^res5\.", "layer4."),
    (r"\.conv([123])\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)

EXPORTS = {
    "torchvision": Library(),
    "timm": Library(),
    "mmpretrain": Library(prefix="backbone."),
    "mmdetection": Library(),  # its backbone and its shared head each load what bears their names
    "detectron2": Library(rules=_DETECTRON2, back=_FROM_DETECTRON2),
}

# What stands before a backbone's keys in checkpoints found in the wild, first match first: where a file
# holds several ResNets (a momentum encoder, a target network), the one that its authors evaluate.
_SOURCES = (
    ("MoCo", "encoder_q."),
    ("MoCo v3", "base_encoder."),
    ("mmselfsup's MoCo", "encoder_q.0."),
    ("mmselfsup's BYOL", "online_net.0."),
    ("VISSL", "_feature_blocks."),
    ("mmpretrain or mmselfsup", "backbone."),
    ("torchvision, timm or plain", ""),
)
_WRAPPERS = re.compile(r"^((state_dict|model_state_dict|classy_state_dict|base_model|model|trunk|module)\.)*")


def rewritten(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def backbone_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone in the state of a network that fastrot trains, by torchvision's names."""
    named = {_OURS.sub("", key): value for key, value in state.items()}
    return {key: value for key, value in named.items() if BACKBONE.match(key)}


def to_library(state: dict[str, Tensor], library: str) -> dict[str, Tensor]:
    """A backbone's state under another library's names; `library` is a key of EXPORTS."""
    names = EXPORTS[library]
    return {names.prefix + rewritten(key, names.rules): value for key, value in state.items()}


def to_torchvision(state: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str], str]:
    """The ResNet in a state dict of any library, by torchvision's names.

    state  flat: nested containers joined by dots.  where  names the file in errors.
    Returns the backbone's tensors, the keys passed over (heads, other networks), and whose names they were.
    Raises UserError where no ResNet or more than one is found.
    """
    found = {key.removesuffix("conv1.weight") for key in state if _is_stem(key, state)}
    if not found:
        some = ", ".join(list(state)[:3]) or "nothing"
        raise UserError(f"{where}: holds no ResNet's stem (a 7x7 convolution named conv1.weight); it has {some}, ...")
    prefix, whose = _choose(found, where)
    if prefix.endswith("stem."):
        prefix, whose, back = prefix.removesuffix("stem."), "detectron2", EXPORTS["detectron2"].back
    else:
        back = ()
    backbone, skipped = {}, []
    for key, value in state.items():
        name = rewritten(key.removeprefix(prefix), back)
        if key.startswith(prefix) and BACKBONE.match(name):
            backbone[name] = value
        else:
            skipped.append(key)
    return backbone, skipped, whose


def _is_stem(key: str, state: dict[str, Tensor]) -> bool:
    """Whether a key is the first convolution of a ResNet: 3 channels in, 7x7."""
    ends = key == "conv1.weight" or key.endswith(".conv1.weight")
    return ends and tuple(state[key].shape[1:]) == (3, 7, 7)


def _choose(found: set[str], where: str) -> tuple[str, str]:
    """The prefix of the ResNet to take, and whose names those are."""
    for whose, ending in _SOURCES:
        mine = [prefix for prefix in found if ending in (prefix, _WRAPPERS.sub("", prefix))]
        if len(mine) == 1:
            return mine[0], whose
    if len(found) == 1:
        return found.pop(), "a name of its own"
    raise UserError(f"{where}: holds several ResNets ({', '.join(sorted(found))}); save the one that is meant alone")
