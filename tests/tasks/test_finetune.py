"""Fine-tuning: the protocol's groups and rates, plain torch's steps, the images it may see, and what is refused."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from conftest import ROOT, metrics, write_folder
from fastrot import config as configs
from fastrot.cli import main
from fastrot.data.decode import make_decoder
from fastrot.data.decode.batch import Batch
from fastrot.data.index import index
from fastrot.data.loader import MicroBatch
from fastrot.data.manifest import Manifest
from fastrot.data.order import FullOrder
from fastrot.data.plan import Plan
from fastrot.data.storage import FileStorage
from fastrot.engine.optimizers import build_optimizer, set_lr
from fastrot.engine.schedules import lr_at
from fastrot.errors import UserError
from fastrot.models.resnet import backbone_state, build_model
from fastrot.runs.finetune import drawn_rows, named_rows
from fastrot.tasks.finetune import FinetuneTask
from workers.ranks import as_ranks

pytestmark = pytest.mark.usefixtures("narrow")

CONFIG = ROOT / "configs" / "semi_in1k_1.yaml"
SMALL = (
    "--config", "configs/semi_in1k_1.yaml", "finetune.fraction=1", "finetune.head_rate=5", "optim.lr=0.002", "data.crop=64",
    "data.decode=torch",
    "optim.images_per_step=5", "optim.epochs=5", "optim.milestones=[3]", "engine.kind=plain", "run.tensorboard=false",
    "run.log_every=1", "run.checkpoint_every=4", "run.evaluate_every=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    save_file(backbone_state(build_model("resnet18", 4, 5)), path)
    return path


@pytest.fixture
def manifest(images, tmp_path):
    return Manifest.load(index(str(images), tmp_path / "cache", 10**8, lambda items, *_: items))


def words(checkpoint, images, out, *more):
    return (
        "finetune",
        "--checkpoint",
        checkpoint,
        *SMALL,
        f"data.train={images}",
        f"data.val={images}",
        f"run.out={out}",
        *more,
    )


def weights(out, step):
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@pytest.mark.parametrize("percent, decay", [(1, 5e-4), (10, 1e-4)])
def test_the_shipped_configs_are_the_protocol(percent, decay):
    """protocols.md, "Semi-supervised", row by row."""
    config, _ = configs.load(str(CONFIG.with_name(f"semi_in1k_{percent}.yaml")), [])
    o, d = config.optim, config.data
    assert (o.images_per_step, o.epochs, o.momentum, o.nesterov, o.name) == (256, 20, 0.9, False, "sgd")
    assert (o.schedule, o.milestones, o.gamma, o.warmup_epochs) == ("step", (12, 16), 0.2, 0)
    assert o.weight_decay == decay and o.decay_norms and o.clip is None
    assert (d.window, d.crop, d.scale, d.ratio, d.flip) == ("random_resized", 224, (0.08, 1), (3 / 4, 4 / 3), 0.5)
    assert (config.finetune.fraction, config.model.arch, config.model.sync_batchnorm) == (
        percent / 100,
        "resnet50",
        True,
    )
    assert o.lr in (0.1, 0.01, 0.001) and config.finetune.head_rate in (1, 10, 100)


@pytest.mark.parametrize("head_rate", [1, 100])
def test_the_head_learns_at_its_own_rate_and_all_is_decayed(head_rate):
    config, _ = configs.load(str(CONFIG), [])
    o, model = config.optim, build_model("resnet18", 10, 0)
    optimizer = build_optimizer(
        o.name, model, lr=o.lr, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay,
        decay_norms=o.decay_norms, head_rate=head_rate, trust=o.trust,
    )  # fmt: skip
    for epoch, rate in ((0, 0.01), (11.9, 0.01), (12, 0.002), (16, 0.0004), (20, 0.0004)):
        now = lr_at(epoch, epochs=o.epochs, peak=o.lr, schedule=o.schedule, milestones=o.milestones, gamma=o.gamma)
        set_lr(optimizer, now)
        found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, p in model.named_parameters():
            assert found[id(p)]["lr"] == pytest.approx(rate * (head_rate if name.startswith("fc.") else 1))
            assert found[id(p)]["weight_decay"] == 5e-4


def test_its_steps_are_plain_torchs(fastrot, images, checkpoint, manifest, tmp_path):
    """The oracle: torchvision's network, torch's SGD with two groups, the plan's windows cut by hand."""
    more = ("run.max_steps=3", "run.seed=7", "run.checkpoint_every=1")
    assert fastrot(*words(checkpoint, images, tmp_path / "run", *more)).code == 0
    model = torchvision.models.resnet18(num_classes=3)
    head = build_model("resnet18", 3, 7).fc.state_dict()
    model.load_state_dict(load_file(checkpoint) | {f"fc.{k}": v for k, v in head.items()})
    body = [p for name, p in model.named_parameters() if not name.startswith("fc.")]
    groups = [{"params": body}, {"params": model.fc.parameters(), "lr": 0.01}]
    sgd = torch.optim.SGD(groups, lr=0.002, momentum=0.9, weight_decay=5e-4)
    plan = Plan(7, manifest.height, manifest.width, FullOrder(12, 7), "one")
    decoder = make_decoder("torch", "cpu", torch.device("cpu"), 1, 5, 1)[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for step in range(3):
        sample = plan.at(5 * step, 5 * step + 5)
        decoder.submit(Batch(FileStorage(manifest).read(sample.rows), np.ones(5, np.uint8), sample.windows, 64))
        x = decoder.result()[0].permute(0, 3, 1, 2) / 255
        x = torch.stack([one.flip(2) if flip else one for one, flip in zip(x, sample.flips, strict=True)])
        loss = F.cross_entropy(model((x - mean) / std), torch.from_numpy(manifest.label[sample.rows]))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        assert metrics(tmp_path / "run")[step]["loss"] == pytest.approx(loss.item(), rel=1e-3)
    for name, value in weights(tmp_path / "run", 3).items():
        torch.testing.assert_close(
            value, model.state_dict()[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_it_resumes_and_leaves_a_backbone_others_read(fastrot, images, checkpoint, tmp_path):
    whole = fastrot(*words(checkpoint, images, tmp_path / "whole", "--json"))
    assert whole.json["held_out_top5"] == 1, "there are three classes"
    assert "fine-tuning" in whole.err and "top-5" in whole.err
    assert fastrot(*words(checkpoint, images, tmp_path / "cut", "run.max_steps=6")).code == 0
    rest = fastrot(*words(checkpoint, images, tmp_path / "cut", "--json"))
    assert rest.json["held_out_accuracy"] == whole.json["held_out_accuracy"]
    a, b = (weights(tmp_path / out, 12) for out in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    start = load_file(checkpoint)
    assert not torch.equal(a["conv1.weight"], start["conv1.weight"]), "nothing is frozen"
    assert not torch.equal(a["bn1.running_mean"], start["bn1.running_mean"]), "batch norms follow the images"
    assert "arch: resnet18" in (tmp_path / "whole" / "config.yaml").read_text()
    out = tmp_path / "features"
    small = ("--taps", "avg", "data.crop=64", "data.decode=torch")
    assert fastrot("features", "--checkpoint", tmp_path / "whole", "--data", images, "--out", out, *small).code == 0
    other = tmp_path / "other.safetensors"
    save_file(backbone_state(build_model("resnet18", 4, 6)), other)
    for more, line in (((), "backbone was"), (("finetune.head_rate=3",), "finetune.head_rate was 5")):
        refused = fastrot(*words(other, images, tmp_path / "cut", *more))
        assert refused.code == 2 and line in refused.err


def test_a_share_of_every_class_is_learnt_from_and_said(fastrot, images, checkpoint, tmp_path):
    more = ("finetune.fraction=0.5", "run.max_steps=1")
    done = fastrot(*words(checkpoint, images, tmp_path / "half", *more))
    assert done.code == 0 and "learning from 6 images: 50% of every class, drawn by seed 0" in done.err
    kept = Manifest.load(tmp_path / "half" / "manifest" / "train")
    assert kept.label.tolist() == [0, 0, 1, 1, 2, 2]
    assert kept.content != Manifest.load(tmp_path / "half" / "manifest" / "val").content
    again = fastrot(*words(checkpoint, images, tmp_path / "half", "finetune.fraction=0.25", "run.max_steps=2"))
    assert again.code == 2 and "finetune.fraction was 0.5, is 0.25" in again.err


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.floats(0.01, 1), st.integers(0, 2**64 - 1))
def test_a_share_is_of_every_class_and_lies_in_a_larger_one(labels, fraction, seed):
    labels = np.array(labels)
    rows = drawn_rows(labels, fraction, seed)
    assert (np.diff(rows) > 0).all()
    for label in np.unique(labels):
        have = int((labels == label).sum())
        assert int((labels[rows] == label).sum()) == max(1, int(fraction * have + 0.5))
    assert set(rows) <= set(drawn_rows(labels, min(1, 1.5 * fraction), seed))
    assert len(drawn_rows(labels, 1, seed)) == len(labels)


def test_top_5_counts_the_five_likeliest_of_more_classes():
    classes, cpu = 9, torch.device("cpu")
    task = FinetuneTask(torch.nn.Identity(), classes, (0,) * 3, (1,) * 3, torch.float32, cpu)
    logits = torch.arange(classes).float().repeat(classes, 1)  # row i is of class i: its rank is classes - i
    none = torch.zeros(classes, dtype=torch.uint8)
    batch = MicroBatch(torch.zeros(classes, 1, 1, 3, dtype=torch.uint8), none, none[:, None], None, np.arange(9), 9)
    loss, sums = task.loss(lambda _: logits, None, batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(classes), reduction="sum"))
    assert sums[1:].tolist() == [9, 1, 5]
    assert task.summary(sums) == pytest.approx({"loss": float(loss) / 9, "accuracy": 1 / 9, "top5": 5 / 9})


def test_other_seeds_draw_other_images():
    labels = np.repeat(np.arange(4), 50)
    draws = {tuple(drawn_rows(labels, 0.1, seed)) for seed in range(8)}
    assert len(draws) == 8


def test_a_published_list_names_its_images(manifest, tmp_path):
    names = tmp_path / "1percent.txt"
    names.write_text("class1/2.jpg\nclass0/3.jpg\n")  # SimCLR's: a name a line
    assert named_rows(manifest, names).tolist() == [3, 6]
    names.write_text("class1/2.jpg 1\nclass2/0.jpg 2\n")  # MMSelfSup's: a label behind it
    assert named_rows(manifest, names).tolist() == [6, 8]
    chosen = manifest.some(named_rows(manifest, names))
    assert [chosen.name(row)[-12:] for row in range(2)] == ["class1/2.jpg", "class2/0.jpg"]
    assert chosen.label.tolist() == [1, 2] and chosen.height.tolist() == manifest.height[[6, 8]].tolist()
    assert chosen.content == manifest.some(np.array([6, 8])).content != manifest.some(np.array([6, 9])).content


@pytest.mark.parametrize(
    "text, line",
    [
        ("class9/2.jpg\nclass0/1.jpg\n", "1 of 2 names are of no file"),
        ("2.jpg\n", "2.jpg names several images"),
        ("\n", "0 of 0 names"),
        (None, "No such file"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(manifest, tmp_path, text, line):
    names = tmp_path / "names.txt"
    if text is not None:
        names.write_text(text)
    with pytest.raises(UserError, match=line):
        named_rows(manifest, names)


@pytest.mark.parametrize(
    "override, line",
    [
        ("rotation.views=all", "fastrot finetune: rotation.views must be one"),
        ("rotation.shuffle_labels=true", "fastrot finetune: rotation.shuffle_labels is for pretraining"),
        ("engine.compile=true", "fastrot finetune: engine.compile is for pretraining"),
        ("finetune.head_rate=0", "finetune.head_rate is 0"),
        ("finetune.fraction=0", "finetune.fraction is 0"),
        ("finetune.names=none.txt", "finetune.names none.txt: No such file"),
        ("--random-init=1", "name either --checkpoint C or --random-init SEED"),
    ],
)
def test_what_cannot_be_is_one_line(fastrot, images, checkpoint, tmp_path, override, line):
    done = fastrot(*words(checkpoint, images, tmp_path / "x", override))
    assert done.code == 2 and len(done.errors) == 1 and line in done.errors[0]


def test_a_list_and_a_share_at_once_are_refused():
    with pytest.raises(UserError, match="both choose images"):
        configs.load(str(CONFIG), ["finetune.names=1percent.txt"])


def test_held_out_labels_must_mean_what_the_training_labels_mean(fastrot, images, checkpoint, tmp_path):
    more = write_folder(tmp_path / "more", classes=4, per_class=1)
    other = write_folder(tmp_path / "other", classes=3, per_class=1)
    (other / "class1").rename(other / "zebra")
    unlabelled = tmp_path / "list"
    unlabelled.write_text(f"{images}/class0/1.jpg\n")
    for val, line in (
        (more, "label 3, but the training images have classes 0 to 2"),
        (other, "other classes than"),
        (f"list:{unlabelled}", "every image needs one class"),
    ):
        done = fastrot(*words(checkpoint, images, tmp_path / "x", f"data.val={val}"))
        assert done.code == 2 and len(done.errors) == 1 and line in done.errors[0]


@pytest.mark.parametrize(
    "command, more",
    [
        ("finetune", ()),
        ("linear", ("--config", "configs/linear_places205.yaml", "linear.pool=adaptive", "data.resize=73")),
    ],
)
def test_two_uneven_ranks_learn_what_one_does(fastrot, images, checkpoint, tmp_path, command, more):
    call = [command, *words(checkpoint, images, "", *more, "optim.lr=0.001", "run.max_steps=4")[1:]]
    if command == "linear":  # which reads no `finetune`
        call = [word for word in call if not str(word).startswith("finetune.")]
    assert fastrot(*call, f"run.out={tmp_path / 'one'}").code == 0
    as_ranks(2, main, [str(word) for word in (*call, f"run.out={tmp_path / 'two'}")])
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in {"loss", "accuracy", "held_out_loss", "held_out_accuracy"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-3), key
    one, two = (weights(tmp_path / out, 4) for out in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
