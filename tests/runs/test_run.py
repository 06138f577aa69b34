"""The whole job as a user runs it: launchers, resume, the stream's proof, every error's one line."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from conftest import launch, launched, metrics, write_folder
from fastrot import cli
from fastrot import config as configs
from fastrot.cli import main
from fastrot.data.build import plan_of
from fastrot.data.manifest import Manifest
from fastrot.errors import UserError
from fastrot.runs.arithmetic import arithmetic
from fastrot.tasks.rotation import RotationTask
from workers.launched import Start
from workers.launched import run as under_launcher
from workers.ranks import as_ranks, forked

pytestmark = pytest.mark.usefixtures("narrow")
NARROW = "tests/workers/narrow_train.py"  # fastrot/train.py, whose own way to start is tested where ranks are too many
SMALL = [
    "model.arch=resnet18", "data.crop=16", "optim.images_per_step=6", "optim.lr=0.05", "optim.epochs=3",
    "optim.warmup_epochs=0", "run.log_every=1", "run.checkpoint_every=2", "run.tensorboard=false",
]  # fmt: skip
PLAIN = [*SMALL, "engine.kind=plain"]
TIMES = {
    "images_per_s", "views_per_s", "step_s", "wait_share", "copy_share", "rotate_share", "compute_share", "update_share",
    "communicate_share", "host_share", "bound", "memory_gib", "eta_s", "mfu", "roof_fraction",
}  # fmt: skip
SLOW = {"slow_step", "straggler"}  # in a line where there is one


FROZEN = r"""
#include <stdio.h>
#include <string.h>
#include <unistd.h>
/* reads of images do not end; others do */
static void freeze(int handle) {
    char link[64], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    if (readlink(link, path, sizeof path - 1) > 0 && strstr(path, ".jpg")) for (;;) pause();
}
ssize_t pread64(int handle, void *into, size_t bytes, off_t from) {
    freeze(handle);
    if (lseek(handle, from, SEEK_SET) < 0) return -1;
    return read(handle, into, bytes);
}
ssize_t pread(int handle, void *into, size_t bytes, off_t from) { return pread64(handle, into, bytes, from); }
"""


def over(images, out) -> list[str]:
    return [f"data.train={images}", f"data.val={images}", f"run.out={out}"]


def learnt(out) -> list[dict]:
    """What was logged, but for speeds: equal bit for bit when the training is."""
    return [{key: value for key, value in line.items() if key not in {*TIMES, *SLOW}} for line in metrics(out)]


@pytest.fixture(scope="module")
def whole(images, made_once):
    """One plain run over 12 images: 6 steps, 3 epochs; (folder, output)."""

    def run(folder):
        words = [*PLAIN, *over(images, folder / "run"), "--json", "run.tensorboard=true"]
        (folder / "output").write_text(as_ranks(1, main, ["train", *words]))

    folder = made_once("whole", run)
    return folder / "run", (folder / "output").read_text()


@pytest.fixture(scope="module")
def two(images, made_once):
    """The same on two ranks under the deepspeed launcher, all forked from one process that has imported what they do."""

    def run(folder):
        words = [*SMALL, *over(images, folder / "run")]
        process = forked(under_launcher, Start(0, "deepspeed", 2, words, f"{folder}/output", f"{folder}/notes"))
        process.join(200)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.exitcode == 0, (folder / "output").read_text()

    return made_once("two", run) / "run"


def test_a_run_leaves_what_it_promises(whole):
    out, output = whole
    promised = {"config.yaml", "environment.json", "manifest", "metrics.jsonl", "STATUS.json", "tensorboard",
                "checkpoints", "backbone.safetensors"}  # fmt: skip
    assert {path.name for path in out.iterdir()} >= promised
    result = json.loads(output.splitlines()[-1])
    assert result["steps"] == 6 and 0 <= result["held_out_accuracy"] <= 1
    lines = metrics(out)
    assert [line["step"] for line in lines if "loss" in line] == list(range(6))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [1, 3, 5]
    assert {"epoch", "loss", "accuracy", "accuracy_0", "accuracy_90", "lr", "grad_norm"} | TIMES <= lines[0].keys()
    status = json.loads((out / "STATUS.json").read_text())
    assert status["state"] == "done" and status["steps"] == 6
    environment = json.loads((out / "environment.json").read_text())
    assert environment["versions"]["torch"] and len(environment["data"]["content"]) == 64
    assert "layer4.1.conv2.weight" in load_file(out / "backbone.safetensors")
    assert "fc.weight" not in load_file(out / "backbone.safetensors")
    best = json.loads((out / "checkpoints/best").read_text())
    assert best["accuracy"] == max(line["held_out_accuracy"] for line in lines if "held_out_accuracy" in line)
    assert (out / "checkpoints" / best["name"] / "model.safetensors").exists()
    assert "held-out rotation accuracy" in output
    assert "\r" not in output, "no bar where there is no terminal"


def test_stopped_and_resumed_is_the_run_that_was_not(whole, images, tmp_path, fastrot):
    """Stopped after step 3 (last checkpoint: 2), half a line and half a checkpoint left behind."""
    out, _ = whole
    run = tmp_path / "r"
    assert fastrot("train", *PLAIN, *over(images, run), "run.max_steps=3").code == 0
    shutil.rmtree(run / "checkpoints/step-00000003")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    (run / "checkpoints/.tmp-step-00000004").mkdir()
    again = fastrot("train", *PLAIN, *over(images, run))
    assert again.code == 0, again.err
    assert "resumed from step-00000002" in again.err
    assert [x for x in learnt(run) if "loss" in x] == [x for x in learnt(out) if "loss" in x]
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(folder / "checkpoints/step-00000006" / name) for folder in (run, out))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_finished_run_is_not_trained_again(whole, images, fastrot):
    out, _ = whole
    before = (out / "metrics.jsonl").read_text()
    done = fastrot("train", *PLAIN, *over(images, out))
    assert done.code == 0, done.err
    assert (out / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    "more, words",
    [
        (["model.arch=resnet34"], "model.arch was 'resnet18', is 'resnet34'"),
        (["optim.images_per_step=4"], "optim.images_per_step was 6, is 4"),
        (["run.seed=5"], "run.seed was 0, is 5"),
        (["--resume", "never"], "holds a run at step-00000006"),
        (["--resume", "/nowhere"], "--resume /nowhere: no such folder"),
        (["--resume-anyway", "model.arch", "model.arch=resnet34"], "--resume-anyway model.arch: a run cannot go on"),
        (
            ["--resume-anyway", "optim.lrr"],
            "--resume-anyway optim.lrr: no key that a resume compares; did you mean optim.lr?",
        ),
        (["--resume", "{run}/checkpoints/step-00000004"], "holds step-00000006, which is newer"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(whole, images, more, words, fastrot):
    done = fastrot("train", *PLAIN, *over(images, whole[0]), *(word.format(run=whole[0]) for word in more))
    assert done.code == 2
    assert len(done.errors) == 1 and words in done.errors[0]
    assert "Traceback" not in done.err


def test_a_knob_that_a_checkpoint_does_not_know_was_at_its_default(whole, images, tmp_path, fastrot):
    run = tmp_path / "r"
    shutil.copytree(whole[0], run)
    newest = run / "checkpoints/step-00000006"
    state = json.loads((newest / "state.json").read_text())
    del state["defining"]["data.window"]
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    written = (newest / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"sha256": hashlib.sha256(written).hexdigest(), "bytes": len(written)}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert fastrot("train", *PLAIN, *over(images, run)).code == 0
    other = fastrot("train", *PLAIN, *over(images, run), "data.window=random")
    assert other.code == 2 and "data.window was 'random_resized', is 'random'" in other.err


def test_other_data_in_the_same_folder_is_refused(whole, tmp_path, fastrot):
    other = write_folder(tmp_path / "other", classes=2, per_class=7)
    done = fastrot("train", *PLAIN, *over(other, whole[0]))
    assert done.code == 2
    assert re.search(r"data was '\w{64}', is '\w{64}'", done.err)


def test_a_longer_run_may_go_on_by_name(whole, images, tmp_path, fastrot):
    shutil.copytree(whole[0], tmp_path / "r")
    longer = [*PLAIN, *over(images, tmp_path / "r"), "optim.epochs=4"]
    assert fastrot("train", *longer).code == 2
    assert fastrot("train", *longer, "--resume-anyway", "optim.epochs").code == 0
    assert metrics(tmp_path / "r")[-1]["step"] == 7


def test_with_another_batch_the_stream_goes_on_where_the_checkpoint_stopped(
    whole, images, tmp_path, fastrot, monkeypatch
):
    """Position 24 of 36, not step 4 times the new batch: 12 images are left, three steps of 5, the last into epoch 3."""
    out, _ = whole
    rows, seeds, loss = [], [], RotationTask.loss

    def seen(task, module, views, batch):
        rows.append(batch.sample.rows.tolist())
        seeds.append(torch.initial_seed())
        return loss(task, module, views, batch)

    monkeypatch.setattr(RotationTask, "loss", seen)
    words = [*PLAIN, *over(images, tmp_path / "r"), "optim.images_per_step=5"]
    words += ["--resume", out / "checkpoints/step-00000004", "--resume-anyway", "optim.images_per_step"]
    assert fastrot("train", *words, "--json").json["steps"] == 7
    plan = plan_of(configs.load(None, PLAIN)[0], Manifest.load(out / "manifest/train"))
    assert rows == [plan.at(at, at + 5).rows.tolist() for at in (24, 29, 34)]
    # what draws by itself draws by (seed, step, micro-step, rank), so as in a run that was not stopped
    assert seeds == [hash((0, step, 0, 0)) % 2**63 for step in (4, 5, 6)]
    lines = [line for line in metrics(tmp_path / "r") if "loss" in line]
    assert [line["step"] for line in lines] == [4, 5, 6]
    assert [line["epoch"] for line in lines] == pytest.approx([29 / 12, 34 / 12, 39 / 12])
    state = json.loads((tmp_path / "r/checkpoints/step-00000007/state.json").read_text())
    assert (state["step"], state["position"]) == (7, 39)


def test_a_checkpoint_of_a_run_may_start_another_folder(whole, images, tmp_path, fastrot):
    out, _ = whole
    early = out / "checkpoints/step-00000004"
    done = fastrot("train", *PLAIN, *over(images, tmp_path / "r"), "--resume", early)
    assert done.code == 0, done.err
    assert [x for x in learnt(tmp_path / "r") if "loss" in x] == [x for x in learnt(out) if "loss" in x][4:]
    again = fastrot("train", *PLAIN, *over(images, tmp_path / "s"), "--resume", out)
    assert again.code == 0, again.err  # nothing left to train: the backbone is the checkpoint's
    assert (tmp_path / "s/backbone.safetensors").read_bytes() == (out / "backbone.safetensors").read_bytes()


def test_images_added_after_a_failed_start_are_seen(tmp_path, fastrot):
    source = write_folder(tmp_path / "d", classes=1, per_class=6)
    words = [*PLAIN, f"data.train={source}", f"run.out={tmp_path / 'r'}", "run.max_steps=1"]
    assert fastrot("train", *words, "data.val=/no/such").code == 2
    shutil.copy(source / "class0/0.jpg", source / "class0/new.jpg")
    assert fastrot("train", *words).code == 0
    assert json.loads((tmp_path / "r/environment.json").read_text())["data"]["rows"] == 7


@pytest.mark.slow
def test_a_fault_ends_the_process_and_is_the_status(tmp_path, fastrot, monkeypatch):
    """A disk that does not answer any more, met while a pool of readers is stuck in it."""
    source = write_folder(tmp_path / "d", classes=1, per_class=6)
    words = [*PLAIN, f"data.train={source}", f"run.out={tmp_path / 'r'}"]
    assert fastrot("train", *words, "run.max_steps=1").code == 0
    frozen = tmp_path / "frozen.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", frozen], input=FROZEN, text=True, check=True)
    monkeypatch.setenv("LD_PRELOAD", str(frozen))
    code, output = launched("python", 1, *words, "data.timeout=2", script=NARROW)
    assert code == 3, output
    assert "fastrot: no batch for data.timeout 2 s: the loader was reading rows" in output
    status = json.loads((tmp_path / "r/STATUS.json").read_text())
    assert status["state"] == "failed" and "no batch" in status["reason"]


def test_files_that_are_none_any_more_end_the_run(tmp_path, fastrot):
    source = write_folder(tmp_path / "d", classes=1, per_class=6)
    words = [*PLAIN, f"data.train={source}", f"run.out={tmp_path / 'r'}"]
    assert fastrot("train", *words, "run.max_steps=1").code == 0
    for path in source.rglob("*.jpg"):
        path.unlink()
        os.mkfifo(path)  # whose opening waits for a writer
    assert fastrot("train", *words).code == 2  # they are not as the run saw them
    done = fastrot("train", *words, "--resume-anyway", "data.files")
    assert done.code == 3 and "no row can be read any more" in done.err, done.err


@pytest.mark.parametrize(
    "words, expected",
    [
        (["optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
        (["data.train=/no/such"], "/no/such: no such folder"),
        (["data.train={empty}"], "holds no image"),
        (["data.train={file}"], "is a file; expected a folder"),
        ([], "data.train is not set"),
        (["data.train={images}", "run.out={file}"], "is a file, or lies below one"),
        (["data.train={images}", "run.out={file}/below"], "is a file, or lies below one"),
        (["data.train={images}", "--deepspeed_config", "{file}", "engine.kind=deepspeed"], "cannot be read as JSON"),
        (["data.train={images}", "--deepspeed_config", "{file}"], "--deepspeed_config is for engine.kind deepspeed"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: No such file"),
        (["data.train={images}", "data.decode=dali", "data.decode_on=gpu"], "there is no CUDA device here"),
        (["data.train={images}", "engine.precision=bf16"], "data.crop 16 with engine.precision bf16 on a CPU"),
        (["data.train={images}", "engine.cuda_graphs=true"], "needs a CUDA device, and there is none"),
        (["data.train={images}", "optim.images_per_step=1", "rotation.views=one"], "batch norm 1 view at a time"),
    ],
)
def test_a_users_error_is_one_line_and_exit_2(words, expected, images, tmp_path, fastrot):
    if ("CUDA" in expected or "on a CPU" in expected) and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    (tmp_path / "empty/class").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    places = {"empty": tmp_path / "empty", "file": tmp_path / "file", "images": images}
    done = fastrot("train", *PLAIN, f"run.out={tmp_path / 'out'}", *(w.format(**places) for w in words))
    assert done.code == 2, done.err
    assert len(done.errors) == 1 and expected in done.errors[0]
    assert "Traceback" not in done.err


def test_an_unknown_option_or_command_is_exit_2(fastrot):
    assert fastrot("train", "--dryrun").code == 2
    assert fastrot("pretrain").code == 2


def test_the_script_starts_from_its_own_folder(tmp_path):
    code, output = launched("python", 1, *PLAIN, f"run.out={tmp_path}", "optim.lrr=1")
    assert code == 2 and "unknown key optim.lrr" in output and len(output.splitlines()) == 1


@pytest.mark.parametrize("rank, said", [("0", ["fastrot: 1 image"]), ("1", ["waited", "fastrot: rank 1: 1 image"])])
def test_what_all_ranks_find_alike_rank_0_says_first(monkeypatch, capsys, rank, said):
    """By then a launcher has ended the others."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(time, "sleep", lambda seconds: print("waited", file=sys.stderr))
    cli._complain(UserError("1 image"))
    assert capsys.readouterr().err.splitlines() == said


