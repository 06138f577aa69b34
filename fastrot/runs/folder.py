"""A run's folder as it lies there, read without a lock: whoever writes it is not disturbed."""

import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrot.runs.log import read_status


def is_run(folder: Path) -> bool:
    """Whether a training has begun there."""
    return ((folder / "config.yaml").is_file() and (folder / "STATUS.json").exists()) or (
        folder / "checkpoints"
    ).is_dir()


def state(folder: Path) -> str:
    """STATUS.json's: running, done, stopped, failed; `killed` where it says running and the process is gone; else "".

    A process of another host is believed to run.
    """
    status = read_status(folder)
    said = str(status.get("state", ""))
    if said != "running" or status.get("host") != socket.gethostname():
        return said
    return said if _holds(status.get("pid"), folder / ".lock") else "killed"


def _holds(pid: Any, lock: Path) -> bool:
    """Whether a process of this host has a file open; of another user's process, whether it is there."""
    if not isinstance(pid, int):
        return False
    try:
        handles = list(Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        return True
    except OSError:
        return False
    for handle in handles:
        with suppress(OSError):
            if os.path.samefile(handle, lock):
                return True
    return False


@dataclass(frozen=True)
class Lines:
    """metrics.jsonl. lines: those that can be read; wrong: what is wrong, by line from 1; half: whether it ends in half
    a line, as a kill leaves it and a reader meets it."""

    lines: list[dict[str, Any]]
    wrong: dict[int, str]
    half: bool


def read_lines(path: Path) -> Lines:
    """Raises OSError."""
    text = path.read_bytes()
    whole = text.splitlines()
    half = bool(whole) and not text.endswith(b"\n")
    lines, wrong = [], {}
    for number, line in enumerate(whole[:-1] if half else whole, 1):
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError("no JSON object")
            lines.append(found)
        except (ValueError, RecursionError) as error:
            wrong[number] = str(error)
    return Lines(lines, wrong, half)
