"""How much faster are the probes than scikit-learn and the usual scripts? Gates first: the same decisions and features.

svm       one VOC07 layer: 5,011 x 9,216 features, 20 classes, 19 costs, 3 folds and a refit. Ours is timed whole,
          the median of some runs.
          scikit-learn's LinearSVC, as the protocol sets it, is timed on a sample: at every cost some fits of one fold,
          spread over the classes; its total is the sum over costs of the mean seconds a fit times the fits there:
          "every" as the published scripts do it (3 folds and all rows at each cost: 1,520 for 20 classes), and "chosen"
          if only the chosen cost is fitted on all rows (1,160). Gates: decisions within 1e-3 and AP within 0.01 points
          of a LinearSVC run to convergence, for some classes at their chosen cost; at 10 and 100, on the sample's
          problems, an objective no higher than LIBLINEAR's.
low-shot  the same features, the protocol's eight k: 19 costs, 20 classes, 5 draws. Ours is timed as svm's, and also
          cross-validates. LinearSVC is timed at every cost for some classes, each of another draw, on all their rows
          and on one fold's; its total is their mean times classes and draws: as the published scripts do it, without
          cross-validation, and with it ("same fits"). Gate: mean AP of the first draw, at one cost, LinearSVC run to
          convergence.
knn       50,000 x 2,048 and 5,000 queries against scikit-learn's brute force and the loop of DINO's eval_knn.py.
features  `fastrot features` against DataLoader, hooks and np.save: five taps of a ResNet-50, the SVM's pictures, the
          same files (--data FOLDER). Gate: equal features.

The features of knn are drawn, and those of svm and low-shot but with --store, which takes them and the labels of
real images: half-empty, correlated, unit rows, labels that they half explain. Drawn ones are easy for LIBLINEAR.
Each part is written to --out as it ends, beside the parts that are there.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
from probes_arms import dino, features, hooked_dump, linear_svc, objective, scikit_knn, timed_fit

from fastrot.cli import main as fastrot
from fastrot.features.read import open_store
from fastrot.models.backbone import random_backbone
from fastrot.probes.kernel import Gram, gram
from fastrot.probes.lowshot import KS, SAMPLES, drawn_targets, low_shot
from fastrot.probes.neighbours import knn
from fastrot.probes.precision import area_ap
from fastrot.probes.svm import COSTS, FOLDS, POSITIVE_WEIGHT, normalised, path, stratified_folds, voc_svm

QUESTION = "How much faster are the probes than scikit-learn and the usual scripts?"
CLASSES, TRAIN, TEST, FEATURES = 20, 5011, 4952, 9216


def table(args) -> tuple[np.ndarray, np.ndarray, slice, slice]:
    """Features, labels int8 [rows, classes], and the rows of training and test."""
    if args.store:
        store = open_store(args.store)
        order = np.random.default_rng(0).permutation(len(store.labels))
        x = np.asarray(store.features[args.tap][order], np.float32)
        y = store.labels[order]
        if y.ndim == 1:
            y = (y[:, None] == np.arange(y.max() + 1)).astype(np.int8)
        return x, y, slice(0, TRAIN), slice(TRAIN, None)
    rows = TRAIN // args.shrink, TEST // args.shrink
    x, y = features(sum(rows), FEATURES // args.shrink, CLASSES)
    return x, y, slice(0, rows[0]), slice(rows[0], None)


def source(args) -> str:
    return f"{args.tap} of {Path(args.store).name}" if args.store else "drawn features"


def sampled(fit: int, classes: int) -> int:
    """The class of a timed LinearSVC fit: the first few are spread over the classes."""
    return (7 * fit + 3) % classes


def repeated(name: str, work, runs: int) -> tuple[object, dict]:
    """What the first run returns, and a result's entries: median seconds on the clock and of the processor."""
    outs, clocks, cpus = [], [], []
    for _ in range(runs):
        clock, cpu = time.perf_counter(), time.process_time()
        outs.append(work())
        clocks.append(time.perf_counter() - clock)
        cpus.append(time.process_time() - cpu)
    clock, cpu = float(np.median(clocks)), float(np.median(cpus))
    print(f"{name}: {clock:.1f} s of {np.round(clocks, 1)}, {cpu:.1f} s of the processor", flush=True)
    return outs[0], {"ours_s": clock, "ours_runs_s": clocks, "ours_processor_s": cpu}


