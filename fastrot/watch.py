"""The launchers above this process: a killed one leaves no orphans."""

import os
import threading
import time
from pathlib import Path

from fastrot.errors import Fault


def _python_ancestors() -> list[tuple[int, str]]:
    """(pid, start time) of the launchers above us: the unbroken line of Python processes."""
    line, pid = [], os.getppid()
    while pid > 1:
        try:
            name, rest = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(") ", 1)
            cmdline = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
        except (OSError, IndexError, ValueError):
            break
        if b"python" not in os.path.basename(cmdline) and "python" not in name:
            break
        fields = rest.split()
        line.append((pid, fields[19]))
        pid = int(fields[1])
    return line


def die_with_launcher() -> None:
    """End this process when a launcher above it is gone: a killed launcher leaves no orphans."""
    watched = _python_ancestors()

    def watch() -> None:
        while True:
            time.sleep(1)
            for pid, started in watched:
                try:
                    stat = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
                except OSError:
                    os._exit(Fault.exit_code)
                if stat[19] != started or stat[0] == "Z":
                    os._exit(Fault.exit_code)

    if watched:
        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
