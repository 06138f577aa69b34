"""The Triton kernels on CPU tensors, through Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest


@pytest.mark.parametrize(
    "battery, least",
    [
        ("test_rotate_views.py", 121),
        ("test_norm.py", 40),
        ("test_pointwise.py", 12),
        pytest.param("../test_fusedconv.py", 12, marks=pytest.mark.slow),
    ],
)
def test_the_interpreted_kernels_pass_the_battery_of_every_backend(tmp_path, battery, least):
    """A process of its own: TRITON_INTERPRET counts only before the first import of triton."""
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(Path(__file__).parent / battery),
        "-k",
        "cpu-triton",
        "-q",
        "--tb=short",
    ]
    command += ["-p", "no:cacheprovider", "--maxfail=5", f"--junitxml={report}"]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]

    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) >= least and int(suite.get("skipped")) == 0, done.stdout
