"""The page: what was run stands beside its control, what was not leaves a gap, and the file needs nothing else."""

import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from safetensors.torch import save_file

from conftest import write_folder
from fastrot.config import load, to_yaml
from fastrot.models.resnet import backbone_state, build_model
from fastrot.report import charts, published, suite, svg, tables
from fastrot.report.significance import accuracy

pytestmark = pytest.mark.usefixtures("narrow")

SUITE = """
sets:
  - name: small
    title: Small <set>
    train: {images}
    test: {images}
    taps: [feature1, feature5, avg]
    pool: adaptive
    overrides: [data.crop=64, data.decode=torch]
    probes: [knn, linear]
    published: imagenet
    note: A handful of drawings.
  - name: voc07
    title: Pascal VOC07
    train: voc:{images}/none?split=trainval
    test: voc:{images}/none?split=test
    transform: svm
    probes: [svm, lowshot]
    published: voc07
runs:
  - name: heads
    title: Small
    task: linear
    config: configs/linear_in1k.yaml
    train: {images}
    test: {images}
    overrides: [data.crop=32, linear.pool=adaptive, "linear.taps=[feature4,feature5]", {quick}]
    published: imagenet
  - name: few
    title: half of Small
    task: finetune
    config: configs/semi_in1k_10.yaml
    train: {images}
    test: {images}
    overrides: [data.crop=32, finetune.fraction=0.5, {quick}]
    grid: {{optim.lr: [0.01], finetune.head_rate: [1, 2]}}
    published: semi_10
  - name: places
    title: Places205
    task: linear
    config: configs/linear_places205.yaml
    train: {images}/none
    test: {images}
    published: places205
"""
QUICK = "data.decode=torch, optim.images_per_step=8, run.max_steps=1, run.tensorboard=false"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as pretraining leaves it, untrained, with a log."""
    root = tmp_path_factory.mktemp("page")
    images = write_folder(root / "images", classes=3, per_class=8)
    run, step = root / "run", root / "run" / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    words = [f"data.train={images}", f"data.val={images}", "data.crop=32", "model.arch=resnet18", "data.decode=torch"]
    (run / "config.yaml").write_text(to_yaml(load(None, words)[0]))
    log = [
        {
            "step": i,
            "epoch": i / 2,
            "loss": 1.4 - i / 10,
            "accuracy": 0.25 + i / 20,
            "views_per_s": 40,
            "step_s": 0.5,
            "wait_share": 0.01,
        }
        for i in range(6)
    ]
    log[3] |= {"held_out_loss": 1.2, "held_out_accuracy": 0.375}
    (run / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in log) + '{"step": 6, "ep')
    facts = {
        "command": ["/x/fastrot/train.py", "--local_rank=0", "run.out=a b"],
        "gpus": [],
        "cores": 2,
        "ranks": "1 on cpu",
    }
    (run / "environment.json").write_text(json.dumps(facts | {"data": {"content": "c0ffee" * 8, "rows": 24}}))
    (step / "state.json").write_text(json.dumps({"step": 4, "position": 512}))
    model = build_model("resnet18", 4, 5)
    save_file(model.state_dict(), step / "model.safetensors")
    save_file(backbone_state(model), step / "backbone.safetensors")
    (root / "suite.yaml").write_text(SUITE.format(images=images, quick=QUICK))
    return root


class Links(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """page.json and page.html of the suite."""
    from fastrot.cli import main

    out = run / "made"
    assert main([*map(str, ("page", "--checkpoint", run / "run", "--suite", run / "suite.yaml", "--out", out))]) == 0
    return json.loads((out / "page.json").read_text()), (out / "page.html").read_text()


def test_a_page_holds_figures_controls_gaps_and_pictures(fastrot, run, made):
    page, out = made[0], run / "made"
    by_title = {table["title"]: table for table in page["tables"]}
    results = {b: next((out / "results" / b).glob("small-knn-*.json")) for b in ("pretrained", "random")}
    trained = {b: next((out / "results" / b).glob("heads-*.json")) for b in ("pretrained", "random")}
    knn = {row["label"]: row for row in by_title["k-NN, Small <set>"]["rows"]}["avg, k = 10"]
    found = {b: json.loads(path.read_text())["layers"]["avg"]["k"]["10"] for b, path in results.items()}
    for backbone, result in found.items():
        assert knn[backbone]["value"] == pytest.approx(result["top1"]) and knn[backbone]["n"] == 24
    assert knn["difference"] == pytest.approx(knn["pretrained"]["value"] - knn["random"]["value"])
    assert 0 <= knn["p"] <= 1 and by_title["k-NN, Small <set>"]["chance"] == pytest.approx(100 / 3)
    few = by_title["Fine-tuned, half of Small"]
    tried = [json.loads(path.read_text()) for path in (out / "results" / "pretrained").glob("few-*.json")]
    assert len(tried) == 2 and "Best of a grid" in " ".join(few["notes"])
    assert few["rows"][0]["pretrained"]["value"] == pytest.approx(100 * max(one["held_out_accuracy"] for one in tried))
    heads = {row["label"]: row for row in by_title["Linear heads, Small"]["rows"]}
    assert list(heads) == ["feature4", "feature5"]
    assert all(sum(row) == pytest.approx(1) for row in page["rotation_confusion"])

    markdown = (out / "page.md").read_text()
    assert page["verdict"] in markdown and f"| {knn['pretrained']['value']:.2f} (" in markdown
    for command in page["commands"]:
        assert command in markdown

    files = [*results.values(), *trained.values()]
    before = [path.stat().st_mtime_ns for path in files]
    for room in ("features", "results", "runs"):  # as an older page left them
        (out / room / "pretrained").rename(out / room / "ours")
    again = fastrot("page", "--checkpoint", run / "run", "--suite", run / "suite.yaml", "--out", out, "--json")
    assert again.code == 0
    assert [path.stat().st_mtime_ns for path in files] == before, "what is there is not done again"
    assert again.json["gaps"]


def test_published_figures_of_another_task_stand_apart(made):
    page, html = made
    assert all(row["published"] is None for table in page["tables"] for row in table["rows"])
    apart = {one["title"]: one for one in page["published_apart"]}
    assert "1,000 classes (here 3)" in apart["k-NN, Small <set>"]["why"]
    assert apart["Fine-tuned, half of Small"]["rows"] == {"top-1": 54.75, "top-5": 80.21}
    assert apart["Fine-tuned, half of Small"]["source"].startswith("OpenSelfSup")
    assert "ImageSets" in apart["SVM, Pascal VOC07"]["why"] and apart["SVM, Pascal VOC07"]["rows"]["feature4"] == 67.70
    assert "none: no such folder" in apart["Linear heads, Places205"]["why"]
    assert "mixes two checkpoints" in html and "no door" not in html.lower()


def test_the_page_needs_nothing_else_and_escapes_what_it_is_given(made):
    _, html = made
    links = Links()
    links.feed(html)
    assert links.found and all(value.startswith("data:image/") for value in links.found)
    assert not re.search(r"@import|url\(|<script", html)
    assert "Small &lt;set&gt;" in html and "<set>" not in html
    assert "The published figures are ResNet-50" in html and not re.search(r"\bours\b", html)


def test_the_page_is_read_without_eyes_and_without_colour(made):
    _, html = made
    assert html.count("<table") == html.count("<caption") and not re.search(r"<th(?! scope=|ead)", html)
    for drawing in re.findall(r"<svg viewBox=\"0 0 400.*?</svg>", html, re.S):
        assert "<title" in drawing and "<desc" in drawing and 'class="line chance"' in drawing
    assert html.count("aria-labelledby") == 2 + 3, "accuracy, loss, k-NN, linear classifiers, linear heads"


def test_the_rotation_task_itself_is_shown(made):
    page, html = made
    views = html.count("✓</figure>") + html.count("✗, is ")
    assert views >= 6 * 4, "six images, each in four turns"
    assert "which way is up" in html and page["rotation_accuracy"]["n"] == 24


def test_the_facts_say_how_the_weights_came_about(made):
    facts = made[0]["facts"]
    assert facts["steps"].startswith("4, 512 images") and facts["crop"] == "32 pixels" and facts["seed"] == "0"
    assert facts["precision"] == "fp32" and facts["epochs"] == "21.3" and "images" in facts["data"]
    assert facts["time"].startswith("2 s"), "four steps of half a second"


def test_the_first_command_can_be_run(made):
    import shlex

    from fastrot.commands import find

    train, again = (shlex.split(command) for command in made[0]["commands"][:2])
    assert train[:2] == ["fastrot", "train"] and again[:2] == ["fastrot", "page"]
    for words in (train, again):
        assert find(words[1]).parser().parse_known_intermixed_args(words[2:])[1] == [], "every word is understood"
    assert "run.out=a b" in train and "--local_rank=0" not in train


def test_the_epochs_after_the_checkpoint_are_not_its_curves(run):
    from fastrot.models.backbone import load_backbone, training_log

    log = training_log(load_backbone(str(run / "run"))[1])
    assert [values["step"] for values in log] == [0, 1, 2, 3]


def test_a_fine_tuned_run_has_no_rotation_curves_and_no_confusion(run, tmp_path):
    from fastrot import distributed
    from fastrot.models.backbone import load_backbone
    from fastrot.report import facts, rotation

    shutil.copytree(run / "run", tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step-00000004"
    (step / "state.json").write_text(json.dumps({"step": 4, "position": 512, "defining": {"backbone": "c0ffee"}}))
    save_file(build_model("resnet18", 7, 5).state_dict(), step / "model.safetensors")
    origin = load_backbone(str(tmp_path / "run"))[1]
    assert facts.rotation_log(origin) == []
    assert rotation.told(origin, distributed.start()) is None
    distributed.end()


def test_a_set_read_at_one_layer_alone_has_no_chart():
    row = tables.Row("avg", None, accuracy(1, 4), accuracy(2, 4), 1.0)
    assert charts.of_table(tables.Table("k-NN", "%", "", [row], "")) is None


def test_low_shot_tables_follow_the_layer_that_is_best_at_the_largest_k():
    def by_k(at_1, at_16):
        spread = [-1, -0.5, 0, 0.5, 1]
        return {
            str(k): {
                "oracle": {"mean": m, "std": 0.7, "draws": [m + s for s in spread]},
                "cross_validated": {"mean": m - 1, "std": 0.1},
            }
            for k, m in ((1, at_1), (8, at_1), (16, at_16))
        }

    pair = tuple(
        {"layers": {tap: {"k": by_k(*at), "left_out": [96]} for tap, at in layers.items()}}
        for layers in ({"feature3": (30, 40), "feature4": (20, 50)}, {"feature3": (9, 9), "feature4": (8, 7)})
    )
    data = tables.Data(20, 5011, 4952, 224, 7.0)
    theirs, why = data.beside("voc07", published.LOW_SHOT)
    oracle, honest = tables.low_shot("x", theirs, pair, data, [])
    row = {r.label: r for r in oracle.rows}["k = 16"]
    assert why is None and (row.published, row.pretrained.value, row.difference) == (46.56, 50, 43)
    assert row.pretrained.n == 5 and row.verdict == "better"
    assert "feature4" in oracle.notes[0] and "k = 96 cannot be drawn" in oracle.notes[1]
    plain = {r.label: r for r in honest.rows}["k = 16"]
    assert plain.published is None and plain.pretrained.value == 49 and plain.p is None, "an older result has no draws"


def test_the_global_average_is_the_best_over_all_epochs_with_the_last_beside_it():
    def result(last, best):
        key = "held_out_accuracy_avg"
        return {key: last, "best": {key: best}, "choice": {}}

    data = tables.Data(1000, 1_281_167, 50_000, 224, 0.1)
    theirs, _ = data.beside("imagenet", published.LINEAR)
    table = tables.heads("x", theirs, ("avg",), (result(0.4, 0.48), result(0.04, 0.05)), data, [])
    assert [(row.label, row.published, row.pretrained.value, row.random.value) for row in table.rows] == [
        ("avg, best epoch", 48.12, pytest.approx(48), pytest.approx(5)),
        ("avg, last epoch", None, pytest.approx(40), pytest.approx(4)),
    ]


@pytest.mark.parametrize(
    "classes, train, test, side, comparable",
    [
        (1000, 1_281_167, 50_000, 224, True),
        (1000, 1_281_150, 49_990, 224, True),
        (10, 1_281_167, 50_000, 224, False),
        (1000, 7_000, 50_000, 224, False),
        (1000, 1_281_167, 800, 224, False),
        (1000, 1_281_167, 50_000, 128, False),
    ],
)
def test_only_the_same_task_is_comparable(classes, train, test, side, comparable):
    theirs, why = tables.Data(classes, train, test, side, 0.1).beside("imagenet", published.KNN)
    assert bool(theirs) == comparable == (why is None)


def test_shares_are_drawn_from_zero_and_every_chart_has_chance():
    rows = [tables.Row(tap, None, accuracy(90 + i, 100), accuracy(80, 100)) for i, tap in enumerate(tables.LAYERS)]
    drawn = str(svg.draw(charts.of_table(tables.Table("<b>", "top-1, %", "", rows, "", 60.0))))
    assert 'text-anchor="end">0</text>' in drawn and 'class="line chance"' in drawn
    assert "&lt;b&gt;" in drawn and "<b>" not in drawn
    assert (
        drawn.count('class="mark pretrained"') == 6 and drawn.count('<rect class="mark random"') == 6
    )  # one in the key
    loss, other = charts.of_pretraining([{"epoch": i, "loss": 1.4, "accuracy": 0.2} for i in range(3)])[::-1]
    assert dict((line.name, line.points[0][1]) for line in loss.lines)["chance"] == pytest.approx(1.386, abs=1e-3)
    assert dict((line.name, line.points[0][1]) for line in other.lines)["chance"] == 25


@pytest.mark.parametrize("low, high", [(0, 1), (25.3, 49.9), (1.15, 1.4), (-3, 0), (7, 7), (0, 1e-4), (998, 1003)])
def test_axes_are_round_and_hold_every_point(low, high):
    start, end, ticks = svg.nice(low, high)
    assert start <= low and end >= high and start < end
    assert 2 <= len(ticks) <= 8
    assert {round(b - a, 9) for a, b in itertools.pairwise(ticks)} == {round(ticks[1] - ticks[0], 9)}


SET = "name: a, title: A, train: x, test: x"


@pytest.mark.parametrize(
    "text, line",
    [
        (f"sets: [{{{SET}, probes: [svm, svn]}}]", "set a, probes 2: 'svn' is unknown; write 'svm', 'lowshot'"),
        (
            f"sets: [{{{SET.replace('a,', 'A b,', 1)}, probes: []}}]",
            "set A b, name: 'A b' names a folder; write small letters",
        ),
        ("sets: [{title: A}]", "set 1: lacks name, train, test, probes; add them"),
        ("sets: [3]", "set 1: 3 does not fit; write keys and values"),
        ("sets: []", "names no set and no run; write one"),
        (f"sets: [{{{SET}, probe: [svm], probes: [svm]}}]", "set a, probe: no such key; the keys are name, title"),
        (f"sets: [{{{SET}, probes: [svm]}}, {{{SET}, probes: [svm]}}]", "set a: named twice"),
        (f"sets: [{{{SET}, probes: [svm], overrides: [data.cropp=3]}}]", "set a: unknown key data.cropp; did you mean"),
        ("set: []", "is no suite: expected `sets:` or `runs:` as in configs/page.yaml, found set"),
        (
            "data: {}\nmodel: {}\noptim: {}",
            "is no suite: expected `sets:` or `runs:` as in configs/page.yaml, found data,",
        ),
        ("", "is no suite"),
        (f"runs: [{{{SET}, task: train, config: c}}]", "run a, task: 'train' is unknown; write 'linear', 'finetune'"),
        (
            f"runs: [{{{SET}, task: linear, config: configs/detect_coco_fpn_1x.yaml}}]",
            "run a: --config configs/detect_coco_fpn_1x.yaml: is a config of fastrot detect, and fastrot linear would",
        ),
        (f"runs: [{{{SET}, task: linear, config: none.yaml}}]", "run a: --config none.yaml: No such file"),
        (f"runs: [{{{SET}, task: linear, config: c, grid: {{optim.lr: []}}}}]", "run a, grid, optim.lr: has no value"),
        ("sets: [", "not YAML"),
    ],
)
def test_a_wrong_suite_is_refused_in_one_line(fastrot, text, line, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    done = fastrot("page", "--checkpoint", "none", "--suite", tmp_path / "s.yaml", "--out", tmp_path / "out")
    assert done.code == 2 and line in done.err and "pydantic" not in done.err
    assert len(done.errors) == 1 and "s.yaml" in done.errors[0] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["page.yaml", "page_small.yaml"])
def test_the_suites_we_ship_are_read(name):
    from conftest import ROOT

    assert suite.load(str(ROOT / "configs" / name)).sets


def test_the_protocols_suite_sees_pillows_pixels_everywhere():
    from conftest import ROOT

    chosen = suite.load(str(ROOT / "configs" / "page.yaml"))
    for part in (*chosen.sets, *chosen.runs):
        whole = getattr(part, "task", "") in ("detect", "segment")  # whole images are always Pillow's
        assert "data.decode=turbo" in part.overrides or whole or part.transform == "svm", part.name


def test_every_published_figure_has_a_row_that_is_run():
    from conftest import ROOT

    chosen = suite.load(str(ROOT / "configs" / "page.yaml"))
    named = {part.published for part in (*chosen.sets, *chosen.runs)} - {None}
    assert named == set(published.TASKS)
    tasks = {run.name: (run.task, run.published) for run in chosen.runs}
    assert tasks["segment_cityscapes"] == ("segment", None) and tasks["detect_coco"] == ("detect", "detect_coco")