def svm(args) -> dict:
    x, y, train, test = table(args)
    classes = y.shape[1]
    ours, taken = repeated("svm", lambda: voc_svm(x[train], y[train], x[test], y[test]), args.runs)
    unit, unit_test = (normalised(x[part]).numpy() for part in (train, test))
    labels = np.where(y[train] == 1, 1, -1)
    kernel = gram(torch.from_numpy(unit)[None])
    gates = converged_gate(args, ours, unit, labels, unit_test, y[test], kernel)

    held_out = np.stack([stratified_folds(column == 1, FOLDS) for column in labels.T], 1)
    by_cost, objectives = [], []
    for cost in sorted(COSTS):
        seconds, stopped = [], 0
        for i in range(args.fits if cost <= 1 else args.costly_fits):
            c, fold = sampled(i, classes), i % FOLDS
            inside = held_out[:, c] != fold
            model = linear_svc(cost, random_state=i)
            spent, unconverged = timed_fit(model, unit[inside], labels[inside, c])
            seconds.append(spent)
            stopped += unconverged
            if cost > 1:
                theirs = objective(model.coef_[0], model.intercept_[0], unit[inside], labels[inside, c], cost)
                w, b = weights_of(kernel, unit, labels[:, c], inside, cost)
                mine = objective(w, b, unit[inside], labels[inside, c], cost)
                objectives.append({"cost": cost, "class": c, "fold": fold, "ours": mine, "liblinear": theirs})
                print(f"objective at {cost:.0f}: ours {mine:.6f}, LIBLINEAR {theirs:.6f}", flush=True)
                harness.gate(mine <= theirs * (1 + 1e-9), f"an objective no higher than LIBLINEAR's at cost {cost:.0f}")
        mean = float(np.mean(seconds))
        by_cost.append({"cost": cost, "fits": len(seconds), "seconds_a_fit": mean, "unconverged": stopped})
        print(f"LinearSVC at {cost:.3g}: {mean:.2f} s a fit, {stopped} of {len(seconds)} unconverged", flush=True)
    mean = {entry["cost"]: entry["seconds_a_fit"] for entry in by_cost}
    folds_only = classes * FOLDS * sum(mean.values())
    every = folds_only + classes * sum(mean.values())  # a refit taken at a fold's price, two thirds of the rows
    chosen = folds_only + sum(mean[cost] for cost in ours.costs)
    return {
        "rows": [len(unit), len(unit_test)], "features": x.shape[1], "of": source(args), "classes": classes,
        "costs": len(COSTS),
        **taken, "ours_error": ours.error,
        "gate": gates, "objectives": objectives, "linear_svc": by_cost,
        "linear_svc_every_s": every, "linear_svc_chosen_s": chosen,
        "ratio_every": every / taken["ours_s"], "ratio_chosen": chosen / taken["ours_s"],
    }  # fmt: skip


def weights_of(kernel: torch.Tensor, unit, labels, inside, cost) -> tuple[np.ndarray, float]:
    """(w, b) of one problem by our path up to its cost."""
    rows = torch.from_numpy(np.flatnonzero(inside))
    y = torch.from_numpy(labels[inside]).double()[None, :, None]
    costs = [c for c in COSTS if c <= cost]
    *_, (_, last) = path(Gram(kernel).among(rows), y, torch.where(y > 0, POSITIVE_WEIGHT, 1.0).double(), costs)
    beta = last.beta[0, :, 0].numpy()
    return unit[inside].T @ beta, float(beta.sum())


def converged_gate(args, ours, unit, labels, unit_test, test_y, kernel) -> dict:
    """Decisions and AP beside a LinearSVC run to convergence, for some classes at their chosen cost."""
    points, decisions, cases = [], [], []
    for c in np.linspace(0, test_y.shape[1] - 1, args.gate_classes).astype(int).tolist():
        cost = float(ours.costs[c])
        exact = linear_svc(cost, tol=1e-6, max_iter=10**6).fit(unit, labels[:, c])
        theirs, kept = exact.decision_function(unit_test), test_y[:, c] != -1
        w, b = weights_of(kernel, unit, labels[:, c], np.ones(len(unit), bool), cost)
        decisions.append(float(np.abs(unit_test @ w + b - theirs).max()))
        points.append(100 * abs(area_ap(test_y[kept, c] > 0, theirs[kept]) - ours.per_class[c]))
        cases.append({"class": c, "cost": cost})
    print(f"gate: AP within {max(points):.4f} points, decisions within {max(decisions):.1e} of LinearSVC", flush=True)
    harness.gate(max(points) <= 0.01, "AP within 0.01 points of a converged LinearSVC")
    harness.gate(max(decisions) <= 1e-3, "decision values within 1e-3 of a converged LinearSVC")
    return {"cases": cases, "ap_points": max(points), "decisions": max(decisions)}


