"""A run's mirror: what is there is whole, what cannot be written ends nothing, what was lost here comes from there."""

import shutil

import fsspec
import pytest
from safetensors.torch import load_file

from conftest import metrics
from fastrot.errors import Fault
from fastrot.remote import open_store, store
from fastrot.runs import checkpoint, mirror
from web_server import serving

pytestmark = pytest.mark.usefixtures("narrow")

WORDS = [
    "model.arch=resnet18", "data.crop=16", "optim.images_per_step=3", "optim.lr=0.05", "optim.epochs=3",
    "optim.warmup_epochs=0", "run.log_every=1", "run.checkpoint_every=2", "run.tensorboard=false", "engine.kind=plain",
]  # fmt: skip


@pytest.fixture
def begin(images, tmp_path, fastrot, monkeypatch):
    monkeypatch.setattr(store, "PAUSES_S", (0.01,))

    def call(name, *words):
        return fastrot("train", *WORDS, f"data.train={images}", f"run.out={tmp_path / name}", *words)

    return call


@pytest.fixture
def failing(monkeypatch):
    """A function that lets fsspec's writing of a file fail, or write something else; how many writes were tried."""

    def let(happens):
        local, tries = fsspec.filesystem("file"), []
        write = type(local).pipe_file

        def pipe_file(self, path, value, **words):
            tries.append(path)
            write(self, path, happens(path, value), **words)

        monkeypatch.setattr(type(local), "pipe_file", pipe_file)
        return tries

    return let


def weights(run, step):
    return load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")


def test_a_run_goes_on_from_its_mirror_on_a_machine_that_has_nothing(begin, tmp_path):
    far = tmp_path / "far" / "run"
    assert begin("a", f"run.mirror={far}", "run.max_steps=5").code == 0
    assert checkpoint.verify(far / "checkpoints" / "step-00000005") == ""
    for name in ("STATUS.json", "metrics.jsonl", "config.yaml", "backbone.safetensors", "checkpoints/latest"):
        assert (far / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    shutil.rmtree(tmp_path / "a")
    done = begin("b", f"run.mirror={far}", "run.max_steps=7")
    assert done.code == 0 and f"run.mirror: step-00000005 brought from {far}" in done.err
    assert begin("c", "run.max_steps=7").code == 0
    assert [line["loss"] for line in metrics(tmp_path / "b")] == [line["loss"] for line in metrics(tmp_path / "c")]
    here, there = weights(tmp_path / "b", 7), weights(tmp_path / "c", 7)
    assert all(here[name].equal(there[name]) for name in there) and here.keys() == there.keys()
    kept = sorted(path.name for path in (far / "checkpoints").glob("step-*") if any(path.iterdir()))
    assert kept[-1] == "step-00000007" and set(kept) <= {p.name for p in (tmp_path / "b/checkpoints").glob("step-*")}
    refused = begin("d", f"run.mirror={far}", "--resume", "never")
    assert refused.code == 2 and "holds a run at step-00000007; choose another, or --resume auto" in refused.errors[0]


def test_a_damaged_checkpoint_of_a_mirror_is_passed_over_and_the_runs_own_newer_one_stays(begin, tmp_path):
    far = tmp_path / "far"
    assert begin("a", "run.max_steps=5").code == 0
    shutil.copytree(tmp_path / "a", far)
    (far / "checkpoints/step-00000005/model.safetensors").write_bytes(b"nothing")
    done = begin("b", f"run.mirror={far}", "run.max_steps=4")
    assert done.code == 0 and "step-00000005 is damaged (model.safetensors has 7 bytes" in done.err
    assert "resumed from step-00000004" in done.err
    done = begin("a", f"run.mirror={far}", "run.max_steps=6")
    assert "resumed from step-00000005" in done.err and "brought" not in done.err


def test_a_mirror_that_fails_is_said_once_and_tried_again(begin, tmp_path, failing):
    def full(path, value):
        if len(tries) < 3:
            raise OSError("no route")
        return value

    tries = failing(full)
    done = begin("a", f"run.mirror={tmp_path / 'far'}", "run.max_steps=4", "run.checkpoint_every=1")
    assert done.code == 0 and done.err.count("run.mirror: ") == 1, done.err
    assert "was not copied" in done.err and "failed 2 times (no route)" in done.err
    assert checkpoint.verify(tmp_path / "far/checkpoints/step-00000004") == ""


def test_what_is_there_is_looked_at_once_it_is_written(tmp_path, failing):
    failing(lambda path, value: value[:-1] + b"x")
    with pytest.raises(Fault, match=r"far/name: is not what was written"):
        mirror.put(open_store(str(tmp_path / "far")), b"content", "name")


def test_mirrors_that_cannot_be_are_one_line(begin):
    for address, says in {
        "gopherr://x/y": "gopherr://x/y: Protocol not known: gopherr; expected s3://",
        "https://x/y": "run.mirror cannot be written by http; name s3://, gs:// or a folder of a shared disk",
    }.items():
        done = begin("a", f"run.mirror={address}")
        assert done.code == 2 and len(done.errors) == 1 and says in done.errors[0]


def test_a_run_goes_on_over_a_source_that_was_staged_anew(begin, images, tmp_path):
    content = {str(path.relative_to(images)): path.read_bytes() for path in images.rglob("*.jpg")}
    with serving(content) as server:
        words = [f"data.train={server.url}", f"data.stage={tmp_path / 'disk'}"]
        assert begin("a", *words, "run.max_steps=2").code == 0
        shutil.rmtree(tmp_path / "disk")
        done = begin("a", *words, "run.max_steps=4")
    assert done.code == 0 and "resumed from step-00000002" in done.err
    assert begin("b", "run.max_steps=4").code == 0
    assert [line["loss"] for line in metrics(tmp_path / "a")] == [line["loss"] for line in metrics(tmp_path / "b")]
