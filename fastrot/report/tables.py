"""The page's tables: published, pretrained, the same on a random backbone, and the difference; no layout."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastrot.report import published
from fastrot.report.significance import (
    ALPHA,
    Figure,
    accuracy,
    over,
    over_classes,
    same_classes,
    same_draws,
    same_images,
)

LAYERS = ("feature1", "feature2", "feature3", "feature4", "feature5")
PAIRED = "p: McNemar's exact test on the same images"
UNPAIRED = "p: Fisher's exact test, unpaired: which images were right is not kept"

Pair = tuple[dict[str, Any], dict[str, Any]]  # a probe's results on the pretrained and on the random backbone
Get = Callable[[dict[str, Any]], Figure | None]
Test = Callable[[Figure, Figure], float | None]


@dataclass(frozen=True)
class Row:
    """p: of the test that pretrained and random are one."""

    label: str
    published: float | None = None
    pretrained: Figure | None = None
    random: Figure | None = None
    p: float | None = None

    @property
    def difference(self) -> float | None:
        """Pretrained minus random: what the pretraining gives."""
        return self.pretrained.value - self.random.value if self.pretrained and self.random else None

    @property
    def verdict(self) -> str:
        """better or worse where the difference is significant, else same."""
        if self.difference is None or self.p is None or self.p >= ALPHA:
            return "same"
        return "better" if self.difference > 0 else "worse"

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        figures = {"pretrained": self.pretrained, "random": self.random}
        return {
            "label": self.label,
            "published": self.published,
            **{name: figure and figure.plain() for name, figure in figures.items()},
            "difference": self.difference,
            "p": self.p,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Data:
    """What figures are of: classes, images to learn from and to judge by, the crop's side, and chance in percent.

    chance  of an accuracy: one class in all; of a mean AP: the mean share of a class's images; None where there is none.
    """

    classes: int
    train: int
    test: int
    side: int
    chance: float | None

    def beside(self, of: str | None, figures: dict[str, dict[str, float]]) -> tuple[dict[str, float], str | None]:
        """The published figures that may stand beside these, and why they may not where there are some."""
        why = published.TASKS[of].differs(self.classes, self.train, self.test, self.side) if of in figures else None
        return ({} if why else figures.get(of or "", {})), why


@dataclass(frozen=True)
class Table:
    """One table. asks: what the probe asks, in a sentence; counted: n, intervals and test; published: a source.

    stands  label of the row that stands for the table; "": the highest's.
    """

    title: str
    unit: str
    asks: str
    rows: list[Row]
    counted: str
    chance: float | None = None
    published: str | None = None
    notes: list[str] = field(default_factory=list)
    stands: str = ""

    @property
    def best(self) -> Row:
        """The row that stands for the table."""
        compared = [row for row in self.rows if row.pretrained and row.random]
        return next((row for row in compared if row.label == self.stands), None) or max(compared, key=_height)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return vars(self) | {"rows": [row.plain() for row in self.rows]}


@dataclass(frozen=True)
class Apart:
    """Published figures that no figure of this page stands beside, and why."""

    title: str
    why: str
    source: str
    rows: dict[str, float]


def svm(title: str, theirs: dict[str, float], pair: Pair, data: Data, notes: list[str]) -> Table:
    """VOC07's SVM a layer, and the best layer of each."""

    def of(layer: str) -> Get:
        return lambda result: _of_layer(result, layer, lambda found: over_classes(found["per_class"]))

    rows = [row(layer, theirs, pair, of(layer), same_classes) for layer in _layers(pair)]
    best = max(rows, key=_height).pretrained, max(rows, key=lambda row: _height(row, of_random=True)).random
    rows.append(Row("best layer", max(theirs.values(), default=None), *best, _p(*best, same_classes)))
    n = best[0].n if best[0] else 0
    return Table(
        f"SVM, {title}",
        "mean AP, %",
        "Is each kind of object in the picture? A linear classifier a class, fitted on stored features of one layer.",
        rows,
        f"n = {n} classes, {data.test:,} test images; 95 % intervals: bootstrap over the classes; p: Wilcoxon's "
        "signed-rank test over the classes",
        data.chance,
        source(theirs),
        notes,
        stands="best layer",
    )


