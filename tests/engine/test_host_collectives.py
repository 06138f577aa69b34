"""DeepSpeed's host collectives in our cache: no lock of torch's, no half-built entry stops a start."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastrot.engine import host_collectives
from fastrot.errors import UserError


class Builder:
    """DeepSpeed's, as far as it is asked; it compiles a module of Python."""

    NAME = name = "host_collectives_of_a_test"

    def __init__(self, error: Exception | None = None):
        self.error, self.compiled, self._loaded_ops = error, 0, {}

    def load(self, verbose: bool) -> None:
        import os

        if self.error:
            raise self.error
        self.compiled += 1
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / self.name
        folder.mkdir(parents=True)
        assert not (folder / "lock").exists(), "torch would wait for it"
        (folder / f"{self.name}.so").write_text("seven = 7\n")
        self._loaded_ops[self.name] = "by torch"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that loads the collectives as a start does: what DeepSpeed then finds, and how often it compiled."""
    import importlib.util
    from importlib.machinery import SourceFileLoader

    def spec(name, path):
        return importlib.util.spec_from_loader(name, SourceFileLoader(name, str(path)))

    fake = SimpleNamespace(__version__="0", ops=SimpleNamespace(__compatible_ops__={Builder.NAME: True}))

    def call(builder: Builder):
        accelerator = SimpleNamespace(
            get_accelerator=lambda: SimpleNamespace(create_op_builder=lambda name: builder), __name__="accelerator"
        )
        monkeypatch.setitem(sys.modules, "deepspeed", fake)
        monkeypatch.setitem(sys.modules, "deepspeed.accelerator", accelerator)
        host_collectives.load_host_collectives()
        return builder._loaded_ops[builder.name], builder.compiled

    monkeypatch.setattr(host_collectives.importlib.util, "spec_from_file_location", spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return call


def test_they_are_compiled_once_and_found_by_deepspeed(start):
    assert start(Builder()) == ("by torch", 1)
    found, compiled = start(Builder())
    assert found.seven == 7 and compiled == 0


def test_a_start_that_was_killed_while_torch_held_its_lock_stops_no_other(start, tmp_path):
    """What it leaves: a scratch folder with torch's lock; and, of before, the lock in torch's own folder."""
    for folder in (tmp_path / f"deepspeed-0/.{Builder.name}-there-7/{Builder.name}", tmp_path / Builder.name):
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    assert start(Builder()) == ("by torch", 1)
    assert not list((tmp_path / "deepspeed-0").glob(".*-there-7"))


def test_a_half_built_entry_is_built_again(start, tmp_path):
    entry = tmp_path / "deepspeed-0" / Builder.name
    entry.mkdir(parents=True)
    (entry / "shm.o").touch()
    assert start(Builder()) == ("by torch", 1)
    assert start(Builder())[1] == 0


def test_no_compiler_is_one_line(start):
    with pytest.raises(
        UserError, match=r"cannot be compiled \(no ninja\); install g\+\+ and ninja, or set engine.kind=plain"
    ):
        start(Builder(RuntimeError("no ninja\nand a page of its words")))