def few(args) -> dict:
    x, y, train, test = table(args)
    classes = y.shape[1]
    ks = [int(k) for k in args.ks.split(",")]
    harness.gate(drawn_targets(y[train], 0, max(ks), 0) is not None, f"k = {max(ks)} can be drawn for every class")
    unit, unit_test = (normalised(x[part]).numpy() for part in (train, test))
    ours_of_k = dict.fromkeys(ks, 0.0)

    def targets(sample: int, k: int):
        return drawn_targets(y[train], sample, k, 0)

    def clocked(found, total, title):
        start = time.perf_counter()
        for k, part in found:
            ours_of_k[k] += (time.perf_counter() - start) / args.runs
            yield k, part
            start = time.perf_counter()

    def fitted(cost, drawn, c, inside=slice(None), **more):
        rows = np.flatnonzero(drawn[:, c] >= 0)[inside]
        model = linear_svc(cost, **more)
        return model, *timed_fit(model, unit[rows], np.where(drawn[rows, c] == 1, 1, -1))

    (results, _), taken = repeated(
        "low-shot",
        lambda: low_shot(x[train], y[train], x[test], y[test], targets, ks=ks, track=clocked),
        args.runs,
    )
    drawn, aps = targets(0, min(ks)), []
    for c in range(classes):
        model, *_ = fitted(args.gate_cost, drawn, c, tol=1e-7, max_iter=10**6)
        kept = y[test][:, c] != -1
        aps.append(area_ap(y[test][kept, c] > 0, model.decision_function(unit_test[kept])))
    gap = abs(100 * np.mean(aps) - results[ks.index(min(ks))].test[0, COSTS.index(args.gate_cost)])
    print(f"gate: low-shot AP of k = {min(ks)} within {gap:.4f} points of LinearSVC", flush=True)
    harness.gate(gap <= 0.01, "low-shot AP within 0.01 points of a converged LinearSVC")

    by_k = {}
    for k in ks:
        folds, fits = min(FOLDS, k) if k > 1 else 0, []
        for i in range(args.fits):
            drawn, c = targets(i % SAMPLES, k), sampled(i, classes)
            inside = stratified_folds(drawn[drawn[:, c] >= 0, c] == 1, folds) != 0 if folds else None
            for cost in sorted(COSTS):
                _, whole, stopped = fitted(cost, drawn, c)
                fold = fitted(cost, drawn, c, inside)[1] if folds else 0.0
                fits.append({"cost": cost, "class": c, "s": whole, "fold_s": fold, "unconverged": stopped})
        share = SAMPLES * classes / args.fits  # of all fits to the timed ones
        whole_s, fold_s = (share * sum(fit[key] for fit in fits) for key in ("s", "fold_s"))
        theirs = {"linear_svc_s": whole_s, "linear_svc_same_fits_s": whole_s + folds * fold_s}
        by_k[k] = {"ours_s": ours_of_k[k], **theirs, "linear_svc": fits}
        print(f"low-shot k = {k}: ours {ours_of_k[k]:.1f} s, {theirs}", flush=True)
    total = {who: sum(entry[who] for entry in by_k.values()) for who in ("linear_svc_s", "linear_svc_same_fits_s")}
    return {
        "of": source(args), "k": by_k, "draws": SAMPLES, "gate_ap_points": gap,
        **taken, **total,
        "ratio": total["linear_svc_s"] / taken["ours_s"],
        "ratio_same_fits": total["linear_svc_same_fits_s"] / taken["ours_s"],
    }  # fmt: skip


def neighbours(args) -> dict:
    bank_rows, query_rows, dims, classes, k = 50_000 // args.shrink, 5_000 // args.shrink, 2048 // args.shrink, 100, 20
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((classes, dims)).astype(np.float32)
    y = rng.integers(0, classes, bank_rows + query_rows)
    x = np.maximum(centres[y] + 4 * rng.standard_normal((len(y), dims), np.float32), 0)
    parts = x[:bank_rows], y[:bank_rows], x[bank_rows:], y[bank_rows:]
    works = {
        "ours": lambda: knn(*parts, ks=[k])[k][0],
        "scikit_learn": lambda: scikit_knn(*parts, k),
        "dino": lambda: dino(*parts, k, classes),
    }
    top1 = {name: work() for name, work in works.items()}
    harness.gate(max(top1.values()) - min(top1.values()) <= 0.05, f"the same top-1 {top1}")
    times = harness.alternating(works, args.rounds, harness.clock)
    median = {name: entry["median_s"] for name, entry in times.items()}
    return {
        "bank": bank_rows, "queries": query_rows, "features": dims, "k": k, "top1": top1, "times": times,
        "ratio": {name: median[name] / median["ours"] for name in ("scikit_learn", "dino")},
    }  # fmt: skip


