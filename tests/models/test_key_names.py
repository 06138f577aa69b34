"""Backbones from other libraries' files: the same numbers, or one line that refuses."""

import pytest
import torch
from safetensors.torch import save_file

from fastrot.errors import UserError
from fastrot.models.backbone import load_backbone
from fastrot.models.key_names import EXPORTS, to_library, to_torchvision
from fastrot.models.resnet import backbone_state, build_model


@pytest.fixture(scope="module")
def model():
    model = build_model("resnet18", 5, 3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def prefixed(model, prefix):
    return {prefix + key: value for key, value in backbone_state(model).items()}


def nested(keys, state):
    for key in reversed(keys):
        state = {key: state}
    return state


WILD = {
    "torchvision, with its head": lambda m: m.state_dict(),
    "DDP": lambda m: {f"module.{k}": v for k, v in m.state_dict().items()},
    "MoCo": lambda m: {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": prefixed(m, "module.encoder_q.")
        | {k: v + 1 for k, v in prefixed(m, "module.encoder_k.").items()}
        | {"module.encoder_q.fc.0.weight": torch.ones(3, 3), "module.queue": torch.ones(4)},
    },
    "mmselfsup": lambda m: {
        "meta": {"epoch": 70},
        "state_dict": prefixed(m, "backbone.") | {"head.fc_cls.weight": torch.ones(4, 512)},
    },
    "VISSL": lambda m: nested(
        ["classy_state_dict", "base_model", "model", "trunk"],
        {f"_feature_blocks.{k}": v for k, v in backbone_state(m).items()},
    ),
    "detectron2": lambda m: {"model": to_library(backbone_state(m), "detectron2")},
    "detectron2 with FPN": lambda m: {
        f"backbone.bottom_up.{k}": v for k, v in to_library(backbone_state(m), "detectron2").items()
    },
    "before num_batches_tracked": lambda m: {k: v for k, v in m.state_dict().items() if "num_batches" not in k},
}


@pytest.mark.parametrize("library", WILD)
def test_a_backbone_is_found_under_any_librarys_names(library, model, tmp_path):
    torch.save(WILD[library](model), tmp_path / "c.pth")
    loaded, origin = load_backbone(str(tmp_path / "c.pth"))
    want = backbone_state(model)
    assert origin.arch == "resnet18" and not loaded.training
    assert all(torch.equal(backbone_state(loaded)[k], v) for k, v in want.items() if "num_batches" not in k)


def test_heads_are_listed_as_passed_over(model, tmp_path):
    torch.save(WILD["MoCo"](model), tmp_path / "c.pth")
    _, origin = load_backbone(str(tmp_path / "c.pth"))
    assert {"state_dict.module.queue", "state_dict.module.encoder_q.fc.0.weight"} < set(origin.skipped)
    assert "passed over" in origin.says()


@pytest.mark.parametrize("library", EXPORTS)
def test_names_go_to_a_library_and_back(library):
    state = backbone_state(build_model("resnet50", 1, 0))
    back, skipped, _ = to_torchvision(to_library(state, library), "there")
    assert list(back) == list(state) and not skipped


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    "spoil, line",
    [
        (lambda s: without(s, "layer3.1.conv2.weight"), "1 backbone keys not in it: layer3.1.conv2.weight"),
        (
            lambda s: s | {"layer3.1.se.fc.weight": torch.ones(1)},
            "1 backbone keys of no place in it: layer3.1.se.fc.weight",
        ),
        (lambda s: s | {"bn1.weight": torch.ones(32)}, r"of another shape: bn1.weight \(32,\), not \(64,\)"),
        (lambda s: without(s, "conv1.weight"), "holds no ResNet's stem"),
        (
            lambda s: s | {f"other.{k}": v for k, v in s.items()} | {f"a.{k}": v for k, v in without(s, "x").items()},
            None,
        ),
        (lambda s: {f"{p}.{k}": v for p in "ab" for k, v in s.items()}, r"holds several ResNets \(a., b.\)"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("layer4.1")}, r"stages of \(2, 2, 2, 1\) basic"),
    ],
)
def test_a_backbone_that_is_not_whole_is_refused(spoil, line, model, tmp_path):
    state = {k: v.clone() for k, v in spoil(backbone_state(model)).items()}
    save_file(state, tmp_path / "c.safetensors")
    if line is None:  # the plain one is meant
        assert load_backbone(str(tmp_path / "c.safetensors"))[1].names == "torchvision, timm or plain"
        return
    with pytest.raises(UserError, match=line):
        load_backbone(str(tmp_path / "c.safetensors"))


class Trap:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_would_execute_is_refused(model, tmp_path, capsys):
    torch.save({"state_dict": model.state_dict(), "extra": Trap()}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="objects other than tensors, which could execute"):
        load_backbone(str(tmp_path / "c.pth"))
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\3\4 cut"])
@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_a_damaged_file_is_refused_in_a_line(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        load_backbone(str(tmp_path / name))
    assert "\n" not in str(error.value)
