"""The Triton kernels on CPU tensors, through Triton's interpreter."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from conftest import ROOT

TESTS = Path(__file__).parent.parent
QUICK = {
    "kernels/test_rotate_views.py": 66,
    "kernels/test_norm.py": 25,
    "kernels/test_pointwise.py": 18,
    "kernels/test_pool.py": 9,
}
ALL = {
    "kernels/test_rotate_views.py": 132,
    "kernels/test_norm.py": 43,
    "kernels/test_pointwise.py": 43,
    "kernels/test_pool.py": 15,
    "models/test_fused_conv.py": 12,
    "models/test_fused_chain.py": 2,
}


def interpreted(report: Path, files, *words: str) -> Counter:
    """How many tests of each file passed, by a process of its own: TRITON_INTERPRET counts only before triton's import."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        *(str(TESTS / file) for file in files),
        "-k",
        "cpu-triton",
        *words,
        "--tb=short",
    ]
    command += ["-p", "no:cacheprovider", "--maxfail=5", f"--junitxml={report}"]
    paths = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment = os.environ | paths | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return Counter(
        case.get("classname").replace(".", "/").removeprefix("tests/") + ".py" for case in cases if not len(case)
    )


@pytest.mark.parametrize(
    "batteries, words",
    [
        (QUICK, ["-m", "not slow", "-p", "workers.interpreter"]),
        pytest.param(ALL, ["-m", "slow or not slow"], marks=pytest.mark.slow),  # the interpreter as it is
    ],
    ids=["quick", "all"],
)
def test_the_interpreted_kernels_pass_the_battery_of_every_backend(tmp_path, batteries, words):
    passed = interpreted(tmp_path / "report.xml", batteries, *words)
    assert all(passed[battery] >= least for battery, least in batteries.items()), passed
