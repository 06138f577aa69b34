"""fastrot/train.py with a small network, for a launcher to start."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from workers import narrow  # noqa: E402  # where it lies is known by now

narrow.turn_on()
sys.path.pop(0)
runpy.run_path(str(ROOT / "fastrot" / "train.py"), run_name="__main__")
