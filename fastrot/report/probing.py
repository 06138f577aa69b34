"""`fastrot svm`, `lowshot`, `knn` and `linear --features`: feature stores in, a table and a JSON file out."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastrot import machine, terminal
from fastrot.errors import UserError
from fastrot.features.read import FeatureStore, open_store
from fastrot.files import write_text
from fastrot.probes import lowshot
from fastrot.probes.linear import DECAYS, HELD_OUT, RATES, linear
from fastrot.probes.neighbours import ranks
from fastrot.probes.svm import COSTS, voc_svm

_CHECKED_ROWS = 8192  # read at once to look whether they are finite


def svm(train: FeatureStore, test: FeatureStore, layers: list[str], device: str) -> dict[str, Any]:
    """VOC07's SVM a layer: AP in percent, a class and its cost, timings."""
    _expect(train, test, 2, "class matrices [N, classes] of 1, 0 and -1")

    def one(layer: str) -> dict[str, Any]:
        r = voc_svm(
            train.features[layer], train.labels, test.features[layer], test.labels, COSTS, device, terminal.track
        )
        return {
            "average_precision": r.average_precision,
            "eleven_point": r.eleven_point,
            "per_class": [100 * v for v in r.per_class],
            "eleven_point_per_class": [100 * v for v in r.eleven_point_per_class],
            "costs": r.costs,
            "cross_validation": r.cross_validation,
            "error": r.error,
            "fits": r.fits,
        }

    result = _layers(train, test, layers, one) | {"cost_grid": COSTS}
    best = max(layers, key=lambda layer: result["layers"][layer]["average_precision"])
    rows = [
        (layer, f"{r['average_precision']:.2f}  11-point {r['eleven_point']:.2f}  {terminal.duration(r['seconds'])}")
        for layer, r in result["layers"].items()
    ]
    left_out = [c for c, v in enumerate(result["layers"][best]["per_class"]) if math.isnan(v)]
    if left_out:
        names = [train.classes[c] if train.classes else str(c) for c in left_out]
        rows.append(("left out: no image of it in train or test", ", ".join(names)))
    terminal.table("VOC07 SVM, mean AP (%)", [*rows, ("best layer", best)])
    return result | {"best_layer": best, "left_out": left_out}


def low_shot(
    train: FeatureStore,
    test: FeatureStore,
    layers: list[str],
    device: str,
    ks: list[int],
    seed: int,
    draws: str | None,
) -> dict[str, Any]:
    """Low-shot SVMs a layer: a k by the oracle's cost, and by a cost chosen without the test set.

    draws  a folder of published targets instead of the seeded draws.
    """
    _expect(train, test, 2, "class matrices [N, classes] of 1, 0 and -1")
    labels = np.asarray(train.labels)
    if draws and not Path(draws).is_dir():
        raise UserError(f"--draws {draws}: no such folder; expected train_targets_sample1_k1.npy and so on")

    def targets(sample: int, k: int) -> NDArray[np.int8] | None:
        if draws:
            return lowshot.published_targets(Path(draws), sample, k, labels.shape)
        return lowshot.drawn_targets(labels, sample, k, seed)

    def one(layer: str) -> dict[str, Any]:
        results, left_out = lowshot.low_shot(
            train.features[layer],
            labels,
            test.features[layer],
            test.labels,
            targets,
            ks,
            device=device,
            track=terminal.track,
        )
        by_k = {
            r.k: {
                "oracle": {"cost": r.oracle_cost, **_spread(r.test[:, r.test.mean(0).argmax()])},
                "cross_validated": _spread(r.cross_validated),
                "cross_validated_costs": r.chosen,
                "by_cost": [{"cost": c, **_spread(r.test[:, i])} for i, c in enumerate(COSTS)],
                "error": r.error,
            }
            for r in results
        }
        return {"k": by_k, "left_out": left_out}

    result = _layers(train, test, layers, one)
    for layer, r in result["layers"].items():
        rows = [
            (
                f"k = {k}",
                f"{v['oracle']['mean']:.2f} ± {v['oracle']['std']:.2f} at the test set's best cost "
                f"{v['oracle']['cost']:.3g} (oracle);  {v['cross_validated']['mean']:.2f} ± "
                f"{v['cross_validated']['std']:.2f} cross-validated",
            )
            for k, v in r["k"].items()
        ]
        rows += [(f"k = {k}", "left out: cannot be drawn for every class") for k in r["left_out"]]
        terminal.table(f"low-shot SVM, {layer}, mean AP (%) of {lowshot.SAMPLES} draws", rows)
    return result | {"seed": None if draws else seed, "draws": draws}


def nearest(train: FeatureStore, test: FeatureStore, layers: list[str], device: str, ks: list[int]) -> dict[str, Any]:
    """Weighted k-NN a layer: top-1 and top-5 in percent for each k."""
    _expect(train, test, 1, "one label a row, int [N]")

    def one(layer: str) -> dict[str, Any]:
        found = ranks(
            train.features[layer],
            train.labels,
            test.features[layer],
            test.labels,
            ks,
            device=device,
            track=terminal.track,
        )
        return {"k": {k: _accuracy(one) for k, one in zip(ks, found, strict=True)}}

    result = _layers(train, test, layers, one)
    rows = [
        (f"{layer}, k = {k}", f"top-1 {v['top1']:.2f}  top-5 {v['top5']:.2f}")
        for layer, r in result["layers"].items()
        for k, v in r["k"].items()
    ]
    terminal.table("k-NN accuracy (%)", rows)
    return result


