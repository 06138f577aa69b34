"""Nodes that share neither disks nor names: images copied to each, the run folder on rank 0's alone."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import hosts_apart
from conftest import metrics, write_folder
from fastrot.cli import main
from fastrot.data.manifest import Manifest
from fastrot.runs.checkpoint import Saver, State
from workers.hosts import on_a_host_each, refusals
from workers.ranks import as_ranks

pytestmark = pytest.mark.usefixtures("narrow")
WORDS = [
    "train", "model.arch=resnet18", "data.crop=16", "optim.images_per_step=6", "optim.lr=0.05", "optim.epochs=2",
    "optim.warmup_epochs=0", "run.log_every=1", "run.checkpoint_every=2", "run.tensorboard=false", "engine.kind=plain",
    "run.out=run",
]  # fmt: skip


@pytest.fixture
def hosts(tmp_path):
    """Two hosts; the second has its images under another name, younger than the first's."""
    write_folder(tmp_path / "0/data/images")
    shutil.copytree(tmp_path / "0/data", tmp_path / "1/disk", copy_function=shutil.copyfile)
    return tmp_path


def learnt(run):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run)]


@pytest.mark.slow
def test_what_nodes_do_not_share_is_sent_and_the_end_is_the_same(hosts, monkeypatch):
    data = [str(hosts / "0/data/images"), str(hosts / "1/disk/images")]
    monkeypatch.chdir(hosts)
    as_ranks(2, main, [*WORDS, f"data.train={data[0]}"])
    as_ranks(2, on_a_host_each, str(hosts), [*WORDS, "run.max_steps=3"], data)
    assert [path.name for path in (hosts / "1/run").iterdir()] == [], "the run is on rank 0's host"
    said = as_ranks(2, on_a_host_each, str(hosts), WORDS, data)
    assert "resumed from step-00000003: step 3 of 4" in said
    assert learnt(hosts / "0/run") == learnt(hosts / "run") and len(learnt(hosts / "run")) == 4
    ours, theirs = (
        load_file(root / "run/checkpoints/step-00000004/model.safetensors") for root in (hosts / "0", hosts)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((hosts / "1/cache/sent").iterdir()), "copies go"
    assert not (hosts / "1/cache/manifests").exists(), "one host has indexed"
    assert not (hosts / "0/run/bad_images.jsonl").exists() and not (hosts / "1/run/bad_images.jsonl").exists()


def test_every_node_gets_what_rank_0_has_and_what_does_not_fit_is_refused_in_a_line(tmp_path):
    """Relative names, so each host's own; the second holds a later checkpoint of one run, and cannot make a folder."""
    for name in ("same", "cut", "gone"):
        write_folder(tmp_path / "0" / name, classes=1)
        shutil.copytree(tmp_path / "0" / name, tmp_path / "1" / name, copy_function=shutil.copyfile)
    weight = torch.arange(5e6).reshape(2, -1)  # 20 MB, more than goes at once
    (tmp_path / "0/kept/checkpoints").mkdir(parents=True)
    saver = Saver(tmp_path / "0/kept", 3, print)
    saver.save({"fc.weight": weight[:, :2], "long": weight}, {}, State(7, 42, {}, {}), None)
    saver.finish()
    (tmp_path / "1/cut/class0/2.jpg").write_bytes(b"short")
    (tmp_path / "1/gone/class0/1.jpg").unlink()
    (tmp_path / "1/run/checkpoints/step-00000009").mkdir(parents=True)
    (tmp_path / "1/held").touch()
    as_ranks(2, refusals, str(tmp_path))
    for host in ("0", "1"):
        got = json.loads((tmp_path / host / "got.json").read_text())
        assert got["paths"] == [str(tmp_path / host / f"same/class0/{i}.jpg") for i in range(4)]
        assert got["known"] == [True] * 4, "copies are younger than what was indexed"
        indexed = {meta.parent for meta in (tmp_path / "0/cache/manifests").glob("*/meta.json")}
        assert {got["content"]} == {Manifest.load(folder).content for folder in indexed}, "the same images, three times"
        assert (got["weight"], got["position"]) == ([[0, 1], [2_500_000, 2_500_001]], 42)
        assert got["path"] == "kept/checkpoints/step-00000007"
    assert not list((tmp_path / "1/cache/sent").iterdir()) and not (tmp_path / "1/cache/manifests").exists()
    said, other = (json.loads((tmp_path / rank / "said.json").read_text()) for rank in "01")
    assert said == other and not any("\n" in line for line in said.values())
    assert said["same"] == ""
    assert re.search(r"^rank 1 on .*: data.train: 1 of 4 files are not those of rank 0; .*/1/cut/class0/2.jpg: changed: "
                     r"5 bytes, \d+ when indexed$", said["cut"])  # fmt: skip
    assert said["gone"].endswith("/1/gone/class0/1.jpg: gone")
    assert "run.out run: the node of rank 1 holds step 9, that of rank 0 no checkpoint; put run.out" in said["later"]
    assert re.search(r"^rank 1 on .*: run.out held/run: cannot be written", said["held"])
    assert re.search(
        r"^rank 1 on .*: /dev/null/cache/sent/.*: cannot be written \(Not a directory\); set", said["cache"]
    )


@pytest.mark.slow
def test_two_hosts_with_a_network_and_disks_of_their_own_train_as_one_machine_does(hosts):
    """The same paths on both, and nothing behind them is shared; the run is stopped, and goes on."""
    if why := hosts_apart.missing():
        pytest.skip(why)
    shutil.move(hosts / "1/disk", hosts / "1/data")
    for host in ("0", "1"):
        (hosts / host / "home").mkdir()
    words = [*WORDS[1:-1], "data.train=/srv/data/images", "run.out=/srv/run"]
    as_ranks(2, main, [*WORDS[:-1], f"data.train={hosts / '0/data/images'}", f"run.out={hosts / 'run'}"])
    with hosts_apart.joined():
        disks = [hosts / "0", hosts / "1"]
        for more in (["run.max_steps=3"], []):
            ends = hosts_apart.train(disks, [*words, *more])
            assert [end.returncode for end in ends] == [0, 0], "\n".join(end.stdout for end in ends)
    assert "resumed from step-00000003: step 3 of 4" in ends[0].stdout
    assert learnt(hosts / "0/run") == learnt(hosts / "run")
    assert [path.name for path in (hosts / "1/run").iterdir()] == []
    assert not list((hosts / "1/cache/sent").iterdir()) and not (hosts / "1/cache/manifests").exists()
