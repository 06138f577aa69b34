"""The rotation task: each label is the turn that its view was given, and the control learns nothing."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastrot.data.loader import MicroBatch
from fastrot.tasks.rotation import RotationTask

SIDE = 6
TURNS = {
    k: (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)[k] for k in range(4)
}
CPU = torch.device("cpu")


def task(**options) -> RotationTask:
    """Views that hold the bytes themselves."""
    return RotationTask((0, 0, 0), (1, 1, 1), torch.float32, CPU, **options)


def drawn(images: int, views: int, seed: int = 0) -> MicroBatch:
    """Noise, flipped and turned at random."""
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(rng.integers(0, 256, (images, SIDE, SIDE, 3), np.uint8))
    flips = torch.from_numpy(rng.integers(0, 2, images, np.uint8))
    turns = torch.from_numpy(np.array([rng.permutation(4)[:views] for _ in range(images)], np.uint8))
    return MicroBatch(pixels, flips, turns, None, np.zeros(images, np.int64), images * views, True)


class Seen(nn.Module):
    """Knows the images, and tells by Pillow which counter-clockwise turn each view shows; as logits."""

    def __init__(self, batch: MicroBatch):
        super().__init__()
        self.batch = batch

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        per_image = len(views) // len(self.batch.pixels)
        logits = torch.zeros(len(views), 4)
        for at, view in enumerate(views):
            image = Image.fromarray(self.batch.pixels[at // per_image].numpy())
            if self.batch.flips[at // per_image]:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            shown = view.permute(1, 2, 0).numpy()
            for turn, how in TURNS.items():
                if np.array_equal(shown, np.asarray(image.transpose(how) if how else image)):
                    logits[at, turn] = 30
        assert (logits.sum(1) == 30).all(), "each view is its image under one of the four turns"
        return logits


@pytest.mark.parametrize("views", [1, 4])
def test_a_views_label_is_the_turn_it_was_given(views):
    batch = drawn(12, views)
    count = torch.bincount(batch.turns.flatten().long(), minlength=4).double()
    assert count.min() > 0
    one = task()
    for sums in (one.loss(Seen(batch), one.views(batch), batch)[1], one.evaluate(Seen(batch), [batch])):
        assert torch.equal(sums[1:5], count) and torch.equal(sums[5:], count)
        assert sums[0] < 1e-6
        summary = RotationTask.summary(sums)
        assert {summary[f"accuracy_{degrees}"] for degrees in (0, 90, 180, 270)} == {1.0} == {summary["accuracy"]}


def test_the_other_sense_of_turning_is_wrong_on_every_quarter_turn():
    """What a swap of 90 and 270 degrees anywhere would give."""
    batch = drawn(12, 4)
    one, other = task(), [0, 3, 2, 1]
    for sums in (
        one.loss(lambda views: Seen(batch)(views)[:, other], one.views(batch), batch)[1],
        one.evaluate(lambda views: Seen(batch)(views)[:, other], [batch]),
    ):
        assert sums[5:].tolist() == [12, 0, 12, 0]


def test_the_loss_and_metrics_are_sums_over_the_views():
    batch = drawn(5, 4)
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    target = batch.turns.flatten().long()
    loss, sums = task().loss(lambda _: logits, None, batch)
    want = -logits.log_softmax(1)[torch.arange(20), target].sum()
    torch.testing.assert_close(loss, want)
    assert sums[0] == loss.double()
    for turn in range(4):
        assert sums[5 + turn] == ((logits.argmax(1) == turn) & (target == turn)).sum()
    assert RotationTask.summary(sums)["loss"] == pytest.approx(float(want) / 20)


def test_the_controls_targets_are_the_views_own_turns_in_another_order():
    batch = drawn(50, 4)
    torch.manual_seed(3)
    learnt = []
    for _ in range(2):
        logits = torch.zeros(200, 4, requires_grad=True)
        loss, sums = task(shuffle_labels=True).loss(lambda _, logits=logits: logits, None, batch)
        loss.backward()
        learnt.append(logits.grad.argmin(1))  # the slope of a cross-entropy is negative at its target alone
        assert sums[1:5].tolist() == torch.bincount(learnt[-1], minlength=4).tolist()
    true = batch.turns.flatten().long()
    for targets in learnt:
        assert torch.equal(targets.sort().values, true.sort().values)
        assert 20 < (targets == true).sum() < 80, "a quarter of 200 by chance, and never all"
    assert not torch.equal(*learnt), "each micro-step is shuffled anew"


def scene(seed: int) -> MicroBatch:
    """Noise below a bright upper half: what is up shows."""
    batch = drawn(16, 4, seed)
    batch.pixels[:, : SIDE // 2] //= 2
    batch.pixels[:, : SIDE // 2] += 128
    batch.pixels[:, SIDE // 2 :] //= 2
    return batch


@pytest.mark.parametrize("shuffled, low, high", [(False, 0.0, 0.1), (True, 1.3, 1.5)])
def test_a_network_learns_the_turns_and_the_control_stays_at_chance(shuffled, low, high):
    """Held-out cross-entropy; chance is log 4. Evaluation never shuffles."""
    torch.manual_seed(0)
    one = RotationTask((128,) * 3, (64,) * 3, torch.float32, CPU, shuffle_labels=shuffled)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 4))
    sgd = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(150):
        batch = scene(step)
        loss, _ = one.loss(model, one.views(batch), batch)
        sgd.zero_grad()
        (loss / batch.views_of_step).backward()
        sgd.step()
    summary = one.summary(one.evaluate(model, [scene(1000 + i) for i in range(4)]))
    assert low <= summary["loss"] <= high, math.log(4)
    assert shuffled or summary["accuracy"] == 1
