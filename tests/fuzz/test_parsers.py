"""Every parser of a user's bytes, on any bytes and on valid files that were damaged; and what fuzzing has found."""

import resource
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("deepspeed", reason="DeepSpeed, whose file is one of those parsed, is not installed")
from corpus import headed, segment
from parsers import PARSERS, of_file
from seeds import betons


def header(kind: bytes) -> tarfile.TarInfo:
    """That another one follows."""
    made = tarfile.TarInfo("x")
    made.type = kind
    return made


# what fuzzing has found, {parser: inputs}
FOUND = {
    "orientation": [
        headed(segment(0xE1, b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\x09\x01\x12"))
    ],  # a directory that ends within its entries
    "undo": [
        b'{"journal": "fastrot orient", "version": 1, "folder": ""}\n{"file": "x.jpg", "before": null, "after": "bb"}\n'
    ],
    "tar": [header(kind).tobuf(tarfile.USTAR_FORMAT) * 2000 for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)],
    "beton": [betons()[0].replace(b"\1label\0", b"\0la\nel\0")],  # a field's name of two lines
    "manifest": [
        b"\1\x93NUMPY\x01\x00v\x00{'descr': '<i8'" + b" " * 103,  # a header that ends within an expression
        b"\1\x93NUMPY\x01\x00v\x00" + b"{\n  (\n 1" * 10 + b" " * 38,
        b"\1PK\3\4 a zip file",
        b"\3\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1,), }"
        + b" " * 57
        + b"\n"
        + bytes(8),
    ],
    "features": [b"\0PK\3\4"],
    "run": [
        b'\2{"path": \xa2',
        b'\1{"step": "2"}\n',
        b'\1{"step": 1' + b"0" * 400 + b"}\n",
        b'\0{"steps": "x"}',
        b'\5{"versions": 3}',
    ],
    "weights": [
        b"\0\x80\2.",
        b"\0\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\2M\xe9\3.\x80\2}q\0X\x10",
        b"\0\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\2M\xe9\3.\x80\2}q\0.\x80\2}q\0(X\1\0\0\0aq\1h\0u.\x80\2]q\0.",  # in itself
    ],
    "xml": [b'<?xml version="1.0" encoding="utf-81"?><a/>'],
    "deepspeed": [b"[" * 100_000],
    "bundle": [b"[" * 100_000],
    "hardware": [b"a: " + b"[" * 500, b"a: !!timestamp x", b"a: !!float x", b"a: 2024-99-01"],
    "suite": [b"a: " + b"[" * 500, b"a: !!float x", b"runs:\n2:\n  - {name: a}\n"],
    "pieces": [b"9 'v'\n" + b"1" * 5000 + b" 3\n"],
}
MOST_KIB = 256 << 10  # of more memory, whatever the bytes say
PIECES = [
    b"\0",
    b"\xff",
    b"\n",
    b'"',
    b"[",
    b"{}",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 30,
    b"\xe2\x80\xa8",
    b"[" * 500,
]
CHANGES = st.one_of(
    st.tuples(st.just("put"), st.floats(0, 1), st.one_of(st.binary(max_size=4), st.sampled_from(PIECES))),
    st.tuples(st.just("over"), st.floats(0, 1), st.binary(min_size=1, max_size=2)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 200)),
    st.tuples(st.just("again"), st.floats(0, 1), st.integers(1, 200)),
)


def peak() -> int:
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def changed(data: bytes, changes: list[tuple[str, float, bytes | int]]) -> bytes:
    for how, where, what in changes:
        at = int(where * len(data))
        if isinstance(what, int):
            data = data[:at] + (data[at : at + what] * 2 if how == "again" else b"") + data[at + what :]
        else:
            data = data[:at] + what + data[at + (len(what) if how == "over" else 0) :]
    return data


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_bytes_are_read_or_refused_in_a_line(name, data):
    parser = PARSERS[name]
    whole = data.draw(st.one_of(st.sampled_from(parser.seeds()), st.binary(max_size=60)))
    damaged, before = changed(whole, data.draw(st.lists(CHANGES, max_size=6))), peak()
    parser.one(damaged)
    assert peak() - before < MOST_KIB


@pytest.mark.parametrize("name, found", [(name, one) for name, all_found in FOUND.items() for one in all_found])
def test_what_fuzzing_found_stays_mended(name, found):
    PARSERS[name].one(found)


def test_a_parser_that_raises_another_thing_is_seen():
    with pytest.raises(ZeroDivisionError):
        of_file("a", lambda path: 1 // 0)(b"")
