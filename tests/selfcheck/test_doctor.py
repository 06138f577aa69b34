"""fastrot doctor: each planted lack is a row of its own, with what mends it; the worst come first."""

import json
import os
import resource
from importlib.metadata import version

import numpy as np
import pytest
import torch

from conftest import write_folder
from fastrot import machine
from fastrot.config import load
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.selfcheck import disks, doctor, limits, software
from fastrot.selfcheck.doctor import BROKEN, FINE, LOW, MISSING, SLOW, STATES, Check
from web_server import serving

MIB = 2**20


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(disks, "_PROBE", MIB)


def config(*words):
    return load(None, list(words))[0]


def alone(local=1, device="cpu"):
    return Ranks(0, local, 0, local, torch.device(device))


def rows(look, *words, local=1, device="cpu"):
    return {one.what: one for one in look(config(*words), alone(local, device))}


def test_a_machine_is_looked_at_the_worst_first_and_nothing_is_left(images, tmp_path, fastrot):
    words = ["engine.kind=plain", f"data.train={images}", f"run.out={tmp_path / 'not' / 'yet'}"]
    done = fastrot("doctor", *words, "--json")
    found = done.json
    states = [STATES.index(one["state"]) for one in found["checks"]]
    assert states == sorted(states) and found["sound"] and found["versions"]["torch"] == version("torch")
    what = {one["what"] for one in found["checks"]}
    assert what >= {"packages", "GPUs", "decoder torch", "decoder turbo", "libjpeg", "cc", "open files", "threads", "cores",
                    "memory", "shared memory", "run.out", "cache", "data.train"}  # fmt: skip
    assert not list(tmp_path.iterdir()) and not list(machine.cache_folder().glob("tmp*"))
    assert all(one["cure"] for one in found["checks"] if one["state"] != FINE)


def test_what_the_config_asks_for_and_is_not_there_is_broken(images, fastrot, monkeypatch):
    def refuse(name, *_):
        raise UserError(
            f"data.decode {name}: cannot be built (no compiler); apt-get install gcc; use data.decode=torch"
        )

    monkeypatch.setattr(software, "make_decoder", refuse)
    states = {name: one.state for name, one in rows(software.decoders).items()}
    assert states == {"decoder dali": MISSING, "decoder nvimgcodec": MISSING, "decoder torch": MISSING, "decoder turbo": SLOW,
                      "decoder turbo_fast": MISSING, "decoder ffcv": MISSING, "libjpeg": FINE}  # fmt: skip
    asked = rows(software.decoders, "data.decode=ffcv")["decoder ffcv"]
    assert asked == Check("decoder ffcv", BROKEN, "cannot be built (no compiler)", "apt-get install gcc")
    done = fastrot("doctor", "data.decode=ffcv", "engine.kind=plain", "--json")
    assert done.code == 1 and done.errors == ["fastrot: broken: decoder ffcv"]
    assert json.loads(done.out)["checks"][0]["what"] == "decoder ffcv"


def test_packages_are_missing_or_asked_for(monkeypatch):
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: None)
    found = rows(software.packages, "run.loggers=[tensorboard,wandb]")
    assert found["wandb"].state == BROKEN and found["wandb"].cure == "pip install 'fastrot[wandb]'"
    assert found["deepspeed"].state == BROKEN and found["mlflow"].state == found["tensorboard"].state == MISSING
    assert rows(software.packages, "engine.kind=plain")["deepspeed"].state == MISSING
    assert "torch 2." in found["packages"].says
    monkeypatch.setenv("DS_ACCELERATOR", "")
    assert rows(software.packages)["DS_ACCELERATOR"].cure == "unset DS_ACCELERATOR"


CARDS = "0, NVIDIA H200, 580.65, 143771, 120000, 0\n1, NVIDIA H200, 580.65, 143771, 4, 2\n"


def test_cards_that_torch_does_not_see_are_broken(monkeypatch):
    monkeypatch.setattr(software, "said", lambda *_: CARDS)
    found = rows(software.gpus)["GPUs"]
    assert (
        found.state == BROKEN and "nvidia-smi shows 2 (NVIDIA H200, driver 580.65), and torch finds none" in found.says
    )
    monkeypatch.setattr(software, "said", lambda *_: None)
    assert rows(software.gpus)["GPUs"].state == FINE


def test_cards_that_others_use_or_that_fail(monkeypatch):
    monkeypatch.setattr(software, "said", lambda *_: CARDS)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)  # the first call asks the cards
    found = rows(software.gpus, device="cuda")
    assert found["GPUs"].state == FINE and "NVIDIA H200; driver 580.65" in found["GPUs"].says
    assert "NCCL 2.28.9, cuDNN 91900" in found["GPUs"].says
    assert found["GPU 0"].state == LOW and "120000 of 143771 MiB are taken" in found["GPU 0"].says
    assert found["GPU 1"].state == BROKEN and "2 memory errors" in found["GPU 1"].says


