"""`fastrot` or a bench where there is no GPU, with CUDA graphs and symmetric memory played on the host: as the tests do."""

import sys
from contextlib import ExitStack
from importlib import import_module
from unittest import mock

from fastrot.selfcheck.place import CHECKOUT


def main(words: list[str]) -> int:
    """A command's words, or a script of bench/ and its words."""
    sys.path[:0] = [str(CHECKOUT / "tests"), str(CHECKOUT / "bench")]
    played, memory = import_module("workers.graphs").OnTheHost, import_module("workers.shared_memory").played
    with ExitStack() as stack:
        stack.enter_context(mock.patch("fastrot.engine.graphs.Capture", lambda device: played()))
        stack.enter_context(memory())
        for name in ("refuse_graphs", "refuse_symmetric_memory"):
            stack.enter_context(mock.patch(f"fastrot.runs.build.{name}", lambda *_: None))
        if not words[0].endswith(".py"):
            code: int = import_module("fastrot.cli").main(words)
            return code
        bench = import_module(words[0].rpartition("/")[2].removesuffix(".py"))
        # of its arms those that the compiler's graphs make stay the GPU's
        stack.enter_context(mock.patch.object(bench, "able", lambda switches, *_: not switches["compile"]))
        sys.argv = words
        bench.main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
