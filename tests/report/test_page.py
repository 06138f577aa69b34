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
from fastrot.report import page, suite, svg, tables

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
            "wait_share": 0.01,
        }
        for i in range(6)
    ]
    log[3] |= {"held_out_loss": 1.2, "held_out_accuracy": 0.375}
    (run / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in log) + '{"step": 6, "ep')
    facts = {"command": ["fastrot", "train"], "gpus": [], "cores": 2, "ranks": "1 on cpu"}
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


def test_a_page_holds_figures_controls_gaps_and_pictures(fastrot, run):
    words = ("page", "--checkpoint", run / "run", "--suite", run / "suite.yaml", "--out", run / "out")
    done = fastrot(*words, "--json")
    assert "SVM, Pascal VOC07" in done.json["gaps"] and "k-NN, Small <set>" not in done.json["gaps"]
    page = json.loads((run / "out" / "page.json").read_text())
    by_title = {table["title"]: table for table in page["tables"]}
    knn = {row["label"]: row for row in by_title["k-NN, Small <set>"]["rows"]}["avg, k = 10"]
    assert knn["published"] == 11.0
    assert knn["difference"] == pytest.approx(knn["ours"]["value"] - knn["random"]["value"])
    results = {b: next((run / "out" / "results" / b).glob("small-knn-*.json")) for b in ("ours", "random")}
    trained = {b: next((run / "out" / "results" / b).glob("heads-*.json")) for b in ("ours", "random")}
    assert knn["ours"]["value"] == json.loads(results["ours"].read_text())["layers"]["avg"]["k"]["10"]["top1"]
    assert by_title["SVM, Pascal VOC07"]["rows"][-1]["published"] == 67.70
    assert "ImageSets" in by_title["SVM, Pascal VOC07"]["gap"]
    assert all(sum(row) == pytest.approx(1) for row in page["rotation_confusion"])
    heads = {row["label"]: row for row in by_title["Linear heads, Small"]["rows"]}
    assert list(heads) == ["feature4", "feature5"] and heads["feature4"]["published"] == 54.20
    few = by_title["Fine-tuned, half of Small"]
    tried = [json.loads(path.read_text()) for path in (run / "out" / "results" / "ours").glob("few-*.json")]
    assert [row["published"] for row in few["rows"]] == [54.75, 80.21] and len(tried) == 2
    assert few["rows"][0]["ours"]["value"] == pytest.approx(100 * max(one["held_out_accuracy"] for one in tried))
    assert "Best of a grid" in " ".join(few["notes"]) and few["source"].startswith("OpenSelfSup")
    places = by_title["Linear heads, Places205"]
    assert "none: no such folder" in places["gap"] and places["rows"][3]["published"] == 46.30

    html = (run / "out" / "page.html").read_text()
    links = Links()
    links.feed(html)
    assert links.found and all(value.startswith("data:image/") for value in links.found)
    assert not re.search(r"@import|url\(|<script", html)
    assert links.tags.count("svg") == 2 + 3 + 1, "accuracy, loss, k-NN, linear classifiers, linear heads, confusion"
    assert "Small &lt;set&gt;" in html and "<set>" not in html
    assert "The published figures are ResNet-50" in html
    assert html.count('class="thumb') == 3 * (1 + 5 + 5)

    markdown = (run / "out" / "page.md").read_text()
    assert "**Gap:** voc:" in markdown and f"| {knn['published']:.2f} | {knn['ours']['value']:.2f} |" in markdown
    for command in page["commands"]:
        assert command in markdown

    files = [*results.values(), *trained.values()]
    before = [path.stat().st_mtime_ns for path in files]
    assert fastrot(*words).code == 0
    assert [path.stat().st_mtime_ns for path in files] == before, "what is there is not done again"


