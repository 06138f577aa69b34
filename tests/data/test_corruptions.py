"""Damage against shortcuts: keyed like the stream, alike in any batch, and with no direction of its own."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import fastrot
from conftest import write_folder
from fastrot.data.corruptions import Corruptions, Corruptor, Damage, damaged, recoded, shifted
from fastrot.data.order import FullOrder
from fastrot.data.plan import Plan
from fastrot.data.randomness import philox, uniform

ALL = Corruptions(7, jpeg=0.5, quality=(20, 90), chroma_shift=2.0, border=0.25, blur=1.5)
OPTIONS = {"jpeg": 0.5, "chroma_shift": 2.0, "border": 0.25, "blur": 1.5}
NONE = Damage(0, (0.0, 0.0), np.zeros((2, 2)), np.zeros(4, np.int64), np.zeros(3, np.uint8), 0, 0)
ROWS = np.arange(4000)


def crop(side=32, seed=0):
    noise = np.random.default_rng(seed).normal(size=(side, side, 3))
    return (127 + 400 * ndimage.gaussian_filter(noise, (3, 1, 0))).clip(0, 255).astype(np.uint8)


def drawn(corruptions=ALL, side=40):
    return corruptions.drawn(ROWS, np.full(len(ROWS), 3), side)


def test_what_is_drawn_is_a_function_of_seed_row_and_epoch():
    rows, epochs = np.array([5, 2**33, 9]), np.array([0, 1, 0])
    together = ALL.drawn(rows, epochs, 40)
    for at in range(3):
        (alone,) = ALL.drawn(rows[at : at + 1], epochs[at : at + 1], 40)
        assert repr(alone) == repr(together[at])
    u = [uniform(philox(7, 5, 0, purpose))[0] for purpose in (10, 11, 12, 13)]
    quality = 0 if u[0][0] >= 0.5 else 20 + int(u[0][1] * 71)
    assert (together[0].quality, together[0].quarter) == (quality, int(u[0][3] * 4))
    np.testing.assert_allclose(together[0].shifts.ravel(), 4 * u[1] - 2)
    assert together[0].widths.tolist() == [int(max(0, 2 * v - 1) * 10) for v in u[2]]
    np.testing.assert_allclose(together[0].blur, [1.5 * max(0, 2 * v - 1) for v in u[3][:2]])


def test_what_is_drawn_lies_within_its_bounds_and_in_every_direction():
    found = drawn()
    quality = np.array([d.quality for d in found])
    assert abs((quality > 0).mean() - 0.5) < 0.04
    assert (quality[quality > 0].min(), quality.max()) == (20, 90)
    assert np.bincount([d.quarter for d in found], minlength=4).min() > 900
    assert {d.subsampling for d in found} == {0, 2}
    widths, blur = np.array([d.widths for d in found]), np.array([d.blur for d in found])
    shifts = np.array([d.shifts for d in found])
    assert widths.max() == 9 and np.abs(widths.mean(0) / widths.mean() - 1).max() < 0.1
    assert blur.max() < 1.5 and abs((blur == 0).mean() - 0.5) < 0.04
    assert np.abs(shifts).max() < 2 and np.abs(shifts.mean(0)).max() < 0.1


def test_nothing_asked_for_is_nothing_done():
    assert not Corruptions(7) and all(ALL.__class__(7, **{k: v}) for k, v in OPTIONS.items())
    for damage in drawn(Corruptions(7))[:50]:
        np.testing.assert_array_equal(damaged(crop(), damage), crop())


def test_damage_turns_with_the_frame_that_it_is_drawn_in():
    """A crop turned by a quarter, damaged in a frame one quarter back, is the damaged crop turned: exactly. Frames are
    drawn alike, so damaged crops are as likely any way up: damage tells no turn."""
    for damage in drawn(side=32)[:40]:
        turned = Damage(**{**vars(damage), "quarter": (damage.quarter - 1) % 4})
        np.testing.assert_array_equal(damaged(np.rot90(crop()), turned), np.rot90(damaged(crop(), damage)))


def test_a_jpeg_in_the_upright_frame_alone_would_be_a_cue():
    """Why the frame is drawn: Pillow's tables are not those of their transpose."""
    one = recoded(np.rot90(crop()), 30, 0)
    assert (one != np.rot90(recoded(crop(), 30, 0))).mean() > 0.1


