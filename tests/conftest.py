"""What tests share: small image folders, and running fastrot as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


def draw(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth RGB image with texture: gradients and a few soft blobs, so that resizing is well behaved."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    return Image.fromarray((127 + 90 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8))


def write_folder(root: Path, classes: int = 3, per_class: int = 4, side: int = 48) -> Path:
    """A folder of class folders with JPEGs of varied size."""
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            seed = label * per_class + i
            draw(side + 5 * (seed % 4), side + 7 * (seed % 3), seed).save(folder / f"{i}.jpg", quality=90)
    return root


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Manifests of tests go to a folder of their own; compiled operators stay in the user's cache."""
    from fastrot import distributed

    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(distributed.cache_folder() / "torch_extensions"))
    os.environ["FASTROT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def shared_data():
    """A function that gives a real data set's folder, or skips with the reason."""

    def find(name: str) -> Path:
        if not (SHARED / name).is_dir():
            pytest.skip(f"real images {name} are not beside this checkout")
        return SHARED / name

    return find


def fastrot(*words, ranks: int = 0, launcher: str = "torchrun", timeout: float = 300) -> subprocess.CompletedProcess:
    """Run `fastrot/train.py` (or, where the first word is `stream`, the CLI) as a user does.

    ranks 0: plain python; else that many ranks under torchrun or deepspeed.
    """
    words = [str(w) for w in words]
    if words[0] == "stream":
        command = [sys.executable, "-m", "fastrot.cli", *words]
    elif ranks and launcher == "deepspeed":
        command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", "0", "fastrot/train.py", *words]
    elif ranks:
        command = ["torchrun", "--standalone", "--nproc_per_node", str(ranks), "fastrot/train.py", *words]
    else:
        command = [sys.executable, "fastrot/train.py", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