def low_shot(title: str, theirs: dict[str, float], pair: Pair, data: Data, notes: list[str]) -> list[Table]:
    """Low-shot at each k on the layer where the pretrained backbone is best: by the protocol's cost, and an honest one."""
    first = pair[0]
    layer = best_layer(first)
    left_out = [str(k) for k in first["layers"][layer]["left_out"]]
    draws = f"published draws of {first['draws']}" if first.get("draws") else "drawn by seed 0"
    out = []
    for choice, says, beside in (
        ("oracle", "the cost is the best on the test set, as the protocol has it", theirs),
        ("cross_validated", "the cost is chosen on the drawn images alone", {}),
    ):

        def of(k: str, choice: str = choice) -> Get:
            return lambda result: _of_layer(result, layer, lambda found: _of_draws(found["k"].get(k, {}).get(choice)))

        out.append(
            Table(
                f"Low-shot SVM, {title}" + ("" if choice == "oracle" else ", cost by cross-validation"),
                "mean AP, %",
                "The same question with only k pictures of each kind to learn from.",
                [row(f"k = {k}", beside, pair, of(k), same_draws) for k in first["layers"][layer]["k"]],
                f"n = 5 draws ({draws}), {data.test:,} test images; 95 % intervals: Student's over the draws, "
                "whose test images are the same; p: Student's paired test over the draws",
                data.chance,
                source(beside),
                [
                    f"{layer}, the pretrained backbone's best at the largest k; {says}.",
                    *([f"k = {', '.join(left_out)} cannot be drawn for every class of this set."] if left_out else []),
                    *notes,
                ],
            )
        )
    return out


def best_layer(result: dict[str, Any]) -> str:
    """The layer of the highest low-shot figure at the largest k."""

    def last(layer: str) -> float:
        by_k: dict[str, Any] = result["layers"][layer]["k"]
        return float(by_k[max(by_k, key=int)]["oracle"]["mean"]) if by_k else 0.0

    return str(max(result["layers"], key=last))


def knn(title: str, theirs: dict[str, float], pair: Pair, data: Data, notes: list[str]) -> Table:
    """k-NN on the global average at each k, then every layer at k = 20."""
    layers = _layers(pair)
    asked = [(f"{tap}, k = {k}", tap, str(k)) for tap in ("avg",) for k in (10, 20, 100, 200) if tap in layers]
    asked += [(f"{tap}, k = 20", tap, "20") for tap in LAYERS if tap in layers]

    def of(tap: str, k: str) -> Get:
        return lambda result: _of_layer(result, tap, lambda found: _of_images(found["k"].get(k), data))

    rows = [row(label, theirs, pair, of(tap, k), same_images) for label, tap, k in asked]
    return Table(
        f"k-NN, {title}",
        "top-1, %",
        "Do a picture's nearest neighbours among the stored features show the same class? Nothing is fitted.",
        rows,
        _of_test_images(rows),
        data.chance,
        source(theirs),
        notes,
    )


def linear(title: str, theirs: dict[str, float], pair: Pair, data: Data, notes: list[str]) -> Table:
    """Linear classifiers a layer, on stored features."""

    def of(tap: str) -> Get:
        return lambda result: _of_layer(result, tap, lambda found: _of_images(found, data))

    rows = [row(tap, theirs, pair, of(tap), same_images) for tap in _layers(pair)]
    return Table(
        f"Linear classifiers, {title}",
        "top-1, %",
        "Can a linear classifier on stored features of one layer tell the classes apart?",
        rows,
        _of_test_images(rows),
        data.chance,
        source(theirs),
        ["Trained on stored features, without augmentation: not the protocol's heads.", *notes],
    )


