"""Any command with a small network, for a launcher or a bench to start."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from fastrot.cli import main  # noqa: E402  # where it lies is known by now
from workers import narrow  # noqa: E402

narrow.turn_on()
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
