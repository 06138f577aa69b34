"""How much faster are the probes than scikit-learn and the usual script? Gate first: the same decisions, the same AP.

SVM   one VOC07 layer: 5,011 x 9,216 features, 20 classes, 19 costs, 3 folds and a refit. Ours is timed whole.
      scikit-learn's LinearSVC, as the protocol sets it, is timed on a sample: at every cost some fits of one fold,
      spread over the classes; its total is the sum over costs of the mean seconds a fit times the fits at that cost:
      1,520 as the published scripts do it (3 folds and all rows at each cost), and 1,160 if only the chosen cost
      is fitted on all rows.
k-NN  against scikit-learn's brute force and the loop of DINO's eval_knn.py.

Features are drawn: half-empty, correlated, unit rows, labels that they half explain.
"""

import argparse
import os
import time
import warnings

import harness
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from fastrot.probes.knn import knn
from fastrot.probes.precision import area_ap
from fastrot.probes.svm import COSTS, FOLDS, normalised, stratified_folds, voc_svm

CLASSES, TRAIN, TEST, FEATURES = 20, 5011, 4952, 9216


def features(rows: int, dims: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, dims] and int8 [rows, classes] of 1, 0 and -1: ReLU of 300 latent directions of falling strength."""
    rng = np.random.default_rng(seed)
    strength = (1 + np.arange(300)) ** -0.5
    hidden = (rng.standard_normal((rows, 300)) * strength).astype(np.float32)
    mixed = hidden @ rng.standard_normal((300, dims)).astype(np.float32) / np.linalg.norm(strength)
    x = np.maximum(mixed + 0.6 * rng.standard_normal((rows, dims)).astype(np.float32) - 0.3, 0)
    logits = hidden @ rng.standard_normal((300, classes))
    logits = logits / logits.std(0) + 0.7 * rng.standard_normal((rows, classes))
    shares = np.geomspace(0.04, 0.42, classes)  # VOC07's rarest class and its commonest
    y = logits > np.array([np.quantile(column, 1 - share) for column, share in zip(logits.T, shares, strict=True)])
    y = y.astype(np.int8)
    y[(y == 0) & (rng.random(y.shape) < 0.006)] = -1
    return x, y


def linear_svc(cost: float, **more) -> LinearSVC:
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, **more)


def svm(args) -> dict:
    rows = TRAIN // args.shrink, TEST // args.shrink
    x, y = features(sum(rows), FEATURES // args.shrink, CLASSES)
    train, test = slice(0, rows[0]), slice(rows[0], None)
    clock, cpu = time.perf_counter(), time.process_time()
    ours = voc_svm(x[train], y[train], x[test], y[test])
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    print(
        f"ours: {clock:.1f} s on the clock, {cpu:.1f} s of processor time, AP {ours.average_precision:.3f}", flush=True
    )

    unit, unit_test = (normalised(x[part]).numpy() for part in (train, test))
    labels = np.where(y[train] == 1, 1, -1)
    held_out = np.stack([stratified_folds(column == 1, FOLDS) for column in labels.T], 1)

    # the gate: a few classes at the chosen costs, LinearSVC run to convergence
    gaps = []
    for c in np.linspace(0, CLASSES - 1, args.gate_classes).astype(int):
        exact = linear_svc(ours.costs[c], tol=1e-7, max_iter=10**6, random_state=0).fit(unit, labels[:, c])
        kept = y[test, c] != -1
        gaps.append(abs(area_ap(y[test, c][kept] > 0, exact.decision_function(unit_test)[kept]) - ours.per_class[c]))
    print(f"gate: AP of converged LinearSVC differs by at most {100 * max(gaps):.4f} points", flush=True)
    harness.gate(100 * max(gaps) <= 0.01, "AP within 0.01 points of a converged LinearSVC")

    by_cost = []
    for cost in sorted(COSTS):
        fits = args.fits if cost <= 1 else args.costly_fits
        seconds, stopped = [], 0
        for i in range(fits):
            c, fold = (7 * i + 3) % CLASSES, i % FOLDS
            inside = held_out[:, c] != fold
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", ConvergenceWarning)
                model = linear_svc(cost, max_iter=2000, random_state=i)
                seconds.append(harness.clock(lambda m=model, c=c, r=inside: m.fit(unit[r], labels[r, c])))
            stopped += any(issubclass(w.category, ConvergenceWarning) for w in said)
        by_cost.append({"cost": cost, "fits": fits, "seconds_a_fit": float(np.mean(seconds)), "unconverged": stopped})
        print(f"LinearSVC at {cost:.3g}: {np.mean(seconds):.2f} s a fit, {stopped} of {fits} unconverged", flush=True)
    mean = {entry["cost"]: entry["seconds_a_fit"] for entry in by_cost}
    folds_only = CLASSES * FOLDS * sum(mean.values())
    every = folds_only + CLASSES * sum(mean.values())  # a refit taken at a fold's price, two thirds of the rows
    chosen = folds_only + sum(mean[cost] for cost in ours.costs)
    return {
        "rows": rows, "features": x.shape[1], "classes": CLASSES, "costs": len(COSTS),
        "ours_s": clock, "ours_processor_s": cpu, "ours_error": ours.error, "ours_products": ours.products,
        "gate_ap_points": 100 * max(gaps), "gate_classes": args.gate_classes,
        "linear_svc": by_cost,
        "linear_svc_1520_fits_s": every, "linear_svc_1160_fits_s": chosen,
        "ratio_1520": every / clock, "ratio_1160": chosen / clock,
    }  # fmt: skip


def dino(bank, bank_y, queries, query_y, k, classes):
    """The loop of DINO's eval_knn.py: queries in 100 chunks against the whole bank; top-1 in percent."""
    bank, queries = (torch.nn.functional.normalize(torch.from_numpy(a), dim=1) for a in (bank, queries))
    bank_y, query_y = torch.from_numpy(bank_y), torch.from_numpy(query_y)
    right, chunk = 0, max(1, len(queries) // 100)
    for at in range(0, len(queries), chunk):
        cosine, rows = (queries[at : at + chunk] @ bank.T).topk(k)
        near = bank_y[rows]
        one_hot = torch.zeros(near.numel(), classes).scatter_(1, near.view(-1, 1), 1)
        scores = (one_hot.view(len(near), k, classes) * (cosine / 0.07).exp()[..., None]).sum(1)
        right += int((scores.argmax(1) == query_y[at : at + chunk]).sum())
    return 100 * right / len(queries)


def neighbours(args) -> dict:
    bank_rows, query_rows, dims, classes, k = 50_000 // args.shrink, 5_000 // args.shrink, 2048 // args.shrink, 100, 20
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((classes, dims)).astype(np.float32)
    y = rng.integers(0, classes, bank_rows + query_rows)
    x = np.maximum(centres[y] + 4 * rng.standard_normal((len(y), dims), np.float32), 0)
    parts = x[:bank_rows], y[:bank_rows], x[bank_rows:], y[bank_rows:]

    def scikit():
        unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (parts[0], parts[2])]
        model = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
        return 100 * float((model.fit(unit[0], parts[1]).predict(unit[1]) == parts[3]).mean())

    def ours():
        return knn(*parts, ks=[k])[k][0]

    def loop():
        return dino(*parts, k, classes)

    top1 = {"ours": ours(), "scikit_learn": scikit(), "dino": loop()}
    harness.gate(max(top1.values()) - min(top1.values()) <= 0.05, f"the same top-1 {top1}")
    times = harness.alternating({"ours": ours, "scikit_learn": scikit, "dino": loop}, args.rounds, harness.clock)
    median = {name: entry["median_s"] for name, entry in times.items()}
    result = {"bank": bank_rows, "queries": query_rows, "features": dims, "k": k, "top1": top1, "times": times}
    result["ratio"] = {name: median[name] / median["ours"] for name in ("scikit_learn", "dino")}
    print("k-NN:", result, flush=True)
    return result


def main() -> None:
    parser = harness.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of rows and features: the script, not the figure"
    )
    parser.add_argument("--fits", type=int, default=3, help="LinearSVC fits timed at each cost up to 1")
    parser.add_argument("--costly-fits", type=int, default=1, help="and at 10 and 100, minutes each")
    parser.add_argument("--gate-classes", type=int, default=3)
    parser.add_argument("--only", choices=("svm", "knn"))
    args = parser.parse_args()
    args.shrink = 4 if args.quick else 1
    result = {"quick": args.quick, "machine": harness.facts()}
    if args.only != "knn":
        result["svm"] = svm(args)
    if args.only != "svm":
        result["knn"] = neighbours(args)
    result["machine"]["load_average_after"] = os.getloadavg()[0]
    harness.write(args.out, "How much faster are the probes than scikit-learn and the usual script?", result)
    if args.only != "knn":
        print(f"SVM: {result['svm']['ratio_1520']:.0f} x for 1,520 fits, {result['svm']['ratio_1160']:.0f} x for 1,160")


if __name__ == "__main__":
    main()
