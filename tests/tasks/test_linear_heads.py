"""Linear heads: the colours of Pillow, a backbone that never moves, and a run that learns."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as T
from PIL import Image, ImageEnhance
from safetensors.torch import load_file, save_file

from fastrot.data.augment import colour_jitter, lighting
from fastrot.data.loader import MicroBatch
from fastrot.data.plan import Sample
from fastrot.models.resnet import backbone_state, build_model
from fastrot.tasks import colour
from fastrot.tasks.linear import Heads, LinearTask

pytestmark = pytest.mark.usefixtures("narrow")

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)  # by the plan's numbers
TAPS = ("feature1", "feature3", "avg")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_jitter_is_pillows_on_bytes_bit_for_bit_in_each_images_own_order(device, strength):
    n = 64
    order, factors = colour_jitter(3, np.arange(n), np.zeros(n, np.int64), strength, 0.0)
    pixels = np.random.default_rng(0).integers(0, 256, (n, 9, 7, 3), np.uint8)
    pixels[1::2] //= 8  # dark ones, whose rounding shows most
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().to(device)
    got = colour.jitter(images, torch.from_numpy(order).to(device), torch.from_numpy(factors).to(device))
    for i in range(n):
        want = Image.fromarray(pixels[i])
        for which in order[i].tolist():
            if which < len(ENHANCERS):
                want = ENHANCERS[which](want).enhance(float(factors[i, which]))
        assert np.array_equal(got[i].permute(1, 2, 0).cpu().numpy(), np.asarray(want)), i


def test_the_heads_views_are_the_protocols_transforms_of_pillow_images():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    backbone = build_model("resnet18", 1, 0).eval()
    task = LinearTask(backbone, ("feature1",), "adaptive", 32, 2, mean, std, torch.device("cpu"), 5, 0.4, 0.1)
    rows, epochs = np.arange(8), np.full(8, 2)
    pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flips, turns = torch.arange(8, dtype=torch.uint8) % 2, torch.zeros(8, 1, dtype=torch.uint8)
    sample = Sample(rows, epochs, np.zeros((8, 4), np.int32), flips.numpy(), turns.numpy())
    got = task.views(MicroBatch(pixels, flips, turns, sample, rows, 8))
    order, factors = colour_jitter(5, rows, epochs, 0.4, 0.0)
    alpha = torch.from_numpy(lighting(5, rows, epochs, 0.1)).float()
    for i in range(8):
        image = Image.fromarray(pixels[i].numpy())
        image = T.hflip(image) if flips[i] else image
        for which in order[i].tolist():
            if which < len(ENHANCERS):
                image = ENHANCERS[which](image).enhance(float(factors[i, which]))
        want = T.normalize(colour.lighting(T.to_tensor(image)[None], alpha[i : i + 1])[0], mean, std)
        torch.testing.assert_close(got[i], want, rtol=0, atol=2e-6)


def test_lighting_adds_the_principal_colours():
    alpha = lighting(3, np.arange(5), np.zeros(5, np.int64), 0.1)
    images = torch.rand(5, 3, 4, 4)
    got = colour.lighting(images, torch.from_numpy(alpha)) - images
    for i in range(5):
        red = -0.5675 * alpha[i, 0] * 0.2175 + 0.7192 * alpha[i, 1] * 0.0188 + 0.4009 * alpha[i, 2] * 0.0045
        blue = -0.5836 * alpha[i, 0] * 0.2175 - 0.6948 * alpha[i, 1] * 0.0188 + 0.4203 * alpha[i, 2] * 0.0045
        np.testing.assert_allclose(got[i, [0, 2], 1, 1], [red, blue], atol=1e-6)


def test_the_backbone_stays_in_eval_mode_and_only_heads_learn():
    backbone = build_model("resnet18", 1, 0).eval()
    backbone.fc = torch.nn.Identity()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    heads = Heads(backbone, TAPS, "adaptive", 32, 5, 0).train()
    sgd = torch.optim.SGD([p for p in heads.parameters() if p.requires_grad], lr=0.1)
    sum(logits.square().sum() for logits in heads(torch.randn(4, 3, 32, 32))).backward()
    sgd.step()
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    assert {name for name, p in heads.named_parameters() if p.requires_grad} == {
        f"heads.{tap}.{kind}" for tap in TAPS for kind in ("weight", "bias")
    }
    assert set(heads.norms["feature1"].state_dict()) >= {"running_mean"} and not heads.norms["avg"].state_dict()
    assert heads.norms["feature1"].running_mean.abs().sum() > 0, "a head's own norm follows the images"


def test_heads_begin_near_nought():
    """N(0, 0.01^2) and no bias, drawn from the seed: the protocol's."""
    backbone = build_model("resnet18", 1, 0).eval()
    backbone.fc = torch.nn.Identity()
    one, same, other = (Heads(backbone, ("avg",), "adaptive", 32, 200, seed).heads["avg"] for seed in (0, 0, 1))
    assert float(one.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert abs(float(one.weight.detach().mean())) < 1e-4 and not one.bias.any()
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    save_file(backbone_state(build_model("resnet18", 4, 5)), path)
    return path


SMALL = (
    "--config", "configs/linear_in1k.yaml", "data.crop=32", "linear.pool=adaptive", "linear.taps=[feature1,feature3,avg]",
    "data.decode=torch", "optim.images_per_step=6", "optim.epochs=6", "optim.milestones=[4]", "run.tensorboard=false",
    "run.log_every=1", "run.checkpoint_every=5", "run.evaluate_every=2",
)  # fmt: skip


def test_heads_train_resume_and_leave_the_backbone_as_it_was(fastrot, images, checkpoint, tmp_path, monkeypatch):
    words = ["linear", "--checkpoint", checkpoint, *SMALL, f"data.train={images}", f"data.val={images}", "--json"]
    whole = fastrot(*words, f"run.out={tmp_path / 'whole'}")
    assert whole.json["held_out_accuracy"] > 0.6 and "accuracy_feature3" in whole.json
    assert "linear heads" in whole.err and "best head" in whole.err
    assert fastrot(*words, f"run.out={tmp_path / 'cut'}", "run.max_steps=5").code == 0
    rest = fastrot(*words, f"run.out={tmp_path / 'cut'}")
    assert rest.json["held_out_accuracy"] == whole.json["held_out_accuracy"]
    a, b = (
        load_file(tmp_path / out / "checkpoints" / "step-00000012" / "model.safetensors") for out in ("whole", "cut")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    start = load_file(checkpoint)
    assert all(torch.equal(a[f"backbone.{k}"], v) for k, v in start.items())
    other = tmp_path / "other.safetensors"
    save_file(backbone_state(build_model("resnet18", 4, 6)), other)
    words[2] = other
    refused = fastrot(*words, f"run.out={tmp_path / 'cut'}")
    assert refused.code == 2 and "backbone was" in refused.err


@pytest.mark.parametrize(
    "override, line",
    [
        ("rotation.views=all", "rotation.views must be one"),
        ("engine.kind=deepspeed", "engine.kind must be plain"),
        ("engine.norm=fused", "engine.norm is for pretraining"),
        ("engine.compile=true", "engine.compile is for pretraining"),
    ],
)
def test_what_heads_cannot_do_is_refused(fastrot, images, checkpoint, tmp_path, override, line):
    words = (
        "linear",
        "--checkpoint",
        checkpoint,
        *SMALL,
        f"data.train={images}",
        f"run.out={tmp_path / 'x'}",
        override,
    )
    done = fastrot(*words)
    assert done.code == 2 and line in done.errors[0]