@pytest.mark.parametrize("down, right", [(0, 0), (1, 0), (0.5, -1.25), (-2, 1.75)])
def test_a_shift_is_scipys(down, right):
    plane = crop()[..., 0]
    want = ndimage.shift(plane.astype(float), (down, right), order=1, mode="nearest")
    assert np.abs(shifted(plane, down, right) - want).max() <= 0.5 + 1e-9


def test_green_stays_where_it_is_and_bars_cover_the_edges():
    moved = damaged(crop(), Damage(**{**vars(NONE), "shifts": np.array([[2.0, 0.0], [0.0, -1.0]])}))
    np.testing.assert_array_equal(moved[..., 1], crop()[..., 1])
    np.testing.assert_array_equal(moved[2:, :, 0], crop()[:-2, :, 0])
    np.testing.assert_array_equal(moved[:, :-1, 2], crop()[:, 1:, 2])
    bars = Damage(**{**vars(NONE), "widths": np.array([1, 2, 3, 4]), "colour": np.array([9, 8, 7], np.uint8)})
    framed = damaged(crop(), bars)
    np.testing.assert_array_equal(framed[1:-3, 2:-4], crop()[1:-3, 2:-4])
    assert (framed == [9, 8, 7]).all(2).sum() >= 32 * 32 - 28 * 26


def test_a_jpeg_is_one_of_its_quality():
    file = io.BytesIO()
    Image.fromarray(crop()).save(file, "JPEG", quality=30, subsampling="4:2:0")
    want = np.asarray(Image.open(file))
    np.testing.assert_array_equal(damaged(crop(), Damage(**{**vars(NONE), "quality": 30, "subsampling": 2})), want)


def test_a_batch_is_its_images_each_by_itself():
    pixels = np.stack([crop(seed=i) for i in range(9)])
    rows, epochs = np.arange(9) * 7, np.arange(9) % 2
    many, few = Corruptor(ALL, 4), Corruptor(ALL, 1)
    whole = many(pixels, rows, epochs)
    parts = [few(pixels[s], rows[s], epochs[s]) for s in (slice(0, 1), slice(1, 6), slice(6, 9))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (whole != pixels).any()
    many.close(), few.close()


def shown(folder: Path, ranks: int, **options):
    """{(epoch, row): pixels} of two epochs, over all ranks; held-out crops."""
    out, manifest = {}, fastrot.open(folder)
    for rank in range(ranks):
        with fastrot.Loader(manifest, 6, 32, seed=7, rank=rank, ranks=ranks, device="cpu", **options) as loader:
            for _ in range(2):
                for batch in loader:
                    epochs = (batch.step * 6) // len(manifest)
                    out |= {(epochs, int(r)): p.numpy() for r, p in zip(batch.rows, batch.pixels, strict=True)}
            held_out = [batch.pixels.numpy() for batch in loader.held_out()]
    return out, held_out


def test_training_is_damaged_alike_over_any_ranks_and_threads_and_evaluation_never(tmp_path):
    folder = write_folder(tmp_path / "d")
    clean, held_out = shown(folder, 1, decode="turbo")
    one, still = shown(folder, 1, decode="turbo", **OPTIONS)
    three, _ = shown(folder, 3, decode="turbo", threads=2, **OPTIONS)
    other, _ = shown(folder, 1, decode="torch", **OPTIONS)
    assert one.keys() == three.keys()
    for key, pixels in one.items():
        np.testing.assert_array_equal(pixels, three[key])
        assert np.abs(pixels.astype(int) - other[key]).mean() < 1
    assert np.mean([(one[key] != clean[key]).any() for key in one]) > 0.9
    for a, b in zip(held_out, still, strict=True):
        np.testing.assert_array_equal(a, b)


def test_squashed_images_are_shown_whole():
    n = 2000
    plan = Plan(3, np.full(n, 300), np.full(n, 900), FullOrder(n, 3), scale=(0.5, 1.0), ratio=(0.8, 1.25), squash=True)
    top, left, height, width = plan.at(0, n).windows.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 300).all() and (left + width <= 900).all()
    ratio, share = width / height / 3, width * height / (300 * 900)
    assert 0.79 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.27
    assert 0.49 < share.min() < 0.55 and 0.9 < share.max() <= 1
    assert plan.held_out(np.arange(2), 99, 64).windows.tolist() == [[0, 0, 300, 900]] * 2
    never = Plan(3, np.full(9, 300), np.full(9, 900), FullOrder(9, 3), scale=(1.0, 1.0), ratio=(2.0, 2.0), squash=True)
    assert never.at(0, 1).windows.tolist() == [[75, 0, 150, 900]]
