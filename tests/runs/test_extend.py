"""A run that is trained on in another way: longer, branched, from given weights, moved."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import metrics, write_folder, write_shards

pytestmark = pytest.mark.usefixtures("narrow")

WORDS = [
    "model.arch=resnet18", "data.crop=16", "optim.images_per_step=6", "optim.lr=0.01", "optim.epochs=2",
    "optim.warmup_epochs=0", "run.log_every=1", "run.checkpoint_every=1", "run.tensorboard=false", "engine.kind=plain",
]  # fmt: skip


@pytest.fixture
def begin(tmp_path, fastrot, images):
    def call(name, *words):
        return fastrot("train", *WORDS, f"data.train={images}", f"run.out={tmp_path / name}", *words)

    return call


def weights(run, step):
    return load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_longer_run_is_the_one_that_was_as_long_from_the_start(begin, tmp_path):
    assert begin("a").code == 0
    assert begin("a", "optim.epochs=3", "--resume-anyway", "optim.epochs").code == 0
    assert begin("b", "optim.epochs=3").code == 0
    assert same(weights(tmp_path / "a", 6), weights(tmp_path / "b", 6))
    assert [line["loss"] for line in metrics(tmp_path / "a")] == [line["loss"] for line in metrics(tmp_path / "b")]


@pytest.mark.slow
def test_a_branch_that_was_stopped_goes_on_with_the_same_command(begin, tmp_path):
    assert begin("a").code == 0
    words = ["--resume", tmp_path / "a/checkpoints/step-00000002", "--resume-anyway", "optim.lr", "optim.lr=0.02"]
    assert begin("whole", *words).code == 0
    assert begin("cut", *words, "run.max_steps=3").code == 0
    done = begin("cut", *words)
    assert done.code == 0 and "resumed from step-00000003: step 3 of 4" in done.err
    assert same(weights(tmp_path / "cut", 4), weights(tmp_path / "whole", 4))
    assert not same(weights(tmp_path / "cut", 4), weights(tmp_path / "a", 4))
    assert [line["lr"] for line in metrics(tmp_path / "cut")] == [0.02, 0.02]


def test_given_weights_are_what_a_new_run_begins_with(begin, tmp_path):
    """At a rate of next to nothing the backbone after a step is the given one, and the head is the drawn one."""
    assert begin("a").code == 0
    nearly = ["optim.lr=1e-30", "run.max_steps=1"]
    given = shutil.copyfile(tmp_path / "a/backbone.safetensors", tmp_path / "given.safetensors")
    for name, path in (("from-run", tmp_path / "a"), ("from-file", given)):
        done = begin(name, f"model.init={path}", *nearly)
        assert done.code == 0 and "begins with resnet18 from" in done.err
    assert begin("drawn", *nearly).code == 0
    ours, drawn = weights(tmp_path / "from-file", 1), weights(tmp_path / "drawn", 1)
    learnt = load_file(given)
    learns = [name for name in learnt if name.endswith(("weight", "bias"))]
    assert learns and all(torch.equal(ours[name], learnt[name]) for name in learns)
    assert torch.equal(ours["fc.weight"], drawn["fc.weight"])
    assert same(ours, weights(tmp_path / "from-run", 1))
    given.unlink()  # read at the first start alone
    assert begin("from-file", f"model.init={given}", "optim.lr=1e-30").code == 0
    assert begin("from-file", "model.init=another", "optim.lr=1e-30").code == 2


@pytest.mark.parametrize(
    "init, words",
    [("/no/such", "/no/such: no such file or folder"), ("{a}", "is a resnet18; set model.arch=resnet18")],
)
def test_weights_that_do_not_fit_are_refused(begin, tmp_path, init, words):
    assert begin("a", "run.max_steps=1").code == 0
    done = begin("b", f"model.init={init.format(a=tmp_path / 'a')}", "model.arch=resnet34")
    assert done.code == 2 and len(done.errors) == 1 and words in done.errors[0]
    assert not list((tmp_path / "b").glob("checkpoints/*"))


@pytest.mark.slow
def test_run_and_images_may_move_and_be_packed(begin, tmp_path, images):
    assert begin("a").code == begin("whole", "optim.epochs=3").code == 0
    (tmp_path / "a").rename(tmp_path / "b")
    shutil.copytree(images, tmp_path / "images", copy_function=shutil.copyfile)
    write_shards(images, tmp_path)
    longer = ["--resume-anyway", "optim.epochs", "optim.epochs=3"]
    assert begin("b", f"data.train={tmp_path / 'images'}", *longer, "run.max_steps=5").code == 0
    assert begin("b", f"data.train={tmp_path}/shard-{{0..1}}.tar", *longer).code == 0
    assert same(weights(tmp_path / "b", 6), weights(tmp_path / "whole", 6))
    (tmp_path / "images/class0/0.jpg").unlink()
    done = begin("b", f"data.train={tmp_path / 'images'}", "optim.epochs=4", "--resume-anyway", "optim.epochs")
    assert done.code == 2 and len(done.errors) == 1 and "data was '" in done.errors[0]
    other = write_folder(tmp_path / "other", classes=1)
    assert begin("b", f"data.train={other}", *longer).code == 2
