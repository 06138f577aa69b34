"""Which label is whose in a tar shard: a battery of what people's tools write."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import draw
from fastrot.data.sources import tar as tar_source


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    draw(8, 9, seed).save(out, "JPEG")
    return out.getvalue()


JPEG, OTHER = jpeg(1), jpeg(2)


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def listed(path: Path, members: list[tuple[str, bytes]]) -> tuple[dict[str, int], list[list[str]], dict[str, int]]:
    """{member: label} of the rows in their order, [member, reason] of what is listed, what is passed over."""
    listing = tar_source.open_source(str(shard(path, members)), lambda items, total, title: items)
    with tarfile.open(path) as tar:
        names = {member.offset_data: member.name for member in tar}
    rows = {names[at]: label for at, label in zip(listing.offset.tolist(), listing.labels.tolist(), strict=True)}
    assert len(rows) == len(listing.offset)
    return rows, [[name.partition(":")[2], why] for name, why in listing.faults], dict(listing.skipped)


WIDTH = b'{"width": 64}'
NOT, LONE, SECOND = "its label is not an integer", "a label without an image", "a second image of its key"
# case: members, {row: label}, [[listed, why]], passed over
BATTERY = {
    "json without a label beside cls": (
        [("0.cls", b"3"), ("0.jpg", JPEG), ("0.json", WIDTH)], {"0.jpg": 3}, [], {},
    ),
    "json without a label before cls": (
        [("0.json", WIDTH), ("0.jpg", JPEG), ("0.cls", b"3")], {"0.jpg": 3}, [], {},
    ),
    "json alone": ([("0.jpg", JPEG), ("0.json", b'{"label": 5}')], {"0.jpg": 5}, [], {}),
    "json's cls": ([("0.jpg", JPEG), ("0.json", b'{"label": null, "cls": 6}')], {"0.jpg": 6}, [], {}),
    "json without a label alone": ([("0.jpg", JPEG), ("0.json", WIDTH)], {"0.jpg": -1}, [], {}),
    "cls decides": ([("0.json", b'{"label": 5}'), ("0.jpg", JPEG), ("0.cls", b"3")], {"0.jpg": 3}, [], {}),
    "an empty cls says nothing": ([("0.cls", b" \n"), ("0.jpg", JPEG), ("0.json", b"7")], {"0.jpg": 7}, [], {}),
    "json asked after a broken cls": (
        [("0.cls", b"cat"), ("0.jpg", JPEG), ("0.json", b'{"label": 2}')], {"0.jpg": 2}, [["0.cls", NOT]], {},
    ),
    "a list in json": ([("0.jpg", JPEG), ("0.json", b'[{"bbox": [1]}]')], {"0.jpg": -1}, [], {}),
    "macOS": (
        [("._0.cls", b"\0\5\x16\7"), ("0.cls", b"3"), ("._0.jpg", b"\0\5\x16\7"), ("0.jpg", JPEG), ("d/._1.jpg", b"x")],
        {"0.jpg": 3}, [], {"hidden": 3},
    ),
    "hidden folder": ([(".git/0.jpg", JPEG), ("0.jpg", OTHER)], {"0.jpg": -1}, [], {"hidden": 1}),
    "a leading ./": ([("./0.jpg", JPEG), ("0.cls", b"3")], {"./0.jpg": 3}, [], {}),
    "all images, then all labels": (
        [("0.jpg", JPEG), ("1.jpg", OTHER), ("0.cls", b"3"), ("1.cls", b"4"), ("1.json", WIDTH)],
        {"0.jpg": 3, "1.jpg": 4}, [], {},
    ),
    "all labels first, in another order": (
        [("1.cls", b"4"), ("0.cls", b"3"), ("0.jpg", JPEG), ("1.jpg", OTHER)], {"0.jpg": 3, "1.jpg": 4}, [], {},
    ),
    "keys with dots": (
        [("22.00.jpg", JPEG), ("22.00.cls", b"3"), ("22.01.jpg", OTHER), ("22.02.jpg", JPEG), ("22.02.cls", b"5")],
        {"22.00.jpg": 3, "22.01.jpg": -1, "22.02.jpg": 5}, [], {},
    ),
    "a label of the short key is no frame's": (
        [("22.cls", b"3"), ("22.00.jpg", JPEG), ("22.01.jpg", OTHER)],
        {"22.00.jpg": -1, "22.01.jpg": -1}, [["22.cls", LONE]], {},
    ),
    "a frame beside the short key": (
        [("22.jpg", JPEG), ("22.cls", b"3"), ("22.01.jpg", OTHER), ("22.01.cls", b"4")],
        {"22.jpg": 3, "22.01.jpg": 4}, [], {},
    ),
    "a mask": ([("0.jpg", JPEG), ("0.seg.png", OTHER), ("0.cls", b"3")], {"0.jpg": 3}, [["0.seg.png", SECOND]], {}),
    "folders": (
        [("a/1.jpg", JPEG), ("a/1.cls", b"3"), ("b/1.jpg", OTHER), ("b/1.cls", b"4")],
        {"a/1.jpg": 3, "b/1.jpg": 4}, [], {},
    ),
    "folders, labels apart": (
        [("a/1.jpg", JPEG), ("b/1.jpg", OTHER), ("b/1.cls", b"4"), ("1.cls", b"9"), ("a/1.cls", b"3")],
        {"a/1.jpg": 3, "b/1.jpg": 4}, [["1.cls", LONE]], {},
    ),
    "a folder with a dot": ([("v1.0/1.jpg", JPEG), ("v1.0/1.cls", b"3")], {"v1.0/1.jpg": 3}, [], {}),
    "upper case": ([("0.JPG", JPEG), ("0.CLS", b"3")], {"0.JPG": 3}, [], {}),
    "two images a key": (
        [("0.jpg", JPEG), ("0.png", OTHER), ("0.cls", b"3")], {"0.jpg": 3}, [["0.png", SECOND]], {},
    ),
    "two labels a key that differ": (
        [("0.cls", b"3"), ("0.jpg", JPEG), ("0.cls", b"4")], {"0.jpg": -1}, [["0.cls", "has labels that differ: 3, 4"]], {},
    ),
    "two labels a key that agree": ([("0.cls", b"3"), ("0.jpg", JPEG), ("0.cls", b"03")], {"0.jpg": 3}, [], {}),
    "a label without an image": (
        [("0.jpg", JPEG), ("0.cls", b"3"), ("1.cls", b"4"), ("2.json", b'{"label": 1}'), ("meta.json", WIDTH)],
        {"0.jpg": 3}, [["1.cls", LONE], ["2.json", LONE]], {"member of another kind": 1},
    ),
    "an image without a label": (
        [("0.jpg", JPEG), ("0.cls", b"3"), ("1.jpg", OTHER), ("1.txt", b"a cat")],
        {"0.jpg": 3, "1.jpg": -1}, [], {"member of another kind": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BATTERY)
def test_an_images_label_is_that_of_its_whole_key(tmp_path, case):
    members, rows, faults, skipped = BATTERY[case]
    assert listed(tmp_path / "a.tar", members) == (rows, faults, skipped)


def test_a_key_that_comes_again_is_another_sample(tmp_path):
    """Two shards joined by `tar -A` number their samples alike."""
    members = [("0.jpg", JPEG), ("0.cls", b"3"), ("1.jpg", JPEG), ("0.cls", b"4"), ("0.jpg", OTHER)]
    path = shard(tmp_path / "a.tar", members)
    listing = tar_source.open_source(str(path), lambda items, total, title: items)
    assert listing.labels.tolist() == [3, -1, 4] and not listing.faults
    path = shard(
        tmp_path / "b.tar", [("0.jpg", JPEG), ("1.jpg", JPEG), ("0.jpg", OTHER), ("1.cls", b"1"), ("0.cls", b"4")]
    )
    listing = tar_source.open_source(str(path), lambda items, total, title: items)
    assert listing.labels.tolist() == [-1, 1, -1]  # nobody can tell whose 0.cls is
    assert [why for _, why in listing.faults] == [LONE]


NUMBERS = {
    b"3": 3, b" 3\n": 3, b"0003": 3, b"+3": 3, b"-1": -1, b"3.0": 3, b"3e2": 300, b'"3"': 3, b"\xef\xbb\xbf0003": 3,
    b"1_000": 1000, b"9223372036854775807": 2**63 - 1, b"null": None,
    b"3.5": NOT, b"1e999": NOT, b"NaN": NOT, b"9" * 20: NOT, b"9" * 5000: NOT, b"9223372036854775808": NOT, b"cat": NOT,
    b"3 4": NOT, b"[" * 200_000: NOT, b"\xff\xfe": NOT, b"1e300": NOT,
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: repr(text[:24]))
@pytest.mark.parametrize("form", ["0.cls", "0.json", "in json"])
def test_a_number_that_the_fields_tools_read_is_read_and_no_other(tmp_path, text, form):
    want, name = NUMBERS[text], form if form != "in json" else "0.json"
    if form == "in json":
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            want = NOT
        text = b'{"label": ' + text + b"}"
    rows, faults, _ = listed(tmp_path / "a.tar", [("0.jpg", JPEG), (name, text)])
    assert rows == {"0.jpg": want if isinstance(want, int) else -1}
    assert faults == ([[name, NOT]] if want == NOT else [])


KEYS = st.text("ab.", min_size=1, max_size=4).filter(lambda k: not k.startswith(".") and not k.endswith("."))


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(KEYS, unique=True, min_size=1, max_size=6), labelled=st.data(), order=st.randoms())
def test_no_order_of_members_gives_an_image_anothers_label(tmp_path_factory, keys, labelled, order):
    folder = tmp_path_factory.mktemp("s")
    label = {key: at for at, key in enumerate(keys) if labelled.draw(st.booleans())}
    members = [(f"{key}.jpg", JPEG) for key in keys] + [(f"{key}.cls", b"%d" % at) for key, at in label.items()]
    order.shuffle(members)
    rows, faults, _ = listed(folder / "a.tar", members)
    (folder / "a.tar").unlink()
    for name, found in rows.items():
        assert found == label.get(name.removesuffix(".jpg"), -1)
    second = {name for name, _ in faults}
    assert second.isdisjoint(rows) and second | set(rows) == {f"{key}.jpg" for key in keys}
    assert not any(name.removesuffix(".jpg") in label for name in second)


def test_a_label_that_the_shards_end_cuts_is_none(tmp_path):
    members = [("0.jpg", JPEG), ("0.cls", b"123")]
    whole = shard(tmp_path / "a.tar", members).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: whole.index(b"123") + 2])
    listing = tar_source.open_source(str(tmp_path / "b.tar"), lambda items, total, title: items)
    assert listing.labels.tolist() == [-1]
    assert [f"{tmp_path / 'b.tar'}:0.cls", NOT] in listing.faults


@pytest.mark.parametrize(
    "size", [b"\x80" + b"\xff" * 11, b"\xff" * 10 + b"\xf0\0", b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7]
)
@pytest.mark.parametrize("kind", [b"0", b"x", b"L"])
def test_a_header_of_an_impossible_size_ends_a_shard_not_the_program(tmp_path, size, kind):
    with tarfile.open(shard(tmp_path / "a.tar", [("0.jpg", JPEG), ("1.jpg", OTHER)])) as tar:
        at = tar.getmembers()[1].offset
    whole = bytearray((tmp_path / "a.tar").read_bytes())
    whole[at + 124 : at + 136] = size
    whole[at + 156 : at + 157] = kind
    whole[at + 148 : at + 156] = b" " * 8
    whole[at + 148 : at + 156] = b"%06o\0 " % sum(whole[at : at + 512])
    (tmp_path / "b.tar").write_bytes(whole)
    listing = tar_source.open_source(str(tmp_path / "b.tar"), lambda items, total, title: items)
    assert (listing.offset >= 0).all() and (listing.length >= 0).all()
    assert listing.offset[0] == 512


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_shard_of_damaged_headers_is_listed_or_one_line(tmp_path_factory, data):
    from fastrot.errors import UserError

    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    shard(path, [("0.jpg", JPEG), ("0.cls", b"3"), ("k" * 120 + ".jpg", OTHER)])
    whole = np.fromfile(path, np.uint8)
    for at in data.draw(st.lists(st.integers(0, len(whole) // 2), min_size=1, max_size=5)):
        whole[at] = data.draw(st.integers(0, 255))
    for header in range(0, len(whole), 512):  # checksums that hold, so that the fields are believed
        fields = whole[header : header + 512]
        if data.draw(st.booleans()):
            fields[148:156] = list(b"        ")
            fields[148:156] = list(b"%06o\0 " % int(fields.sum(dtype=np.int64)))
    whole.tofile(path)
    try:
        listing = tar_source.open_source(str(path), lambda items, total, title: items)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert (listing.offset >= 0).all() and (listing.length >= 0).all()
    finally:
        path.unlink()
