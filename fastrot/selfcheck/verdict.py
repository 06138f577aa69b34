"""Which switches pay on this card: a pure function of the step's arms; and the config that sets them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fastrot import config as configs
from fastrot.selfcheck.place import CHECKOUT

# A switch of bench/step.py that leaves the recipe and is a key of the section engine; and what it is when not turned.
SWITCHES: dict[str, Any] = {
    "channels_last": True, "compile": False, "norm": "torch", "stem_channels": 3, "cuda_graphs": False,
    "recompute": False, "symmetric_memory": False,
}  # fmt: skip
TO_PROVE = {"cuda_graphs=collectives", "symmetric_memory=true"}  # over ranks
NOISE = 0.01  # more switches must give more to pay


@dataclass(frozen=True)
class Arm:
    """name: its switches, as in `norm=fused cuda_graphs=true`. speed: as a multiple of base's, by medians; least: its
    slowest round's over base's fastest. equal: whether it learns what base learns, by its losses and first gradient."""

    name: str
    speed: float
    least: float
    equal: bool

    @property
    def switches(self) -> dict[str, Any] | None:
        """{} of base; None where it turns what is no switch of ours, or changes the recipe."""
        words = [] if self.name == "base" else self.name.split()
        turned = dict(word.partition("=")[::2] for word in words)
        return {k: yaml.safe_load(v) for k, v in turned.items()} if turned.keys() <= SWITCHES.keys() else None


BASE = Arm("base", 1.0, 1.0, True)


def choose(arms: Sequence[Arm]) -> Arm:
    """The arm of the fewest switches among those about as fast as the fastest; base where none is faster in every
    round. Never one that is slower than base or not equal to it."""
    able = [BASE, *(arm for arm in arms if arm.equal and arm.switches and arm.speed >= arm.least > 1)]
    near = [arm for arm in able if arm.speed >= max(one.speed for one in able) * (1 - NOISE)]
    return min(near, key=lambda arm: (len(arm.switches or {}), -arm.speed))


def arms_of(result: dict[str, Any]) -> list[Arm]:
    """The arms of bench/step.py's result. It keeps figures of equal ones alone; the others are `missing`."""
    arms = []
    for name, line in result.get("switches", {}).items():
        if name != "base":
            step, base, speed = line["step"], line["base_step"], line["times_base"]
            least = speed * step["median_s"] / step["most_s"] * base["least_s"] / base["median_s"]
            arms.append(Arm(name, speed, least, name not in result.get("missing", {})))
    return arms


def over_ranks(raw: dict[str, Any]) -> tuple[dict[str, Any], Arm] | None:
    """Of the part `ranks`: the result over the most GPUs and images, and the arm that pays there, of those by whose ways
    over ranks a training too has learnt what it does without."""
    results = raw.get("measured", [])
    if not results:
        return None
    widest = max(results, key=lambda one: (one["ranks"], one["images"]))
    proven = [set(), *map(set, raw.get("proven", []))]
    return widest, choose([arm for arm in arms_of(widest) if TO_PROVE & set(arm.name.split()) in proven])


def engine_keys(arm: Arm) -> dict[str, Any]:
    """Every switch of the section engine, turned or not."""
    return SWITCHES | (arm.switches or {})


def fast_config(arm: Arm, device: str, images: int) -> str:
    """configs/in1k_fast.yaml with the arm's switches, as YAML. device: where they pay; images: that a card holds at
    once."""
    keys = engine_keys(arm)
    if keys["cuda_graphs"] is True:
        keys["cuda_graphs"] = "auto"  # over several ranks only without norms to synchronise
    overrides = [f"engine.{key}={yaml.safe_dump(value).split()[0]}" for key, value in keys.items()]
    overrides.append(f"engine.images_per_micro_step={images}")
    config, sources = configs.load(str(CHECKOUT / "configs" / "in1k_fast.yaml"), overrides)
    tree: dict[str, dict[str, Any]] = {}
    for key, value in configs.flat(config).items():
        if sources[key] != "default":
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = list(value) if isinstance(value, tuple) else value
    says = f"# configs/in1k_fast.yaml with the switches that pay on {device}: {arm.name}, {arm.speed:.2f} times base.\n"
    return says + yaml.safe_dump(tree, sort_keys=False)
