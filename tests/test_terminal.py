"""Lines for a person, where no person is."""

import io
import sys

from fastrot import terminal


class Gone(io.StringIO):
    """A pipe whose reader has left, as when mpirun is killed."""

    def flush(self):
        raise BrokenPipeError


def test_a_reader_that_is_gone_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    console = terminal.console()
    console.print("a line")
    console.print("and another")
    assert console.quiet