@pytest.mark.slow
def test_too_many_ranks_are_refused_with_one_line(images, tmp_path):
    code, output = launched("torchrun", 2, *PLAIN, *over(images, tmp_path / "r"), "optim.images_per_step=1")
    assert code != 0  # torchrun's own
    lines = [line for line in output.splitlines() if line.startswith("fastrot: ")]
    assert len(lines) == 1, output
    assert "optim.images_per_step 1 leaves some of 2 ranks without an image" in lines[0]
    assert re.search(r"exitcode\s*: 2", output)


def test_more_ranks_than_images_are_refused():
    with pytest.raises(UserError, match="3 images for 4 ranks"):
        arithmetic(configs.load(None, [])[0], 4, 3)
    with pytest.raises(UserError, match="optim.images_per_step 1 leaves some of 2 ranks without an image"):
        arithmetic(configs.load(None, ["optim.images_per_step=1"])[0], 2, 9)


def test_one_class_trains_and_says_so(tmp_path, fastrot):
    one = write_folder(tmp_path / "one", classes=1, per_class=6)
    done = fastrot("train", *PLAIN, f"data.train={one}", f"run.out={tmp_path / 'r'}", "run.max_steps=1")
    assert done.code == 0, done.err
    assert "one class (class0); rotation needs no labels" in done.err