def heads(
    title: str, theirs: dict[str, float], taps: tuple[str, ...], pair: Pair, data: Data, notes: list[str]
) -> Table:
    """The protocol's linear heads, trained on the images; a layer each. The global average: best over all epochs."""

    def last(tap: str) -> Get:
        return lambda result: _of_share(result[f"held_out_accuracy_{tap}"], data)

    def best(result: dict[str, Any]) -> Figure:
        key = "held_out_accuracy_avg"
        return _of_share(result.get("best", {}).get(key, result[key]), data)

    rows = [row(tap, theirs, pair, last(tap), same_images) for tap in taps if tap != "avg"]
    if "avg" in taps:
        rows += [
            row("avg", theirs, pair, best, same_images, "avg, best epoch"),
            row("avg, last epoch", {}, pair, last("avg"), same_images),
        ]
        notes = [
            "The global average's published figure is the best over all epochs, chosen on the images judged by: so is "
            "the first row; the last epoch's stands below it. The other layers' are the last epoch's.",
            *notes,
        ]
    else:
        notes = ["The last epoch's.", *notes]
    return Table(
        f"Linear heads, {title}",
        "top-1, %",
        "Can a linear classifier on a frozen layer tell the classes apart, trained on the pictures themselves, augmented?",
        rows,
        _of_test_images(rows),
        data.chance,
        source(theirs),
        [*choice(pair), *notes],
    )


def fine_tuned(title: str, theirs: dict[str, float], pair: Pair, data: Data, notes: list[str]) -> Table:
    """A network fine-tuned on few images: top-1 and top-5."""

    def of(key: str) -> Get:
        return lambda result: _of_share(result[key], data)

    keys = (("top-1", "held_out_accuracy"), ("top-5", "held_out_top5"))
    rows = [row(label, theirs, pair, of(key), same_images) for label, key in keys]
    return Table(
        f"Fine-tuned, {title}",
        "accuracy, %",
        "Where few labelled pictures are at hand: how far does the whole network come when it starts from these weights?",
        rows,
        _of_test_images(rows),
        data.chance,
        published.OPENSELFSUP if theirs else None,
        ["The last epoch's.", *choice(pair), *notes],
    )


def row(label: str, theirs: dict[str, float], pair: Pair, get: Get, test: Test, shown: str | None = None) -> Row:
    """What `get` reads of both results, beside the published figure of `label`; `test` compares them."""
    pretrained, random = map(get, pair)
    return Row(shown or label, theirs.get(label), pretrained, random, _p(pretrained, random, test))


def _p(pretrained: Figure | None, random: Figure | None, test: Test) -> float | None:
    return test(pretrained, random) if pretrained and random else None


def _height(row: Row, of_random: bool = False) -> float:
    figure = row.random if of_random else row.pretrained
    return figure.value if figure else -1.0


def _layers(pair: Pair) -> list[str]:
    """The layers that were read, in the order of the network."""
    found = pair[0]["layers"]
    return [tap for tap in (*LAYERS, "avg") if tap in found]


def _of_test_images(rows: list[Row]) -> str:
    """n, the intervals and the test of accuracies."""
    known = [figure for row in rows for figure in (row.pretrained, row.random) if figure]
    test = PAIRED if all(figure.each is not None for figure in known) else UNPAIRED
    return f"n = {known[0].n:,} test images; 95 % intervals: Wilson's; {test}"


def _of_layer(result: dict[str, Any], layer: str, get: Get) -> Figure | None:
    return get(result["layers"][layer]) if layer in result["layers"] else None


def _of_images(found: dict[str, Any] | None, data: Data) -> Figure | None:
    """A top-1 with its images, where the result has them."""
    if found is None:
        return None
    return accuracy(round(found["top1"] * data.test / 100), data.test, found.get("right"))


def _of_share(share: float, data: Data) -> Figure:
    return accuracy(round(share * data.test), data.test)


def _of_draws(found: dict[str, Any] | None) -> Figure | None:
    """A mean over draws; of an older result, which keeps only mean and deviation, by these."""
    if not found:
        return None
    if "draws" in found:
        return over(found["draws"])
    half = 2.776 * found["std"] / 4**0.5  # Student's for five draws; the deviation is the population's
    return Figure(found["mean"], found["mean"] - half, found["mean"] + half, 5)


def source(theirs: dict[str, float]) -> str | None:
    """Whose the published figures are, where there are some."""
    return published.SOURCE if theirs else None


def choice(pair: Pair) -> list[str]:
    """Which of a grid's settings was best, where there was a grid."""
    says = [
        f"{name}: " + ", ".join(f"{key} {value:g}" for key, value in result["choice"].items())
        for name, result in zip(("pretrained", "random"), pair, strict=True)
        if result["choice"]
    ]
    return [f"Best of a grid on the images judged by, as the protocol has it ({'; '.join(says)})."] if says else []
