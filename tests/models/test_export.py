"""Exports against the libraries they are for: loaded there, the same activations."""

import json

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from fastrot.config import load, to_yaml
from fastrot.models.key_names import to_library
from fastrot.models.resnet import backbone_state, build_model, tap_maps
from fastrot.models.taps import TAPS, pooled_maps


@pytest.fixture(scope="module")
def model():
    model = build_model("resnet50", 4, 1).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "backbone.safetensors"
    save_file(backbone_state(model), path)
    return path


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def assert_same(got, want):
    """Up to the order of sums, which the memory's layout decides."""
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def exported(fastrot, checkpoint, to, out):
    done = fastrot("export", "--checkpoint", checkpoint, "--to", to, "--out", out, "--json").json
    assert (out.parent / done["card"]).read_text().startswith("# resnet50, ")
    return load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_torchvision_loads_it_and_sees_the_same(fastrot, model, checkpoint, images, tmp_path, suffix):
    state = exported(fastrot, checkpoint, "torchvision", tmp_path / f"m{suffix}")
    with torch.device("meta"):
        theirs = torchvision.models.resnet50().eval()
    left = theirs.load_state_dict(state, strict=False, assign=True)
    assert left.missing_keys == ["fc.weight", "fc.bias"] and not left.unexpected_keys
    with torch.no_grad():
        got = torchvision.models._utils.IntermediateLayerGetter(theirs, {"layer4": "out"})(images)["out"]
        assert_same(got, tap_maps(model, images)[-1])