def test_a_second_run_in_the_same_folder_is_refused(images, tmp_path, fastrot):
    (tmp_path / "r").mkdir()
    with (tmp_path / "r/.lock").open("w") as lock:
        lock.write("host there, process 7")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = fastrot("train", *PLAIN, *over(images, tmp_path / "r"))
    assert done.code == 2
    assert "another run works there (host there, process 7)" in done.err


def test_dry_run_tells_what_a_run_would_be_and_writes_nothing(images, tmp_path, fastrot):
    done = fastrot("train", *PLAIN, *over(images, tmp_path / "r"), "--dry-run", "--json")
    assert (done.json["steps"], done.json["views_per_step"], done.json["batch_norm_views"]) == (6, 24, 24)
    network = torchvision.models.resnet18(num_classes=4)
    assert done.json["parameters"] == sum(p.numel() for p in network.parameters()) and done.json["expected_hours"] > 0
    assert done.json["step_flops"] > 0 and done.json["roof_fraction"] >= done.json["mfu"] > 0
    for words in (
        "over 24 views (recipe 512)",
        "TFLOP and ",
        "views/s; these steps reached",
        "optim.lr ",
        "(command line)",
        "(default)",
    ):
        assert words in done.err
    assert not (tmp_path / "r").exists()


def test_a_line_holds_mfu_and_the_share_of_the_measured_roof(images, tmp_path, fastrot):
    """By hand from the FLOPs of a step, which grow with the crop's area; the run's own are over all its steps."""
    out = tmp_path / "r"
    words = [*PLAIN, *over(images, out), "data.crop_by_epoch={0: 32, 2: 16}"]
    result = fastrot("train", *words, "--json").json
    rate = json.loads((out / "environment.json").read_text())["device_per_s"]["flops"]
    lines = [line for line in metrics(out) if "loss" in line]
    flops = [line["mfu"] * line["step_s"] * rate for line in lines]
    assert len(lines) == 6 and all(0 < line["mfu"] < line["roof_fraction"] for line in lines)
    step = fastrot("train", *words, "--dry-run", "--json").json["step_flops"]
    assert flops[:4] == pytest.approx([step] * 4, rel=1e-6)
    assert flops[4:] == pytest.approx([flops[4]] * 2, rel=1e-6) and flops[4] < 0.5 * step
    assert result["mfu"] * result["step_s"] * 6 * rate == pytest.approx(sum(flops), rel=1e-6)


