"""The page's tables: published, ours, the same on a random backbone, and the difference; no layout."""

from dataclasses import asdict, dataclass, field

from fastrot.report import published

LAYERS = ("feature1", "feature2", "feature3", "feature4", "feature5")


@dataclass(frozen=True)
class Figure:
    """A measured figure; spread is the standard deviation over draws, where there are draws."""

    value: float
    spread: float | None = None


@dataclass(frozen=True)
class Row:
    label: str
    published: float | None = None
    ours: Figure | None = None
    random: Figure | None = None

    @property
    def difference(self) -> float | None:
        """Ours minus the random backbone's: what the pretraining gives."""
        return self.ours.value - self.random.value if self.ours and self.random else None


@dataclass(frozen=True)
class Table:
    """One table. gap: why ours is missing."""

    title: str
    unit: str
    rows: list[Row]
    source: str = published.SOURCE
    notes: list[str] = field(default_factory=list)
    gap: str | None = None

    def plain(self) -> dict:
        """As JSON holds it."""
        rows = [asdict(row) | {"difference": row.difference} for row in self.rows]
        return asdict(self) | {"rows": rows}


def _figure(result: dict | None, *path) -> Figure | None:
    """The number at a path of a probe's result; None where the probe did not run or left it out."""
    value = result
    for key in path:
        if value is None:
            return None
        value = value.get(key)
    if isinstance(value, dict):
        return Figure(value["mean"], value["std"])
    return None if value is None else Figure(value)


def svm(title: str, of: str | None, ours: dict | None, random: dict | None, notes: list[str], gap: str | None) -> Table:
    """VOC07's SVM a layer, and the best layer of each."""
    rows = [
        Row(
            layer,
            published.SVM.get(of, {}).get(layer),
            *(_figure(r, "layers", layer, "average_precision") for r in (ours, random)),
        )
        for layer in LAYERS
    ]
    best = [max((f for f in column if f), key=lambda f: f.value, default=None) for column in _columns(rows)]
    theirs = max((row.published for row in rows if row.published), default=None)
    return Table(f"SVM, {title}", "mean AP, %", [*rows, Row("best layer", theirs, *best)], notes=notes, gap=gap)


def _columns(rows: list[Row]):
    return [row.ours for row in rows], [row.random for row in rows]


def low_shot(
    title: str, of: str | None, ours: dict | None, random: dict | None, notes: list[str], gap: str | None
) -> list[Table]:
    """Low-shot at each k on the layer where ours is best: the protocol's choice of cost, and an honest one."""
    layer = best_layer(ours)
    figures = published.LOW_SHOT.get(of, {})
    if layer is None:
        rows = [Row(f"k = {k}", value) for k, value in figures.items()]
        return [Table(f"Low-shot SVM, {title}", "mean AP, %", rows, notes=notes, gap=gap)]
    out = []
    for choice, says, theirs in (
        ("oracle", "the cost is the best on the test set, as the protocol has it", figures),
        ("cross_validated", "the cost is chosen on the drawn images alone", {}),
    ):
        rows = [
            Row(f"k = {k}", theirs.get(k), *(_figure(r, "layers", layer, "k", str(k), choice) for r in (ours, random)))
            for k in (figures or {int(k): None for k in ours["layers"][layer]["k"]})
        ]
        left_out = [str(k) for k in ours["layers"][layer]["left_out"]]
        more = [f"k = {', '.join(left_out)} cannot be drawn for every class of this set."] if left_out else []
        of_layer = f"{layer}, our best at the largest k; mean ± deviation of five draws; {says}."
        out.append(
            Table(
                f"Low-shot SVM, {title}" + ("" if choice == "oracle" else ", cost by cross-validation"),
                "mean AP, %",
                rows,
                notes=[of_layer, *more, *notes],
            )
        )
    return out