def test_a_compiler_that_is_not_there_is_slow_or_missing(monkeypatch):
    monkeypatch.setattr(software.shutil, "which", lambda name: None)
    found = rows(software.compilers, "engine.kind=plain")
    assert (found["g++"].state, found["ninja"].cure) == (MISSING, "pip install ninja")
    assert rows(software.compilers)["g++"].state == SLOW


def test_what_warmup_makes_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(software, "version", lambda name: "1.2.3")
    assert rows(software.compiled)["compiled"].cure == "fastrot warmup"
    (tmp_path / "deepspeed-1.2.3" / "shm").mkdir(parents=True)
    (tmp_path / "deepspeed-1.2.3" / "shm" / "shm.so").touch()
    assert rows(software.compiled)["compiled"].state == FINE
    assert rows(software.compiled, "engine.kind=plain") == {}


def test_few_open_files_are_low():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        found = rows(limits.open_files)["open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.state == LOW and found.says.startswith("1,024 a process") and found.cure.startswith("ulimit -n ")


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_a_containers_limits_are_those_of_the_tightest_of_its_groups(tmp_path):
    group(tmp_path / "a" / "b", cpu__max="max 100000", pids__max="max")
    assert machine.cores_by_quota("0::/a/b\n", tmp_path) is None
    assert machine.threads_by_groups("0::/a/b\n", tmp_path) is None
    group(tmp_path / "a", cpu__max="150000 100000", pids__max="512")
    group(tmp_path, cpu__max="400000 100000")
    assert machine.cores_by_quota("0::/a/b\n", tmp_path) == 1.5
    assert machine.threads_by_groups("0::/a/b\n", tmp_path) == 512
    group(tmp_path / "cpu" / "c", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    group(tmp_path / "cpu", cpu__cfs_quota_us="250000", cpu__cfs_period_us="100000")
    assert machine.cores_by_quota("3:cpu,cpuacct:/c\n1:name=systemd:/\n", tmp_path) == 2.5


def test_more_threads_than_cores_are_slow(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine, "cores_by_quota", lambda: 2.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    found = rows(limits.cores, "data.threads=16", local=4)
    assert {one.state for what, one in found.items() if what != "cores"} == {SLOW}
    assert found["cores' time"].cure == "taskset -c 0-1, or data.threads=1"
    assert found["data.threads"].cure == "data.threads=2, or fastrot tune"
    assert found["OMP_NUM_THREADS"].cure == "export OMP_NUM_THREADS=2"
    monkeypatch.setattr(machine, "cores_by_quota", lambda: 64.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert set(rows(limits.cores, local=4)) == {"cores"}


def test_little_memory_shared_memory_and_few_threads_are_low(monkeypatch):
    class Shm:
        f_bavail, f_frsize = 16384, 4096

    monkeypatch.setattr(machine, "memory_left", lambda: 6 * 2**30)
    monkeypatch.setattr(machine, "threads_by_groups", lambda: 512)
    monkeypatch.setattr(os, "statvfs", lambda path: Shm)
    assert rows(limits.memory, local=1)["memory"].state == FINE
    assert rows(limits.memory, local=2)["memory"].state == LOW
    assert "--ipc=host" in rows(limits.shared_memory)["shared memory"].cure
    assert rows(limits.threads)["threads"].state == LOW


def test_a_disk_is_timed_and_found_wanting(tmp_path, monkeypatch):
    out = f"run.out={tmp_path / 'run'}"
    monkeypatch.setattr(disks, "_WRITES", 0)  # whatever else this disk does now
    monkeypatch.setattr(disks, "_ROOM", 0)
    assert rows(disks.run_folder, out)["run.out"].state == FINE
    monkeypatch.setattr(disks, "_WRITES", float("inf"))
    assert rows(disks.run_folder, out)["run.out"].state == SLOW
    monkeypatch.setattr(disks, "_ROOM", float("inf"))
    assert LOW in [one.state for one in disks.run_folder(config(out), alone())]
    monkeypatch.setattr(disks, "_PROBE", 2**60)
    assert [one.state for one in disks.run_folder(config(out), alone())] == [BROKEN], "no room to try"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_or_locked_is_broken(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    found = rows(disks.run_folder, f"run.out={tmp_path / 'file' / 'run'}")["run.out"]
    assert found.state == BROKEN and f"{tmp_path / 'file'} cannot be written" in found.says

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(disks.fcntl, "flock", no_locks)
    assert "knows no file locks" in next(iter(disks.run_folder(config(f"run.out={tmp_path}"), alone()))).says


def test_of_every_source_some_images_are_read(images, tmp_path):
    files = sorted(os.fsencode(path) for path in images.rglob("*.jpg"))
    assert sorted(path for path, _, _ in disks._stretches(str(images))) == files
    (tmp_path / "list").write_bytes(b"".join(b"%s\t0\n" % path for path in files))
    assert [path for path, _, _ in disks._stretches(f"list:{tmp_path / 'list'}")] == files
    assert len(list(disks._stretches(f"images:{images}"))) == len(files)
    assert len(list(disks._stretches(f"images:{images}+list:{tmp_path / 'list'}"))) == len(files)
    (tmp_path / "x.tar").write_bytes(np.zeros(30 * MIB, np.uint8).tobytes())
    cut = list(disks._stretches(str(tmp_path / "x.tar")))
    assert [at for _, at, _ in cut] == [0, 97 * disks._IMAGE, 2 * 97 * disks._IMAGE]
    found = rows(disks.data, f"data.train={images}", f"data.val={tmp_path / 'x.tar'}")
    assert {one.state for one in found.values()} == {FINE} and "8 readers" in found["data.val"].says


def test_data_at_a_distance_is_read_by_ranges_or_where_it_is_staged(tmp_path):
    with serving({"x.tar": bytes(disks._IMAGE * 100)}) as server:
        found = rows(disks.data, f"data.train={server.url}/x.tar")["data.train"]
        assert found.state == FINE and "at a distance: " in found.says
        gets = [asked for asked in server.asked if asked[0] == "GET" and asked[2]]
        wanted = {f"bytes={at}-{min(at + disks._IMAGE, 100 * disks._IMAGE) - 1}" for at in (0, 97 * disks._IMAGE)}
        assert wanted <= {asked[2] for asked in gets}
        staged = rows(disks.data, f"data.train={server.url}/x.tar", f"data.stage={tmp_path}")
    assert staged["data.stage"].state == FINE and set(staged) == {"data.stage"}


def test_data_that_is_not_there_or_too_slow_for_the_gpus(images, tmp_path, monkeypatch, fastrot):
    assert rows(disks.data, f"data.train={tmp_path / 'none'}")["data.train"].state == BROKEN
    done = fastrot("doctor", f"data.train={tmp_path}/none.tar", "engine.kind=plain", "--json")
    assert done.code == 1 and "none.tar: no such file" in json.loads(done.out)["checks"][0]["says"]
    monkeypatch.setattr(disks, "_IMAGES", 10**9)
    found = rows(disks.data, f"data.train={images}", local=2, device="cuda")["data.train"]
    assert found.state == SLOW and "2 GPUs take up to 2,000,000,000" in found.says and "data.order=window" in found.cure


@pytest.fixture
def three_ranks(monkeypatch):
    """On two hosts; the third rank's clock is five seconds ahead. Returns what each would say to a gathering."""
    said = {}

    def gather(ranks, mine):
        if isinstance(mine[1], float):
            return [("a", mine[1]), ("a", mine[1] + 0.001), ("b", mine[1] + said["ahead"])]
        return [("a", mine[1]), None, ("b", said["other"])]

    monkeypatch.setattr(doctor.dist, "barrier", lambda: None)
    monkeypatch.setattr(doctor, "of_all", gather)
    return said


def test_every_host_has_its_rows_what_they_share_stands_once_and_clocks_are_compared(three_ranks):
    alike, own, other = (
        Check("cores", FINE, "8"),
        Check("run.out", LOW, "1 GiB", "x"),
        Check("packages", BROKEN, "torch 1"),
    )
    three_ranks |= {"other": [alike, other], "ahead": 5.0}
    ranks = Ranks(0, 3, 0, 2, torch.device("cpu"))
    *found, clocks = doctor._of_all([alike, own], ranks)
    assert [(one.what, one.state) for one in found] == [
        ("cores", FINE), ("run.out on a", LOW), ("packages on b", BROKEN),
    ]  # fmt: skip
    assert clocks.state == SLOW and "chronyc" in clocks.cure
    assert clocks.says == "3 ranks' clocks lie within 5.000 s; b (rank 2) is ahead of a (rank 0)"
    three_ranks["ahead"] = -0.5
    assert doctor._of_all([alike], ranks)[-1] == Check("clocks", FINE, "3 ranks' clocks lie within 0.501 s")


@pytest.mark.slow
def test_under_a_launcher_one_table_of_all(tmp_path):
    from fastrot.cli import main
    from workers.ranks import as_ranks

    images = write_folder(tmp_path / "images")
    words = ["doctor", "engine.kind=plain", f"data.train={images}", f"run.out={tmp_path / 'run'}", "--json"]
    said = as_ranks(2, main, words)
    (line,) = [line for line in said.splitlines() if line.startswith("{")]
    found = {one["what"]: one for one in json.loads(line)["checks"]}
    assert (
        found["clocks"]["says"].startswith("2 ranks' clocks lie within 0.0") and "for 2 ranks" in found["cores"]["says"]
    )
