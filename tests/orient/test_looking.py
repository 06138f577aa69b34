"""A source's answers are right, whatever kind it is and however its images lie."""

import numpy as np
import pytest
from PIL import Image, ImageOps

import compass
from conftest import write_shards
from fastrot.errors import UserError
from fastrot.orient.answers import Unread, combined
from fastrot.orient.looking import Source, answers, boxes_shown, looked
from fastrot.orient.network import Trust
from fastrot.probes.progress import silent

PHOTOS = {"a/0.jpg": 0, "a/1.jpg": 1, "b/2.png": 2, "b/deep/3.jpg": 3, "b/no up.jpg": None, "top.jpg": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = compass.write(tmp_path_factory.mktemp("photos"), PHOTOS)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left, and shown upright by its tag
    compass.turned(compass.sky(48, 64, 9), 1).save(folder / "tagged.jpg", exif=exif, quality=95)
    (folder / "a" / "broken.jpg").write_bytes((folder / "a" / "0.jpg").read_bytes()[:400])
    return folder


def found_in(source, network=None, least=None):
    opened = Source.open(str(source), silent)
    return opened, list(answers(opened, network or compass.Compass(), least))


@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_each_image_of_a_folder_is_answered_and_what_is_none_is_listed(photos, fit):
    _, (unread, *found) = found_in(photos, compass.Compass(fit=fit))
    assert isinstance(unread, Unread) and unread.file == str(photos / "a" / "broken.jpg") and unread.group == "a"
    expected = {str(photos / name): (turn is not None, turn) for name, turn in PHOTOS.items()}
    expected[str(photos / "tagged.jpg")] = True, 0
    assert {one.file for one in found} == set(expected)
    for one in found:
        decided, turn = expected[one.file]
        assert one.decided == decided and (not decided or one.clockwise == 90 * turn), one
    assert {one.file.rpartition("/")[2]: (one.exif, one.tag) for one in found if one.clockwise == 0 and one.decided} == {
        "0.jpg": (1, "none"), "tagged.jpg": (6, "right")
    }  # fmt: skip
    assert [one.group for one in sorted(found, key=lambda one: one.file)] == ["a", "a", "b", "b", "b", None, None]


def test_shards_and_lists_are_answered_as_the_folder_is(tmp_path):
    folder = compass.write(
        tmp_path / "of classes", {f"{label}/{at}.jpg": (at + (label == "b")) % 4 for label in "ab" for at in range(4)}
    )
    (tmp_path / "shards").mkdir()
    write_shards(folder, tmp_path / "shards")
    _, expected = found_in(folder)
    shards, of_shards = found_in(f"{tmp_path}/shards/shard-{{0..1}}.tar")
    rows = "".join(f"of classes/{label}/{at}.jpg\t{label}\n" for label in "ab" for at in range(4))
    (tmp_path / "list.txt").write_text(rows)
    _, of_list = found_in(f"list:{tmp_path / 'list.txt'}")
    assert [one.clockwise for one in expected] == [0, 90, 180, 270, 90, 180, 270, 0]
    for others in (of_shards, of_list):
        assert [one.probabilities for one in others] == [one.probabilities for one in expected]
    assert of_list == expected and [one.group for one in of_list] == ["a"] * 4 + ["b"] * 4
    assert not shards.whole_files and of_shards[1].file.startswith(f"{tmp_path}/shards/shard-0.tar at byte ")


def test_what_is_less_sure_than_is_asked_for_stays_undecided(photos):
    _, (_, *sure) = found_in(photos, compass.Compass(trust=Trust(temperature=2.0, threshold=0.0)))
    limit = sorted(one.confidence for one in sure)[3]
    _, (_, *some) = found_in(photos, compass.Compass(trust=Trust(temperature=2.0)), limit)
    assert [one.decided for one in some] == [one.confidence >= limit for one in sure]
    warm = np.array([one.probabilities for one in sure])
    _, (_, *cold) = found_in(photos)
    assert np.allclose(
        2 * np.log(warm[:, :1] / warm), np.log((p := np.array([o.probabilities for o in cold]))[:, :1] / p)
    )


def test_a_network_sees_what_pillow_makes_of_an_image(photos):
    """Squashed, it is the upright image resized; cropped, its centre after the short side was resized."""
    opened = Source.open(str(photos), silent)
    seen = []

    class Recorder(compass.Compass):
        def logits(self, pixels):
            seen.extend(pixels)
            return super().logits(pixels)

    for fit in ("squash", "crop"):
        seen.clear()
        network = Recorder(24, fit)
        rows = np.concatenate([batch.rows for batch in looked(opened.manifest, network)])
        boxes = boxes_shown(network.shows, opened.manifest.height, opened.manifest.width)
        for row, pixels in zip(rows.tolist(), seen, strict=True):
            image = ImageOps.exif_transpose(Image.open(opened.manifest.path(row))).convert("RGB")
            top, left, height, width = boxes[row]
            assert fit == "crop" or (top, left, height, width) == (0, 0, image.height, image.width)
            box = (left, top, left + width, top + height)
            expected = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR, box), int)
            assert abs(pixels - expected).max() <= 1, (fit, row)


def test_an_image_that_breaks_after_indexing_is_listed_and_the_others_are_answered(tmp_path, monkeypatch):
    folder = compass.write(tmp_path / "photos", {f"{at}.jpg": at % 4 for at in range(40)})
    opened = Source.open(str(folder), silent)
    for at in (3, *range(32, 40)):  # the second batch is gone whole
        (folder / f"{at}.jpg").unlink()
    names = sorted(f"{at}.jpg" for at in range(40))
    found = list(answers(opened, compass.Compass()))
    unread = {one.file: one.unreadable for one in found if isinstance(one, Unread)}
    assert sorted(unread) == sorted(str(folder / f"{at}.jpg") for at in (3, *range(32, 40)))
    assert set(unread.values()) == {"cannot be opened (No such file or directory)"}
    assert [one.row for one in found if not isinstance(one, Unread)] == [
        row for row, name in enumerate(names) if (folder / name).exists()
    ]


def test_images_turned_without_loss_are_answered_alike(tmp_path):
    """Of the size that the network sees, so that no pixel changes: the probabilities are those of the image, rolled."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    for turn in range(4):
        compass.turned(image, turn).save(tmp_path / f"{turn}.png")
    _, found = found_in(tmp_path)
    for turn, one in enumerate(found):
        assert np.allclose(one.probabilities, np.roll(found[0].probabilities, turn), rtol=0, atol=1e-6)


def test_numbers_that_are_none_are_refused(photos):
    class Broken(compass.Compass):
        def logits(self, pixels):
            return np.full((len(pixels), 4, 4), np.nan, np.float32)

    with pytest.raises(UserError, match="a compass: gives what is no number"):
        found_in(photos, Broken())


def test_the_compass_is_one():
    pixels = np.stack([np.asarray(compass.turned(compass.sky(32, 32, at), at)) for at in range(4)])
    assert combined(compass.Compass().logits(pixels)).argmax(1).tolist() == [0, 1, 2, 3]