def test_the_epochs_after_the_checkpoint_are_not_its_curves(run):
    from fastrot.models.backbone import load_backbone
    from fastrot.report.rotation import metrics

    log = metrics(load_backbone(str(run / "run"))[1])
    assert [values["step"] for values in log] == [0, 1, 2, 3]


def test_a_fine_tuned_run_has_no_rotation_curves_and_no_confusion(run, tmp_path):
    from fastrot import distributed
    from fastrot.models.backbone import load_backbone
    from fastrot.report import rotation

    shutil.copytree(run / "run", tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step-00000004"
    (step / "state.json").write_text(json.dumps({"step": 4, "position": 512, "defining": {"backbone": "c0ffee"}}))
    save_file(build_model("resnet18", 7, 5).state_dict(), step / "model.safetensors")
    origin = load_backbone(str(tmp_path / "run"))[1]
    assert rotation.metrics(origin) == []
    assert rotation.confusion(origin, distributed.start()) is None
    distributed.end()


def test_a_chart_without_a_point_is_left_out():
    bare, drawn = (page.Chart("k-NN", "layer", "%", [svg.Line("ours", "ours", points)]) for points in ([], [(0, 1.0)]))
    assert page.drawable([bare, drawn]) == [drawn]


def test_low_shot_tables_follow_the_layer_that_is_best_at_the_largest_k():
    def by_k(at_1, at_16):
        return {
            str(k): {"oracle": {"mean": m, "std": 0.5}, "cross_validated": {"mean": m - 1, "std": 0.1}}
            for k, m in ((1, at_1), (8, at_1), (16, at_16))
        }

    ours = {
        "layers": {"feature3": {"k": by_k(30, 40), "left_out": [96]}, "feature4": {"k": by_k(20, 50), "left_out": [96]}}
    }
    random = {
        "layers": {"feature3": {"k": by_k(9, 9), "left_out": [96]}, "feature4": {"k": by_k(8, 7), "left_out": [96]}}
    }
    oracle, honest = tables.low_shot("x", "voc07", ours, random, [], None)
    row = {r.label: r for r in oracle.rows}["k = 16"]
    assert (row.published, row.ours, row.difference) == (46.56, tables.Figure(50, 0.5), 43)
    assert "feature4" in oracle.notes[0] and "k = 96 cannot be drawn" in oracle.notes[1]
    assert {r.label: r for r in honest.rows}["k = 8"].published is None


@pytest.mark.parametrize("low, high", [(0, 1), (25.3, 49.9), (1.15, 1.4), (-3, 0), (7, 7), (0, 1e-4), (998, 1003)])
def test_axes_are_round_and_hold_every_point(low, high):
    start, end, ticks = svg._nice(low, high)
    assert start <= low and end >= high and start < end
    assert 2 <= len(ticks) <= 8
    assert {round(b - a, 9) for a, b in itertools.pairwise(ticks)} == {round(ticks[1] - ticks[0], 9)}


@pytest.mark.parametrize(
    "text, line",
    [
        ("sets: [{name: a, title: A, train: x, test: x, probes: [svn]}]", "sets.0.probes.0"),
        ("sets: [{name: A b, title: A, train: x, test: x, probes: []}]", "sets.0.name"),
        ("set: []", "set: Extra inputs"),
        ("runs: [{name: a, title: A, task: train, config: c, train: x, test: x}]", "runs.0.task"),
        (
            "runs: [{name: a, title: A, task: linear, config: c, train: x, test: x, grid: {optim.lr: []}}]",
            "runs.0.grid",
        ),
        ("sets: [", "not YAML"),
    ],
)
def test_a_wrong_suite_is_refused_in_a_line(text, line, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(Exception, match=re.escape(line)):
        suite.load(str(tmp_path / "s.yaml"))


@pytest.mark.parametrize("name", ["page.yaml", "page_small.yaml"])
def test_the_suites_we_ship_are_read(name):
    from conftest import ROOT

    assert suite.load(str(ROOT / "configs" / name)).sets