def linear_grid(train: FeatureStore, test: FeatureStore, layers: list[str], device: str, epochs: int) -> dict[str, Any]:
    """Linear classifiers on stored features: top-1 and top-5 in percent of the grid's choice a layer."""
    _expect(train, test, 1, "one label a row, int [N]")

    def one(layer: str) -> dict[str, Any]:
        r = linear(
            train.features[layer],
            train.labels,
            test.features[layer],
            test.labels,
            epochs=epochs,
            device=device,
            track=terminal.track,
        )
        return vars(r) | {"right": _marks(r.right)}

    result = _layers(train, test, layers, one)
    rows = [
        (layer, f"top-1 {r['top1']:.2f}  top-5 {r['top5']:.2f}  at rate {r['rate']:g}, decay {r['decay']:g}")
        for layer, r in result["layers"].items()
    ]
    note = f"on stored features, rate and decay by one training row in {HELD_OUT}; not the protocol's augmented heads"
    terminal.table("linear classifiers, accuracy (%)", [*rows, ("", note)])
    return result | {"epochs": epochs, "rates": RATES, "decays": DECAYS, "protocol": False, "note": note}


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "svm": svm,
    "lowshot": low_shot,
    "knn": nearest,
    "linear": linear_grid,
}


def run(
    probe: Callable[..., dict[str, Any]],
    train: str,
    test: str,
    layers: str | None,
    out: str | None,
    device: str,
    **options: Any,
) -> dict[str, Any]:
    """Open the stores, run a probe on the layers asked for (all of them by default), write `out`; the result."""
    if out and not Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {Path(out).parent} is not there; create it first")
    if out and Path(out).is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    stores = open_store(train), open_store(test)
    if all(store.classes for store in stores) and stores[0].classes != stores[1].classes:
        raise UserError(f"{train} and {test}: their manifests name other classes, whose numbers mean different things")
    shared = [tap for tap in stores[0].features if tap in stores[1].features]
    wanted = layers.split(",") if layers else shared
    for layer in wanted:
        if layer not in shared:
            raise UserError(f"--layers {layer}: not in both stores, which have {', '.join(shared) or 'none in common'}")
    for layer in wanted:
        train_d, test_d = (store.features[layer].shape[1] for store in stores)
        if train_d != test_d:
            raise UserError(f"{layer}: {train_d} features a row in {train}, {test_d} in {test}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA device here")
    _expect_finite(stores, wanted)
    found = probe(*stores, wanted, device, **options)
    result: dict[str, Any] = _plain(found | machine.environment("no ranks") | {"device": device})
    if out:
        write_text(Path(out), json.dumps(result, indent=1) + "\n")
    return result


def _layers(
    train: FeatureStore, test: FeatureStore, layers: list[str], one: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    results = {}
    for layer in layers:
        started = time.perf_counter()
        results[layer] = one(layer)
        results[layer]["seconds"] = time.perf_counter() - started
    rows = {"train_rows": len(train.labels), "test_rows": len(test.labels)}
    return {"train": str(train.folder), "test": str(test.folder), **rows, "classes": train.classes, "layers": results}


def _expect_finite(stores: tuple[FeatureStore, ...], layers: list[str]) -> None:
    """Raise UserError for the first row that no probe can use: one would give a figure all the same."""
    blocks = [(s, layer, at) for s in stores for layer in layers for at in range(0, len(s.labels), _CHECKED_ROWS)]
    for store, layer, at in terminal.track(blocks, len(blocks), "looking for rows that are not finite"):
        finite = np.isfinite(store.features[layer][at : at + _CHECKED_ROWS]).all(1)
        if not finite.all():
            raise UserError(
                f"{store.folder / layer}.npy: row {at + int(finite.argmin())} is not finite; "
                "make the features again (float16 holds no more than 65,504)"
            )


def _expect(train: FeatureStore, test: FeatureStore, axes: int, what: str) -> None:
    for store in (train, test):
        if store.labels.ndim != axes:
            raise UserError(f"{store.folder}/labels.npy: expected {what}, found shape {list(store.labels.shape)}")
        none = int((np.asarray(store.labels) < 0).sum()) if axes == 1 else 0
        if none:
            raise UserError(
                f"{store.folder}: {none:,} of {len(store.labels):,} rows have no label, and this probe needs them"
            )
    if train.labels.shape[1:] != test.labels.shape[1:]:
        raise UserError(f"{train.labels.shape[1]} classes in {train.folder}, {test.labels.shape[1]} in {test.folder}")


def _accuracy(places: NDArray[np.int64]) -> dict[str, float | str]:
    """top-1 and top-5 in percent, and which images top-1 has right, from each image's place of its own class."""
    return {"top1": 100 * (places < 1).mean(), "top5": 100 * (places < 5).mean(), "right": _marks(places < 1)}


def _marks(right: NDArray[np.bool_]) -> str:
    """A character an image, in the store's order: 1 where it is right, else 0. What a paired test needs."""
    return "".join("01"[one] for one in right.tolist())


def _spread(values: NDArray[np.float64]) -> dict[str, Any]:
    return {"mean": values.mean(), "min": values.min(), "max": values.max(), "std": values.std(), "draws": values}


def _plain(value: Any) -> Any:
    """As JSON holds it: lists for arrays, null for nan."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else float(value)
    return int(value) if isinstance(value, np.integer) else value
