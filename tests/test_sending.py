"""Nodes that share neither disks nor names: images copied to each, the run folder on rank 0's alone."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import metrics, write_folder
from fastrot.cli import main
from workers.hosts import on_a_host_each
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
    assert not list((hosts / "1/cache/fastrot/sent").iterdir()), "copies go"
    assert not (hosts / "1/cache/fastrot/manifests").exists(), "one host has indexed"
    assert not (hosts / "0/run/bad_images.jsonl").exists() and not (hosts / "1/run/bad_images.jsonl").exists()