def best_layer(result: dict | None) -> str | None:
    """The layer of the highest low-shot figure at the largest k."""
    if result is None:
        return None

    def last(layer: str) -> float:
        by_k = result["layers"][layer]["k"]
        return by_k[max(by_k, key=int)]["oracle"]["mean"] if by_k else 0.0

    return max(result["layers"], key=last)


def linear(title: str, of: str | None, ours, random, notes: list[str], gap: str | None) -> Table:
    """Linear classifiers a layer."""
    taps = list(published.LINEAR.get(of, {})) or list((ours or random or {"layers": LAYERS})["layers"])
    rows = [
        Row(tap, published.LINEAR.get(of, {}).get(tap), *(_figure(r, "layers", tap, "top1") for r in (ours, random)))
        for tap in taps
    ]
    fast = ["Trained on stored features, without augmentation: not the protocol's heads."] if ours else []
    return Table(f"Linear classifiers, {title}", "top-1, %", rows, notes=[*fast, *notes], gap=gap)


def knn(title: str, of: str | None, ours, random, notes: list[str], gap: str | None) -> Table:
    """k-NN on the global average at each k, then every layer at k = 20."""
    figures = published.KNN.get(of, {})
    rows = [
        Row(
            f"avg, k = {k}", figures.get(k), *(_figure(r, "layers", "avg", "k", str(k), "top1") for r in (ours, random))
        )
        for k in (10, 20, 100, 200)
    ]
    layers = [tap for tap in LAYERS if ours and tap in ours["layers"]]
    rows += [
        Row(f"{tap}, k = 20", None, *(_figure(r, "layers", tap, "k", "20", "top1") for r in (ours, random)))
        for tap in layers
    ]
    return Table(f"k-NN, {title}", "top-1, %", rows, notes=notes, gap=gap)


def heads(title: str, of: str | None, taps: tuple[str, ...], ours, random, notes: list[str], gap: str | None) -> Table:
    """The protocol's linear heads, trained on the images; a layer each."""
    rows = [
        Row(
            tap, published.LINEAR.get(of, {}).get(tap), *(_share(r, f"held_out_accuracy_{tap}") for r in (ours, random))
        )
        for tap in taps
    ]
    last = ["The last epoch's, trained on augmented images."] if ours else []
    return Table(f"Linear heads, {title}", "top-1, %", rows, notes=[*last, *_choice(ours, random), *notes], gap=gap)


def fine_tuned(title: str, of: str | None, ours, random, notes: list[str], gap: str | None) -> Table:
    """A network fine-tuned on few images: top-1 and top-5."""
    theirs = published.SEMI.get(of, (None, None))
    names = (("top-1", "held_out_accuracy"), ("top-5", "held_out_top5"))
    rows = [
        Row(label, figure, *(_share(r, key) for r in (ours, random)))
        for (label, key), figure in zip(names, theirs, strict=True)
    ]
    last = ["The last epoch's."] if ours else []
    notes = [*last, *_choice(ours, random), *notes]
    return Table(f"Fine-tuned, {title}", "accuracy, %", rows, published.OPENSELFSUP, notes=notes, gap=gap)


def _share(result: dict | None, key: str) -> Figure | None:
    return Figure(100 * result[key]) if result else None


def _choice(ours: dict | None, random: dict | None) -> list[str]:
    """Which of a grid's settings was best, where there was a grid."""
    says = [
        f"{name}: " + ", ".join(f"{key} {value:g}" for key, value in result["choice"].items())
        for name, result in (("ours", ours), ("random", random))
        if result and result["choice"]
    ]
    return [f"Best of a grid on the images judged by, as the protocol has it ({'; '.join(says)})."] if says else []


def elsewhere() -> list[Table]:
    """The mission's tables that the suite runs nothing for."""
    return [
        Table(
            title, unit, [Row(label, value) for label, value in rows], source, gap="No door of fastrot runs this yet."
        )
        for title, unit, source, rows in published.ELSEWHERE
    ]