def test_timm_loads_it_and_sees_the_same(fastrot, model, checkpoint, images, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed: it is no requirement of fastrot")
    state = exported(fastrot, checkpoint, "timm", tmp_path / "m.safetensors")
    with torch.device("meta"):
        theirs = timm.create_model("resnet50", num_classes=0).eval()
    theirs.load_state_dict(state, assign=True)
    with torch.no_grad():
        assert_same(theirs.forward_features(images), tap_maps(model, images)[-1])


class ConvNorm(nn.Conv2d):
    """detectron2's convolution: its norm hangs on it."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, bias=False, **options)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        return self.norm(super().forward(x))


class D2Block(nn.Module):
    """detectron2.modeling.backbone.resnet.BottleneckBlock with STRIDE_IN_1X1 False."""

    def __init__(self, inside, between, out, stride):
        super().__init__()
        self.shortcut = ConvNorm(inside, out, 1, stride=stride) if inside != out else None
        self.conv1 = ConvNorm(inside, between, 1)
        self.conv2 = ConvNorm(between, between, 3, stride=stride, padding=1)
        self.conv3 = ConvNorm(between, out, 1)

    def forward(self, x):
        out = self.conv3(self.conv2(self.conv1(x).relu_()).relu_())
        return (out + (self.shortcut(x) if self.shortcut else x)).relu_()


class D2ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = ConvNorm(3, 64, 7, stride=2, padding=3)
        inside = 64
        for i, blocks in enumerate((3, 4, 6, 3)):
            out, stage = 256 * 2**i, []
            for b in range(blocks):
                stage.append(D2Block(inside, out // 4, out, 2 if i and not b else 1))
                inside = out
            setattr(self, f"res{i + 2}", nn.Sequential(*stage))

    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem.conv1(x).relu_(), 3, 2, 1)
        return self.res5(self.res4(self.res3(self.res2(x))))


def test_a_model_with_detectron2s_names_loads_it_and_sees_the_same(fastrot, model, checkpoint, images, tmp_path):
    saved = exported(fastrot, checkpoint, "detectron2", tmp_path / "m.pth")
    assert saved["matching_heuristics"] is True
    with torch.device("meta"):
        theirs = D2ResNet().eval()
    theirs.load_state_dict(saved["model"], assign=True)
    with torch.no_grad():
        assert_same(theirs(images), tap_maps(model, images)[-1])


NORM = ("weight", "bias", "running_mean", "running_var")
BLOCKS = (3, 4, 6, 3)


def convolutions(name_of):
    """(name, shape) of each convolution of a ResNet-50. name_of: (stage 1 to 4, block, 1 to 3 or 0: on the shortcut)."""
    inside = 64
    for stage, blocks in enumerate(BLOCKS, 1):
        between, out = 32 * 2**stage, 128 * 2**stage
        for block in range(blocks):
            yield name_of(stage, block, 1), (between, inside, 1, 1)
            yield name_of(stage, block, 2), (between, between, 3, 3)
            yield name_of(stage, block, 3), (out, between, 1, 1)
            if block == 0:
                yield name_of(stage, block, 0), (out, inside, 1, 1)
            inside = out


def detectron2s():
    """BasicStem, BottleneckBlock and ResNet of detectron2/modeling/backbone/resnet.py: a norm is its convolution's."""
    stages = convolutions(lambda s, b, c: f"res{s + 1}.{b}.{f'conv{c}' if c else 'shortcut'}")
    for name, shape in [("stem.conv1", (64, 3, 7, 7)), *stages]:
        yield f"{name}.weight", shape
        yield from ((f"{name}.norm.{part}", shape[:1]) for part in NORM)


def mmdetections():
    """ResNet of mmdet/models/backbones/resnet.py, ResLayer of mmdet/models/utils/res_layer.py: a norm is numbered as its
    convolution, and on a shortcut the second of two."""
    stages = convolutions(lambda s, b, c: f"layer{s}.{b}.{f'conv{c}' if c else 'downsample.0'}")
    for name, shape in [("conv1", (64, 3, 7, 7)), *stages]:
        yield f"{name}.weight", shape
        norm = name.replace("downsample.0", "downsample.1").replace("conv", "bn")
        yield from ((f"{norm}.{part}", shape[:1]) for part in NORM)


@pytest.mark.parametrize("to, rules", [("detectron2", detectron2s), ("mmdetection", mmdetections)])
def test_names_and_shapes_are_those_that_the_detectors_expect(model, to, rules):
    state = to_library(backbone_state(model), to)
    found = {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert found == dict(rules()) and len(found) == 53 * 5
    counters = {name.removesuffix("num_batches_tracked") for name in state.keys() - found.keys()}
    assert counters == {name.removesuffix("running_var") for name in found if name.endswith("running_var")}


def matched(wanted, held):
    """Of each name that a model wants the longest held one that ends it, as detectron2's align_and_update_state_dicts
    does; two names may not want one."""
    found = {}
    for name in wanted:
        ends = [one for one in held if name == one or name.endswith(f".{one}")]
        if ends:
            found[name] = max(ends, key=len)
    assert len(set(found.values())) == len(found), "ambiguous"
    return found


def test_detectron2s_matching_finds_every_weight_of_a_c4_detector_and_of_a_pyramids(model):
    held = to_library(backbone_state(model), "detectron2")
    names = [name for name, _ in detectron2s()]
    c4 = [f"roi_heads.{name}" if name.startswith("res5.") else f"backbone.{name}" for name in names]
    heads = [
        "roi_heads.res5.norm.weight",
        "proposal_generator.rpn_head.conv.weight",
        "roi_heads.box_predictor.cls_score.weight",
    ]
    pyramid = [f"backbone.bottom_up.{name}" for name in names]
    others = [
        "backbone.fpn_lateral2.weight",
        "backbone.fpn_lateral2.norm.weight",
        "roi_heads.mask_head.mask_fcn1.weight",
    ]
    for mine, rest in ((c4, heads), (pyramid, others)):
        found = matched([*mine, *rest], held)
        assert set(found) == set(mine) and all(name.endswith(f".{found[name]}") for name in mine)


def test_mmdetections_backbone_and_shared_head_load_their_parts(fastrot, model, checkpoint, tmp_path):
    """As mmcv's load_checkpoint does, unstrictly: a C4 detector's backbone ends with layer3, its head is layer4."""
    state = exported(fastrot, checkpoint, "mmdetection", tmp_path / "m.pth")["state_dict"]
    assert 'init_cfg=dict(type="Pretrained", checkpoint="m.pth"))' in (tmp_path / "m.md").read_text()
    with torch.device("meta"):
        backbone = torchvision.models.resnet50()
    head = nn.Module()
    head.layer4 = backbone.layer4
    del backbone.layer4, backbone.fc
    for part in (backbone, head):
        assert not part.load_state_dict(state, strict=False, assign=True).missing_keys
    assert torch.equal(head.layer4[2].conv3.weight, model.layer4[2].conv3.weight)


def test_a_model_with_mmpretrains_names_loads_it_and_sees_the_same(fastrot, model, checkpoint, images, tmp_path):
    state = exported(fastrot, checkpoint, "mmpretrain", tmp_path / "m.pth")["state_dict"]
    theirs = nn.Module()
    with torch.device("meta"):
        theirs.backbone = torchvision.models.resnet50()  # mmpretrain's ResNet has torchvision's names and no fc
    del theirs.backbone.fc
    theirs.load_state_dict(state, assign=True)
    theirs.eval()
    with torch.no_grad():
        got = pooled_maps(theirs.backbone, images, TAPS, "gap")["feature5"]
        assert_same(got, pooled_maps(model, images, TAPS, "gap")["feature5"])


def test_an_export_is_itself_a_checkpoint(fastrot, model, checkpoint, tmp_path):
    exported(fastrot, checkpoint, "detectron2", tmp_path / "there.pth")
    back = exported(fastrot, tmp_path / "there.pth", "torchvision", tmp_path / "back.safetensors")
    assert all(torch.equal(back[k], v) for k, v in backbone_state(model).items())


def test_the_card_says_what_the_run_was(fastrot, model, tmp_path):
    run, step = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000007"
    step.mkdir(parents=True)
    (run / "config.yaml").write_text(
        to_yaml(load(None, ["data.train=/photographs", "data.val=/aside", "optim.lr=0.3", "data.crop=32"])[0])
    )
    log = [{"step": 6, "held_out_accuracy": 0.625}, {"step": 7, "held_out_accuracy": 0.75}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    facts = {"command": ["fastrot", "train"], "versions": {"torch": "2"}, "data": {"content": "c0ffee", "rows": 9}}
    (run / "environment.json").write_text(json.dumps(facts))
    (step / "state.json").write_text(json.dumps({"step": 7, "position": 896}))
    save_file(backbone_state(model), step / "backbone.safetensors")
    exported(fastrot, run, "torchvision", tmp_path / "m.safetensors")
    card = (tmp_path / "m.md").read_text()
    for said in (
        "/photographs",
        "`/aside`, by whose accuracy",
        "c0ffee",
        "7 steps, 896 images",
        "lr 0.3",
        "fastrot train",
        "32 x 32",
    ):
        assert said in card, said
    assert "Held-out rotation accuracy: 62.5 % (chance 25 %)" in card, (
        "of the step that was exported, not of a later one"
    )
    assert "## Licence" in card and "224 x 224" not in card


def test_the_card_of_weights_from_elsewhere_claims_nothing(fastrot, checkpoint, tmp_path):
    exported(fastrot, checkpoint, "torchvision", tmp_path / "m.safetensors")
    card = (tmp_path / "m.md").read_text()
    assert "of unknown training" in card and "rotation" not in card and "224 x 224" not in card
    assert "Not known: no held-out images" in card and "## Licence" in card


def test_another_ending_is_refused(fastrot, checkpoint, tmp_path):
    done = fastrot("export", "--checkpoint", checkpoint, "--to", "timm", "--out", tmp_path / "m.pkl")
    assert done.code == 2 and "expected a name ending in .safetensors or .pth" in done.err


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_folder_that_is_not_there_is_refused(fastrot, checkpoint, tmp_path, suffix):
    done = fastrot("export", "--checkpoint", checkpoint, "--to", "timm", "--out", tmp_path / "none" / f"m{suffix}")
    assert done.code == 2 and len(done.errors) == 1 and "cannot be written" in done.errors[0]