def test_two_ranks_under_deepspeed_learn_what_one_does(whole, two):
    one = learnt(whole[0])
    assert [line["step"] for line in learnt(two)] == [line["step"] for line in one]
    assert learnt(two)[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)
    assert learnt(two)[0]["lr"] == one[0]["lr"]


def test_another_number_of_ranks_and_zero_1_take_the_run_up_where_it_was(whole, images, tmp_path):
    """One plain rank's checkpoint goes on over two ranks under ZeRO 1: same stream, momentum included."""
    out, _ = whole
    words = [*SMALL, *over(images, tmp_path / "r"), "engine.zero=1", "--resume", f"{out}/checkpoints/step-00000004"]
    as_ranks(2, main, ["train", *words])
    ours = [x for x in learnt(tmp_path / "r") if "loss" in x]
    theirs = [x for x in learnt(out) if "loss" in x][4:]
    assert [x["step"] for x in ours] == [4, 5]
    for a, b in zip(ours, theirs, strict=True):
        assert (a["lr"], a["epoch"]) == (b["lr"], b["epoch"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def test_a_run_goes_on_with_fused_norms_and_a_padded_stem(whole, images, tmp_path, fastrot):
    """A checkpoint does not know how the step is computed. At a rate that does not magnify what is rounded otherwise."""
    out, _ = whole
    runs = {"plain": [], "fused": ["engine.norm=fused", "engine.stem_channels=4"]}
    for name, switches in runs.items():
        begin = ["--resume", out / "checkpoints/step-00000004", "--resume-anyway", "optim.lr", "optim.lr=1e-4"]
        assert fastrot("train", *PLAIN, *over(images, tmp_path / name), *begin, *switches).code == 0
    ours, theirs = (learnt(tmp_path / name) for name in ("fused", "plain"))
    assert [x["step"] for x in ours] == [x["step"] for x in theirs] and len(ours) > 1
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if "loss" in k} == pytest.approx(
            {k: v for k, v in b.items() if "loss" in k}, rel=1e-3
        )


@pytest.mark.parametrize("launcher", [None, pytest.param("torchrun", marks=pytest.mark.slow)])
def test_killed_in_mid_epoch_and_resumed_is_equal_in_every_logged_value(images, two, tmp_path, launcher):
    """kill -9 of launcher and ranks at once; the peer ran whole under deepspeed."""
    words = [*SMALL, *over(images, tmp_path / "killed"), "run.checkpoint_every=1"]
    has_begun = (tmp_path / "killed/checkpoints/latest").exists
    if launcher is None:
        as_ranks(2, main, ["train", *words], killed_when=has_begun)
    else:
        process = launch(launcher, 2, *words, script=NARROW)
        wait_for(has_begun, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        wait_for(lambda: not holders(tmp_path / "killed"), None)
    assert "resumed from step-" in as_ranks(2, main, ["train", *words])
    assert learnt(tmp_path / "killed") == learnt(two)


def test_a_killed_launcher_leaves_no_orphans(images, tmp_path):
    out = tmp_path / "orphans"
    process = launch("torchrun", 1, *PLAIN, *over(images, out), "optim.epochs=4000", script=NARROW)
    wait_for(lambda: (out / "checkpoints/latest").exists(), process)
    assert len(holders(out)) >= 2
    process.kill()  # the launcher alone
    wait_for(lambda: not holders(out), None, 30)
    process.communicate()


def wait_for(happened, process, limit=120):
    """Look until it has happened; fail when the process ends first, or after `limit` seconds."""
    end = time.monotonic() + limit
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def holders(out) -> list[int]:
    """Processes whose command names this run: what a killed launcher must not leave behind."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if os.fsencode(out) in file.read():
                    found.append(int(pid))
        except OSError:
            continue
    return found
