"""Finds the command, runs it, says what went wrong."""

import argparse
import difflib
import json
import os
import sys
import time

from fastrot import __version__, launcher
from fastrot.commands import GROUPS, find
from fastrot.commands.base import Command, Result
from fastrot.errors import Fault, Stopped, Unsound, UserError, is_known, why_not_there

_OTHERS_WAIT_S = 5  # launchers end the other ranks within two


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 1 a check found damage, 2 the user's error, 3 a fault, 75 stopped as asked,
    130 Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    if not words:
        print(_overview(), file=sys.stderr)
        return UserError.exit_code
    if words[0] not in _names():
        return _without_command(words[0])
    command = find(words[0])
    # intermixed: overrides stand before, between and after options
    parser = command.parser()
    args, unknown = parser.parse_known_intermixed_args(words[1:])
    if unknown:
        parser.error(f"unknown option {' '.join(unknown)}")
    try:
        _run(command, args)
    except (UserError, Fault, Stopped, Unsound) as error:
        _complain(error)
        return error.exit_code
    except ModuleNotFoundError as error:
        if not is_known(error):
            raise
        _complain(f"{command.name}: {why_not_there(error)}")
        return UserError.exit_code
    except KeyboardInterrupt as stop:  # a run says in it what stands
        _complain("; ".join(["stopped by Ctrl-C", *map(str, stop.args)]))
        return 130
    return 0


def _run(command: Command, args: argparse.Namespace) -> None:
    launcher.settle(os.environ)
    try:
        result = command.run(args)
    except Unsound as error:
        _print_json(args, error.result)
        raise
    _print_json(args, result)


def _print_json(args: argparse.Namespace, result: Result | None) -> None:
    """What --json asks for, by rank 0."""
    if result is not None and args.json and os.environ.get("RANK", "0") == "0":
        from fastrot.files import finite  # with pydantic, which no --help waits for

        print(json.dumps(finite(result)), flush=True)


def _names() -> list[str]:
    return [name for names in GROUPS.values() for name in names]


def _without_command(word: str) -> int:
    if word in ("-h", "--help"):
        print(_overview())
        return 0
    if word == "--version":
        print(f"fastrot {__version__}")
        return 0
    near = difflib.get_close_matches(word, _names(), 1)
    hint = f"did you mean {near[0]}?" if near else "fastrot --help lists them"
    _complain(f"{word!r} is no command; {hint}")
    return UserError.exit_code


def _overview() -> str:
    """All commands, grouped, a line each."""
    lines = ["usage: fastrot COMMAND [options] [section.key=value ...]", ""]
    lines += ["Pretrain ResNets by predicting image rotations."]
    for group, names in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:10} {find(name).says}" for name in names)]
    lines += ["", "fastrot COMMAND --help   the command's options and an example", "fastrot --version"]
    return "\n".join(lines)


def _complain(error: UserError | Fault | Stopped | Unsound | str) -> None:
    """The error's lines. What all ranks found alike rank 0 says; the others wait, and speak only
    where no launcher has ended them by then: the error was theirs alone. A fault is said at once, a stop by rank 0."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, Stopped):
        return
    if rank != "0" and not isinstance(error, Fault):
        time.sleep(_OTHERS_WAIT_S)
    who = "fastrot" if rank == "0" else f"fastrot: rank {rank}"
    for line in str(error).splitlines():
        print(f"{who}: {line}", file=sys.stderr, flush=True)


def entry(argv: list[str] | None = None) -> None:
    """Run a command and leave. At once after a fault, since a stuck reader would hold up the exit; and under a
    launcher, where a library's thread that outlives the interpreter may abort a rank whose work is done."""
    if "RANK" in os.environ:
        from fastrot.watch import die_with_launcher  # with multiprocessing, which no --help waits for

        die_with_launcher()
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == Fault.exit_code or "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
