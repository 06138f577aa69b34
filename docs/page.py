"""python docs/page.py: draws docs/page.png, the picture of a benchmark page, from `make demo`'s run and its drawn scenes.

Needs Chromium, which shows the page, and runs/demo.
"""

import subprocess
from pathlib import Path

from PIL import Image

from fastrot.cli import main as fastrot

SUITE = """
sets:
  - name: demo
    title: Drawn scenes of nine kinds
    train: runs/demo-data/train
    test: runs/demo-data/val
    taps: [feature3, feature4, feature5, avg]
    pool: adaptive
    overrides: [data.crop=64]
    probes: [knn, linear]
    note: 4,000 scenes to fit, 400 to judge by.
"""
OUT, WIDTH, HEIGHT = Path("runs/demo-page"), 1000, 470


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "suite.yaml").write_text(SUITE)
    words = ["page", "--checkpoint", "runs/demo", "--suite", str(OUT / "suite.yaml"), "--out", str(OUT / "page")]
    assert fastrot(words) == 0
    shot, page = OUT / "shot.png", (OUT / "page" / "page.html").resolve().as_uri()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
    subprocess.run(["chromium", *flags, f"--screenshot={shot}", page], check=True, capture_output=True)
    Image.open(shot).convert("RGB").quantize(64).save(Path(__file__).parent / "page.png", optimize=True)


if __name__ == "__main__":
    main()
