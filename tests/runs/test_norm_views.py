"""Whose views batch norm sees together: groups of neighbouring ranks, said as they are, refused where they cannot be."""

import pytest
import torch

from conftest import metrics
from fastrot import config as configs
from fastrot.cli import main
from fastrot.data.plan import micro_steps_of, slice_of
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.runs.arithmetic import arithmetic, refuse_norm_views, uses_graphs
from fastrot.runs.dry_run import _norm_says
from workers.ranks import as_ranks


def numbers(ranks: int, *words: str):
    config, _ = configs.load(None, [str(word) for word in words])
    n = arithmetic(config, ranks, 10**6)
    refuse_norm_views(config, n)
    return config, n


@pytest.mark.parametrize(
    "ranks, images, at_once, wanted, groups, least, most",
    [
        (8, 1024, 128, 512, 8, 512, 512),
        (16, 1024, 128, 512, 8, 512, 512),
        (8, 128, None, 512, 1, 512, 512),
        (8, 1024, None, 2048, 2, 2048, 2048),
        (6, 512, None, 512, 3, 680, 684),  # four would be the recipe's; six are farther off
        (4, 130, None, 256, 2, 260, 260),
        (4, 1030, 128, 512, 2, 684, 688),
        (4, 96, None, 135, 4, 96, 96),  # 96 is nearer than 192, by its ratio
    ],
)
def test_groups_are_as_near_to_the_views_as_equal_groups_can_be(ranks, images, at_once, wanted, groups, least, most):
    words = [f"optim.images_per_step={images}", f"model.norm_views={wanted}"]
    _, n = numbers(ranks, *words, *([f"engine.images_per_micro_step={at_once}"] if at_once else []))
    assert (n.norm_groups, n.norm_views, n.norm_most) == (groups, least, most)
    micro_steps, size, seen = micro_steps_of(images, ranks, at_once), ranks // groups, set()
    for a in range(micro_steps):
        for first in range(0, ranks, size):
            slices = (slice_of(images, ranks, micro_steps, a, rank) for rank in range(first, first + size))
            seen.add(4 * sum(end - begin for begin, end in slices))
    assert (min(seen), max(seen)) == (least, most)


def test_without_it_all_ranks_are_one_group_and_without_synchronised_norms_each_is_its_own():
    assert numbers(4)[1].norm_groups == 1
    assert numbers(4, "model.sync_batchnorm=false")[1].norm_groups == 4


@pytest.mark.parametrize(
    "ranks, words, said",
    [
        (2, ["model.norm_views=513"], r"model.norm_views 513: all 2 ranks together see 512 views at once; lower it"),
        (
            2,
            ["optim.images_per_step=512", "model.norm_views=512"],
            r"each of 2 ranks sees 1024 views at once; raise it, or set engine.images_per_micro_step=128$",
        ),
    ],
)
def test_what_no_group_can_see_is_refused(ranks, words, said):
    with pytest.raises(UserError, match=said):
        numbers(ranks, *words)
    numbers(ranks, *words, "model.norm_views=512", "engine.images_per_micro_step=128")


def test_it_groups_synchronised_norms_alone():
    with pytest.raises(UserError, match=r"model.norm_views groups ranks whose norms are synchronised"):
        configs.load(None, ["model.norm_views=512", "model.sync_batchnorm=false"])


def test_ranks_that_are_each_a_group_talk_to_none_and_graphs_are_theirs():
    words = "optim.images_per_step=1024", "engine.images_per_micro_step=128", "engine.cuda_graphs=auto"
    eight = Ranks(0, 8, 0, 8, torch.device("cuda"))
    assert uses_graphs(numbers(8, *words, "model.norm_views=512")[0], eight)
    assert not uses_graphs(numbers(8, *words, "model.norm_views=1024")[0], eight)


@pytest.mark.parametrize(
    "views, says",
    [
        ((512, 512, 1), "over 512 views (recipe 512)"),
        ((512, 512, 4), "over 512 views in each of 4 groups of 2 ranks (recipe 512)"),
        ((508, 516, 8), "over 508 to 516 views in each of 8 groups of 1 rank (recipe 512)"),
    ],
)
def test_the_dry_run_says_what_each_group_sees(views, says):
    names = ("batch_norm_views", "batch_norm_most_views", "batch_norm_groups")
    assert _norm_says(dict(zip(names, views, strict=True)) | {"ranks": 8}) == says


@pytest.mark.slow
def test_a_run_in_groups_evaluates_and_resumes_as_one_that_never_stopped(narrow, images, tmp_path):
    """Each rank a group of its own: held-out figures and weights, running statistics too, are equal bit for bit."""
    words = ["train", "model.arch=resnet18", "engine.kind=plain", "data.crop=16", "optim.images_per_step=7",
             "optim.lr=0.05", "optim.warmup_epochs=0", "run.log_every=1", "run.tensorboard=false",
             "run.evaluate_every_steps=2", f"data.train={images}", f"data.val={images}", "model.norm_views=14"]  # fmt: skip
    for out, steps in (("whole", 4), ("parts", 3), ("parts", 4)):
        said = as_ranks(2, main, [*words, f"run.out={tmp_path / out}", f"run.max_steps={steps}"])
        assert "running statistics are the mean over ranks" in said
    files = [tmp_path / out / "checkpoints/step-00000004/model.safetensors" for out in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    ends = [
        [line["held_out_loss"] for line in metrics(tmp_path / out) if "held_out_loss" in line][-1]
        for out in ("whole", "parts")
    ]
    assert ends[0] == ends[1]