def dump(args) -> dict:
    found = sorted(args.data.rglob("*.[jJ][pP]*[gG]")) if args.data else []
    harness.gate(len(found) >= args.images, f"features: --data FOLDER holds {args.images} JPEG files, has {len(found)}")
    model, _ = random_backbone("resnet50", 0)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        folder = scratch / "images" / "all"
        folder.mkdir(parents=True)
        for row, source in enumerate(found[:: len(found) // args.images][: args.images]):
            shutil.copy(source, folder / f"{row:05}.jpg")
        os.environ["FASTROT_CACHE"] = str(scratch / "cache")
        words = ["features", "--random-init", "0", "--data", str(folder.parent), "--transform", "svm", "--json"]
        words += ["model.arch=resnet50", "engine.precision=fp32", "--out", str(scratch / "ours")]

        def ours():
            shutil.rmtree(scratch / "ours", ignore_errors=True)
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = fastrot(words)
            harness.gate(code in (0, None), f"fastrot features: {said.getvalue()[-300:]}")

        def usual():
            hooked_dump(model, sorted(folder.iterdir()), scratch / "usual", len(os.sched_getaffinity(0)))

        ours(), usual()
        store, gaps = open_store(scratch / "ours").features, {}
        for tap in store:
            theirs = np.load(scratch / "usual" / f"{tap}.npy")
            gaps[tap] = float(np.abs(store[tap] - theirs).max() / np.abs(theirs).max())
        harness.gate(max(gaps.values()) <= 1e-4, f"features equal within 1e-4 of the largest: {gaps}")
        times = harness.alternating({"ours": ours, "usual": usual}, min(args.rounds, 3), harness.clock)
    ratio = times["usual"]["median_s"] / times["ours"]["median_s"]
    return {"images": args.images, "backbone": "resnet50", "largest_gap": gaps, "times": times, "ratio": ratio}


PARTS = {"svm": svm, "low-shot": few, "knn": neighbours, "features": dump}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of rows and features: the script, not the figure"
    )
    parser.add_argument("--runs", type=int, default=3, help="of our SVM and low-shot tables; their median counts")
    parser.add_argument("--fits", type=int, default=2, help="LinearSVC fits timed at each cost (svm: up to 1)")
    parser.add_argument("--costly-fits", type=int, default=1, help="and svm's at 10 and 100, minutes each")
    parser.add_argument("--gate-classes", type=int, default=2, help="classes fitted to convergence")
    parser.add_argument("--ks", help="of low-shot's eight (default: all; with --quick 8,32)")
    parser.add_argument("--gate-cost", type=float, default=0.5**4, help="low-shot's, of the protocol's costs")
    parser.add_argument("--store", help="a folder of `fastrot features`, over 5,011 images, for svm and low-shot")
    parser.add_argument("--tap", default="feature1", help="the tap of --store")
    parser.add_argument("--data", type=Path, help="a folder of JPEG files, for the part features")
    parser.add_argument("--images", type=int, default=96, help="how many of them")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    args = parser.parse_args()
    if "features" in args.only and not args.data:
        parser.error("the part features needs --data FOLDER (or name the others by --only)")
    args.shrink = 4 if args.quick else 1
    args.ks = args.ks or ("8,32" if args.quick else ",".join(map(str, KS)))
    result = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    result.pop("question", None)
    for name in args.only:
        machine, start = harness.facts(), time.perf_counter()
        part = PARTS[name](args)
        machine |= {"load_average_after": os.getloadavg()[0], "part_s": time.perf_counter() - start}
        result[name] = {"quick": args.quick, "machine": machine, **part}
        harness.write(args.out, QUESTION, result)
    for name in args.only:
        ratios = {key: value for key, value in result[name].items() if key.startswith("ratio")}
        print(f"{name}: {ratios}, {result[name]['machine']['part_s']:.0f} s")


if __name__ == "__main__":
    main()
