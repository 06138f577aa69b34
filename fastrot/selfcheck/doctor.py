"""`fastrot doctor`: what is missing on a machine, what is slow, and the command that mends each."""

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from fastrot import machine
from fastrot.config import Config
from fastrot.distributed import Ranks, of_all
from fastrot.errors import Fault, UserError

# the worst first: what was asked for cannot be; what may be wanted is not there; what makes it slow or may end it
BROKEN, MISSING, SLOW, LOW, FINE = STATES = ("broken", "missing", "slow", "low", "fine")
_SKEW_S = 1.0  # between clocks: file times and logs of hosts are compared to the second
_ROUNDS = 9


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, how it stands (of STATES), what was found, and what mends it."""

    what: str
    state: str
    says: str
    cure: str = ""


Look = Callable[[Config, Ranks], Iterator[Check]]


def examine(config: Config, ranks: Ranks | None) -> dict[str, Any]:
    """All checks of this host, and of the others where a launcher has started ranks, the worst first. Collective."""
    ranks = ranks or Ranks(0, 1, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    checks = _of_this_host(config, ranks) if ranks.local_rank == 0 else []
    if ranks.world > 1:
        checks = _of_all(checks, ranks)
    checks.sort(key=lambda one: STATES.index(one.state))
    facts = machine.environment(f"{ranks.world} on {ranks.device.type}")
    return {"sound": all(one.state != BROKEN for one in checks), "checks": [asdict(one) for one in checks], **facts}


def _of_this_host(config: Config, ranks: Ranks) -> list[Check]:
    from fastrot.selfcheck import disks, limits, software

    looks: tuple[Look, ...] = (*software.LOOKS, *limits.LOOKS, *disks.LOOKS)
    return [check for look in looks for check in _guarded(look, config, ranks)]


def _guarded(look: Look, config: Config, ranks: Ranks) -> Iterator[Check]:
    """A look that cannot be made is a row too: the others are what a person is waiting for."""
    try:
        yield from look(config, ranks)
    except (UserError, Fault) as error:
        yield Check(look.__name__.replace("_", " "), BROKEN, str(error))
    except (OSError, ValueError, RuntimeError) as error:
        yield Check(look.__name__.replace("_", " "), BROKEN, f"cannot be looked at: {type(error).__name__}: {error}")


def _of_all(checks: list[Check], ranks: Ranks) -> list[Check]:
    """The checks of every host, those that all have alike once; and the clocks."""
    mine = (socket.gethostname(), checks) if ranks.local_rank == 0 else None
    hosts = [one for one in of_all(ranks, mine) if one]
    merged: dict[Check, list[str]] = {}
    for host, found in hosts:
        for check in found:
            merged.setdefault(check, []).append(host)
    rows = [
        check if len(names) == len(hosts) else replace(check, what=f"{check.what} on {', '.join(names)}")
        for check, names in merged.items()
    ]
    return [*rows, _clocks(ranks)]


def _clocks(ranks: Ranks) -> Check:
    """How far the ranks' clocks lie apart: each looks at its own as a barrier opens, several times."""
    offsets = []
    for _ in range(_ROUNDS):
        dist.barrier()
        times = of_all(ranks, (socket.gethostname(), time.time()))
        offsets.append([seen - times[0][1] for _, seen in times])
    middle = [sorted(of_rank)[_ROUNDS // 2] for of_rank in zip(*offsets, strict=True)]
    last, first = max(range(ranks.world), key=middle.__getitem__), min(range(ranks.world), key=middle.__getitem__)
    apart = middle[last] - middle[first]
    says = f"{ranks.world} ranks' clocks lie within {apart:.3f} s"
    if apart < _SKEW_S:
        return Check("clocks", FINE, says)
    names = f"{times[last][0]} (rank {last}) is ahead of {times[first][0]} (rank {first})"
    return Check("clocks", SLOW, f"{says}; {names}", "on each host: chronyc makestep, or timedatectl set-ntp true")
