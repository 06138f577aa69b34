"""Chaos: strikes at any instant, damage between them; the end is that of the undisturbed run, bit for bit."""

import pytest

from chaos.strikes import ALWAYS, small_disk
from chaos.sweep import make_place, sweeps
from workers.old_bugs import BUGS


class Found(Exception):
    pass


# what a bug needs beside the strikes that always may be
NEEDS = {"nobody waits in vain": {"rank stalls": 9.0}, "half lines stay": {"disk full": 9.0}}


FEW = {"kill -9 of all": 2.0, "kill -9 inside a write": 2.0, "stop asked of the launcher": 1.0}


@pytest.mark.parametrize("seed, strikes, kinds", [(6, 3, FEW), pytest.param(2, 30, ALWAYS, marks=pytest.mark.slow)])
def test_struck_and_damaged_at_any_time_it_ends_as_if_nothing_had_been(tmp_path, seed, strikes, kinds):
    """In seed 6 one rank, which costs the least; `make chaos` has the many."""
    lines: list[dict] = []
    (tmp_path / "small").mkdir()
    found = sweeps(make_place(tmp_path, tmp_path / "small"), seed, strikes, 10, kinds, lines.append)
    print(*lines, sep="\n")
    assert not found
    assert sum(bool(line.get("struck")) for line in lines if "start" in line) >= strikes
    assert all(line["ids"] == 240 and not line["repeated"] and not line["missing"] for line in lines if "ids" in line)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_sweep_finds_an_old_bug(tmp_path, bug):
    def write(line):
        print(line)
        if "found" in line:
            raise Found

    with small_disk(tmp_path / "small") as small, pytest.raises(Found):
        ranks = (2,) if bug == "nobody waits in vain" else (1,)
        sweeps(make_place(tmp_path, small, bug, ranks), 3, 60, 10, ALWAYS | NEEDS.get(bug, {}), write)
