"""One bundle beside another: the ratio of medians with its interval, or why there is none."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fastrot.errors import UserError

_DRAWS = 10_000
_SAME = ("format", "inputs")  # of two bundles that measure the same thing


def interval(paces: list[float]) -> tuple[float, float]:
    """95% of the median, by the bootstrap over rounds."""
    drawn = _medians(paces, 0)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def _medians(paces: list[float], seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    draw = np.random.default_rng(seed)
    out: np.ndarray[Any, np.dtype[np.float64]] = np.median(draw.choice(paces, (_DRAWS, len(paces))), 1)
    return out


def read(path: Path) -> dict[str, Any]:
    """A bundle. Raises UserError where the file is not one."""
    try:
        bundle = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (RecursionError, ValueError):
        bundle = None
    if not isinstance(bundle, dict) or not {"rounds", "figures", *_SAME} <= bundle.keys():
        raise UserError(f"{path}: no bundle of fastrot bench --out")
    return bundle


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Of each arm that both have, how many times the old one's speed the new one's is, with its 95% interval.

    `differs` names what else the two differ in. Raises UserError where they did not read the same images.
    """
    for key in _SAME:
        if old[key] != new[key]:
            raise UserError(f"cannot be compared: {key} differ: {old[key]} and {new[key]}")
    ratios = {}
    befores, afters = (by_arm(bundle["rounds"]) for bundle in (old, new))
    for name in befores.keys() & afters.keys():
        before, after = befores[name], afters[name]
        drawn = _medians(after, 1) / _medians(before, 2)
        ratio = float(np.median(after) / np.median(before))
        low, high = (float(one) for one in np.quantile(drawn, (0.025, 0.975)))
        if old["figures"][name]["unit"] == "s":  # less is faster
            ratio, low, high = 1 / ratio, 1 / high, 1 / low
        ratios[name] = {"ratio": ratio, "interval": (low, high)}
    alone = sorted(old["figures"].keys() ^ new["figures"].keys())
    return {"ratios": dict(sorted(ratios.items())), "in_one_alone": alone, "differs": dict(_differences(old, new))}


def by_arm(rounds: list[dict[str, Any]]) -> dict[str, list[float]]:
    """{"part: arm": the median of each round's laps}."""
    out: dict[str, list[float]] = {}
    for one in rounds:
        out.setdefault(f"{one['part']}: {one['arm']}", []).append(float(np.median(one["laps"])))
    return out


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any]]:
    kept = ("platform", "cores", "gpus", "python", "versions", "commit", "nvidia_smi")
    pairs = [(key, old["environment"].get(key), new["environment"].get(key)) for key in kept]
    pairs += [(key, old["config"].get(key), new["config"].get(key)) for key in sorted({*old["config"], *new["config"]})]
    return [(key, [a, b]) for key, a, b in pairs if a != b and key != "data.train"]


def says(ratio: float, low: float, high: float) -> str:
    """In words: what was shown, and what was not."""
    if low <= 1 <= high:
        return f"{ratio:.3f} times ({low:.3f} to {high:.3f}): no difference was shown"
    return f"{ratio:.3f} times ({low:.3f} to {high:.3f}): {'faster' if low > 1 else 'slower'}"
