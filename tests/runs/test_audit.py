"""fastrot verify: every planted damage is found by name, a sound run is sound, and one that is written is left alone."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from conftest import write_folder
from fastrot.cli import main
from fastrot.config import load
from fastrot.data.build import plan_of
from fastrot.data.manifest import Manifest
from fastrot.runs import audit, checkpoint, epochs

pytestmark = pytest.mark.usefixtures("narrow")
WORDS = [
    "model.arch=resnet18", "data.crop=16", "optim.images_per_step=5", "optim.lr=0.05", "optim.epochs=3", "engine.kind=plain",
    "optim.warmup_epochs=0", "run.log_every=1", "run.checkpoint_every=2", "run.loggers=[]", "data.decode=torch",
]  # fmt: skip
ROWS, STEPS = 12, 8  # 3 epochs of 12 images, 5 a step: no step ends where an epoch does


@pytest.fixture(scope="module")
def trained(images, made_once, narrow, traced_once):
    """A finished run that no test changes."""

    def run(folder):
        words = [*WORDS, f"data.train={images}", f"data.val={images}", f"run.out={folder / 'run'}"]
        assert main(["train", *words]) == 0

    return made_once("audited", run) / "run"


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def states(done):
    return {(one["what"], one["state"]) for one in json.loads(done.out)["findings"]}


def flip(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_a_finished_run_is_sound_and_its_newest_checkpoint_is_what_a_resume_takes(trained, fastrot):
    done = fastrot("verify", trained, "--json")
    assert done.json["sound"] and done.json["resume"] == f"step-{STEPS:08d}" and done.json["state"] == "done"
    assert {state for _, state in states(done)} == {"sound"}
    said = fastrot("verify", trained)
    assert said.code == 0 and f"a resume would take step-{STEPS:08d}" in said.out and said.errors == []
    assert "3 epochs computed again" in said.out


def test_a_recorded_epoch_is_what_fastrot_stream_delivers(trained, images, fastrot):
    """One step of all the epoch's images: the loader's own way, with its shares over three ranks."""
    recorded = epochs.read(trained)
    assert [one.epoch for one in recorded] == [0, 1, 2] and len({one.sha256 for one in recorded}) == 3
    for one in recorded:
        words = [*WORDS, f"optim.images_per_step={ROWS}", f"data.train={images}", "--ranks", 3]
        delivered = fastrot("stream", *words, "--first-step", one.epoch, "--steps", 1, "--json")
        assert delivered.json["sha256"] == one.sha256


def test_a_run_that_was_cut_records_the_epochs_that_the_whole_one_does(trained, images, tmp_path, fastrot):
    words = [*WORDS, f"data.train={images}", f"data.val={images}", f"run.out={tmp_path / 'cut'}"]
    assert fastrot("train", *words, "run.max_steps=4").code == 0
    assert [one.epoch for one in epochs.read(tmp_path / "cut")] == [0]
    assert fastrot("train", *words, "optim.images_per_step=6", "--resume-anyway", "optim.images_per_step").code == 0
    assert epochs.read(tmp_path / "cut") == epochs.read(trained)
    assert fastrot("verify", tmp_path / "cut").code == 0


def test_epochs_of_other_settings_are_noted_and_kept(trained, run):
    """data.flip may differ after --resume-anyway: what was recorded before cannot be computed from config.yaml."""
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("flip: 0.5", "flip: 0.25"))
    found = audit.audit(run)
    notes = [one["says"] for one in found["findings"] if one["state"] == "noted"]
    assert found["sound"] and "3 epochs were of other settings than config.yaml's" in notes
    assert "data.flip: not as step-00000008 was trained" in notes


def test_the_recorder_goes_on_where_it_stopped_and_a_full_disk_ends_nothing(trained, tmp_path, monkeypatch):
    manifest = Manifest.load(trained / "manifest" / "train")
    plan, said = plan_of(load(str(trained / "config.yaml"), [])[0], manifest), []

    def recorder(position, folder=tmp_path):
        return epochs.Recorder(folder, plan, manifest.label, position, said.append)

    (tmp_path / "old").mkdir()
    late = recorder(ROWS + 3, tmp_path / "old")  # of a version that kept no record, in the middle of an epoch
    late.passed(2 * ROWS)
    late.finish(whole=True)
    assert epochs.read(tmp_path / "old") == epochs.read(trained)[1:2]

    first = recorder(0)
    first.passed(2 * ROWS + 3)
    first.finish(whole=False)  # as a stop does: what is not written is left to the next start
    again = recorder(2 * ROWS + 3)
    again.passed(3 * ROWS)
    again.finish(whole=True)
    assert [one.sha256 for one in epochs.read(tmp_path)] == [one.sha256 for one in epochs.read(trained)][
        3 - len(epochs.read(tmp_path)) :
    ]
    assert epochs.read(tmp_path)[-1].epoch == 2 and said == []

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(epochs, "write_text", full)
    last = recorder(3 * ROWS)
    last.passed(4 * ROWS)
    last.finish(whole=True)
    assert said == [f"{tmp_path / 'stream.json'}: cannot be written (No space left on device); training goes on"]


def test_a_flipped_bit_in_any_file_of_the_run_is_found_by_name(run, fastrot):
    """But for text that may make sense still: what it says is compared below."""
    files = [path for path in run.rglob("*") if path.is_file() and path.stat().st_size and path.name != ".lock"]
    free = {"environment.json", "config.yaml", "STATUS.json", "metrics.jsonl", "latest", "best", "meta.json"}
    alike = ("step-00000006", "val")  # as one that is tested
    tested = [path for path in files if path.name not in free and path.parent.name not in alike]
    assert len(tested) > 20
    for path in tested:
        kept = path.read_bytes()
        flip(path, len(kept) // 2)
        done = fastrot("verify", run, "--json")
        where = str(path.relative_to(run)).replace("/" + path.name, "") if path.parent != run else path.name
        assert done.code == 1 and (where, "damaged") in states(done), path
        assert len(done.errors) == 1 and where in done.errors[0]
        path.write_bytes(kept)
    assert fastrot("verify", run).code == 0


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("STATUS.json", "{", "not JSON"),
        ("STATUS.json", '{"state": "done", "steps": 7}', "says done at step 7; the newest sound checkpoint is of 8"),
        ("metrics.jsonl", '{"step": 0}\n{"st\n{"step": 7}\n', "line 2 of it"),
        ("metrics.jsonl", '{"step": 7}\n{"step": 3}\n', "step 3 comes after a later one"),
        ("metrics.jsonl", '{"step": 5}\n', "ends at step 5"),
        ("config.yaml", "data: [", "not YAML"),
        ("environment.json", "{", "Expecting property name"),
        ("checkpoints/latest", "step-00000099\n", "names 'step-00000099', not there"),
        ("checkpoints/best", "{}", "cannot be read"),
        ("manifest/train/meta.json", "{}", "not a manifest that can be read"),
    ],
)
def test_files_of_text_that_do_not_say_what_they_should(run, fastrot, name, text, says):
    (run / name).write_text(text)
    done = fastrot("verify", run, "--json")
    assert done.code == 1 and name.removesuffix("/meta.json") in done.errors[0]
    assert any(says in one["says"] for one in json.loads(done.out)["findings"] if one["state"] == "damaged"), done.out


def test_with_its_newest_checkpoint_damaged_a_resume_takes_the_one_before(run, fastrot):
    flip(run / "checkpoints/step-00000008/model.safetensors")
    done = fastrot("verify", run)
    assert done.code == 1
    (line,) = done.errors
    assert line.startswith(f"fastrot: {run}: damaged: checkpoints/step-00000008, STATUS.json")
    assert line.endswith("a resume would take step-00000006")


def test_a_manifest_changed_together_with_its_hashes_gives_another_stream(run, fastrot):
    """As a bug would, or a hand: the epochs were recorded from the other one."""
    home = run / "manifest" / "train"
    heights = np.load(home / "height.npy")
    heights[3] += 1
    np.save(home / "height.npy", heights)
    meta, raw = json.loads((home / "meta.json").read_text()), (home / "height.npy").read_bytes()
    meta["files"]["height.npy"] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    (home / "meta.json").write_text(json.dumps(meta))
    done = fastrot("verify", run, "--json")
    assert done.code == 1
    assert {what for what, state in states(done) if state == "damaged"} == {"stream.json"}
    assert "epoch 0 was" in done.out and "epoch 2 was" in done.out


def test_images_that_changed_are_noted_and_no_damage_of_the_run(tmp_path, fastrot):
    images, out = write_folder(tmp_path / "images", classes=1, per_class=6), tmp_path / "run"
    assert fastrot("train", *WORDS, f"data.train={images}", f"run.out={out}", "run.max_steps=1").code == 0
    (images / "class0" / "2.jpg").unlink()
    done = fastrot("verify", out, "--json")
    assert done.code == 0 and ("manifest/train", "noted") in states(done)
    assert "1 of 6 image files are not as the run saw them, the first" in done.out
    assert ("stream.json", "noted") in states(done), "no epoch was over"


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


def test_a_run_that_is_written_now_is_not_disturbed(run, fastrot):
    """Its lock stays its own, its half line is no damage, no file is touched."""
    status = {"state": "running", "pid": os.getpid(), "host": socket.gethostname(), "step": 8, "of": 20}
    (run / "STATUS.json").write_text(json.dumps(status))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    (run / "checkpoints" / ".tmp-1-step-00000010").mkdir()
    with (run / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = snapshot(run)
        done = fastrot("verify", run, "--json")
        assert done.json["state"] == "running" and {state for _, state in states(done)} == {"sound"}
        assert snapshot(run) == before
    killed = fastrot("verify", run, "--json")  # nobody has the lock's file open any more
    assert killed.json["state"] == "killed" and killed.code == 0
    assert {what for what, state in states(killed) if state == "noted"} == {"STATUS.json", "metrics.jsonl"}
    (run / "STATUS.json").write_text(json.dumps(status | {"host": "elsewhere"}))
    assert fastrot("verify", run, "--json").json["state"] == "running"


def test_a_checkpoint_that_the_run_thins_out_meanwhile_is_no_damage(run, fastrot, monkeypatch):
    """It goes file by file: one is gone as the hashes are taken, the folder a moment later."""
    oldest, verify = checkpoint.folders(run / "checkpoints")[0], checkpoint.verify
    (run / "STATUS.json").write_text('{"state": "running", "host": "elsewhere"}')
    (run / "checkpoints" / "best").unlink()

    def thinned(folder):
        if folder == oldest:
            (folder / "optimizer.safetensors").unlink()
        return verify(folder)

    monkeypatch.setattr(checkpoint, "verify", thinned)
    monkeypatch.setattr(audit.time, "sleep", lambda _: shutil.rmtree(oldest))
    done = fastrot("verify", run, "--json")
    assert done.code == 0 and f"checkpoints/{oldest.name}" not in done.out
    assert not oldest.exists()


def test_a_checkpoint_or_a_feature_store_can_be_verified_alone(run, images, tmp_path, fastrot):
    assert fastrot("verify", run / "checkpoints" / "step-00000008").code == 0
    store = run / "features"
    words = [
        "--checkpoint",
        run,
        "--data",
        images,
        "--taps",
        "avg",
        "--out",
        store,
        "data.crop=16",
        "data.decode=torch",
    ]
    assert fastrot("features", *words).code == 0
    assert fastrot("verify", store).code == 0 and ("features", "sound") in states(fastrot("verify", run, "--json"))
    flip(store / "avg.npy")
    for folder in (store, run):
        done = fastrot("verify", folder)
        assert done.code == 1 and "features" in done.errors[0]


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda folder: None, "no such folder; name a run's, as in run.out"),
        (lambda folder: folder.mkdir(), "is empty; expected a run's config.yaml and checkpoints/"),
        (lambda folder: write_folder(folder, 1, 1), "holds no run; expected a run's config.yaml and checkpoints/"),
        (lambda folder: folder.write_text("x"), "no such folder; name a run's"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, fastrot, make, says):
    make(tmp_path / "x")
    done = fastrot("verify", tmp_path / "x")
    assert done.code == 2 and len(done.errors) == 1 and f"{tmp_path / 'x'}: {says}" in done.errors[0]


def test_the_digest_of_a_large_epoch_is_that_of_its_stretches(monkeypatch):
    """Against StreamHash over the same positions, cut by hand."""
    from fastrot.data.order import WindowOrder
    from fastrot.data.plan import Plan, StreamHash

    sizes, labels = np.arange(40, 50, dtype=np.int32), np.arange(10)
    plan, sha = Plan(3, sizes, sizes, WindowOrder(10, 3, 2, 2)), StreamHash()
    monkeypatch.setattr(epochs, "_STEP", 4)
    for first, last in ((20, 24), (24, 28), (28, 30)):
        sample = plan.at(first, last)
        sha.add(sample, labels[sample.rows])
    assert epochs.digest(plan, labels, 2) == sha.hexdigest()
    assert epochs.digest(plan, labels, 2, lambda: True) is None
    assert epochs.settings(plan)["order"] == [
        "WindowOrder", {"n": 10, "seed": 3, "chunk_rows": 2, "chunks": 2},
    ]  # fmt: skip
