"""What the page says of the weights themselves: how they came about, what to beware of, and the verdict."""

from collections import Counter
from typing import Any

import numpy as np
import yaml

from fastrot import terminal
from fastrot.models.backbone import Origin, pretraining, training_log
from fastrot.models.resnet import TURNS
from fastrot.report.probe_sets import SEED
from fastrot.report.rotation import Told
from fastrot.report.significance import ALPHA
from fastrot.report.tables import Table

_PUBLISHED_ARCH = "resnet50"


def rotation_log(origin: Origin) -> list[dict[str, Any]]:
    """The log of the pretraining up to the checkpoint; none where the weights learnt something else since."""
    return [] if "backbone" in pretraining(origin).get("state", {}).get("defining", {}) else training_log(origin)


def facts(origin: Origin, log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(name, value) for the head of the page."""
    known = pretraining(origin)
    rows = [("architecture", origin.arch), ("checkpoint", str(origin.path))]
    if "environment" in known:
        data, env = known["environment"]["data"], known["environment"]
        rows.append(("learnt from", f"{data['rows']:,} images, content {data['content'][:12]}"))
        rows.append(("machine", f"{', '.join(env['gpus']) or str(env['cores']) + ' CPU cores'}, ranks: {env['ranks']}"))
        if torch := env.get("versions", {}).get("torch"):
            rows.append(("versions", f"fastrot {env['versions'].get('fastrot')}, torch {torch}"))
    if "config" in known:
        rows += _of_config(yaml.safe_load(known["config"]))
    if "state" in known:
        rows += _of_state(known["state"], known.get("environment", {}))
    rows += _of_log(log)
    return [*rows, ("control", f"the same network with random weights, seed {SEED}")]


def _of_config(config: dict[str, Any]) -> list[tuple[str, str]]:
    data, optim = config["data"], config["optim"]
    return [
        ("data", f"{data['train']}; held out: {data['val'] or 'none'}"),
        ("crop", f"{data['crop']} pixels"),
        ("batch", f"{optim['images_per_step']:,} images, {config['rotation']['views']} turns of each"),
        ("precision", config["engine"]["precision"]),
        ("seed", str(config["run"]["seed"])),
    ]


def _of_state(state: dict[str, Any], environment: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("steps", f"{state['step']:,}, {state['position']:,} images shown")]
    if environment:
        rows.append(("epochs", f"{state['position'] / environment['data']['rows']:.3g}"))
    return rows


def _of_log(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    timed = [line for line in log if "step_s" in line]
    rows = []
    if timed:
        steps = np.diff([line["step"] for line in timed], prepend=-1)
        seconds = float((steps * [line["step_s"] for line in timed]).sum())
        rows.append(("time", f"{terminal.duration(seconds)} of training steps, from the log"))
    for name, key, says in (
        ("throughput", "views_per_s", "{:,.1f} views/s, median of the log"),
        ("waiting for data", "wait_share", "{:.2%} of a step, median of the log"),
    ):
        values = [line[key] for line in log if key in line]
        if values:
            rows.append((name, says.format(np.median(values))))
    return rows


def warnings(origin: Origin) -> list[str]:
    """What keeps a reader from comparing with the published figures."""
    out = []
    if origin.arch != _PUBLISHED_ARCH:
        out.append(
            f"The published figures are ResNet-50's; this backbone is {origin.arch.replace('resnet', 'ResNet-')}."
        )
    if origin.run is None:
        out.append("The weights come from a file without its run: how they were trained is not known.")
    return out


def verdict(tables: list[Table], told: Told | None) -> str:
    """The page in a sentence or two."""
    said = Counter(table.best.verdict for table in tables)
    better, worse, n = said["better"], said["worse"], len(tables)
    if not n:
        out = "Nothing was probed: no set of the suite is here."
    else:
        helps = "helps" if better > worse else "hurts" if worse > better else "makes no clear difference"
        out = (
            f"Pretraining {helps}: by the best row of each of {n} tables, the pretrained network is better than the "
            f"same network with random weights in {better}, worse in {worse}, and not to be told apart in "
            f"{said['same']} (p < {ALPHA:g} counts as a difference)."
        )
    if told:
        figure = told.overall
        out += (
            f" It names the turn of {figure.value:.1f} % of held-out views "
            f"(95 %: {figure.low:.1f} to {figure.high:.1f}; chance {100 / TURNS:.0f} %)."
        )
    return out
