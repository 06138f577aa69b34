"""The house: imports run one way, and no module hides one of the standard library."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT


def test_imports_run_down_the_house():
    command = [str(Path(sys.executable).parent / "lint-imports")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_bears_a_name_of_the_standard_library():
    """`deepspeed fastrot/train.py` puts fastrot/ first on the path."""
    names = {path.stem for path in (ROOT / "fastrot").iterdir()}
    assert not names & set(sys.stdlib_module_names)


def test_the_plan_imports_without_torch():
    code = "import sys, fastrot.data.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_the_gpus_tests_are_found_where_other_packages_are_missing():
    missing = ("simplejpeg", "nvidia.dali", "ffcv", "importlinter", "deepspeed")
    code = f"import sys, pytest; sys.modules |= dict.fromkeys({missing}); "
    code += "sys.exit(pytest.main(['-m', 'gpu', '--collect-only', 'tests']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "tests/engine/test_no_sync.py" in done.stdout
