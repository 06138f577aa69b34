"""Set-up of what is optional: installed where it can be, else one line."""

import shutil
import subprocess
import sys

from conftest import ROOT


def test_without_a_compiler_ffcv_is_left_out_in_one_line(tmp_path):
    """A path with neither g++ nor pkg-config, and no right to install them."""
    for tool in ("bash", "dirname", "tr"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    command = [str(tmp_path / "bash"), str(ROOT / "tools" / "install_ffcv.sh"), sys.executable]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("setup: no FFCV") and "g++" in line and "pkg-config" in line
