"""What the documents claim in numbers follows from the shipped configs, and what they show runs."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastrot
from conftest import ROOT, write_folder
from fastrot import config as configs
from fastrot.cli import main
from fastrot.commands import GROUPS, find
from fastrot.data import augment
from fastrot.demo import scenes
from fastrot.runs.arithmetic import arithmetic

IMAGENET = 1_281_167
PADDED = 10_010  # steps of an epoch in the published run
LEARNING = GROUPS["training"]
SLOW = (
    "quickstart",
    "tutorial",
    "data",
    "pretraining",
    "resume",
    "care",
    "extend",
    "probes",
    "transfer",
    "export",
    "upright",
    "orientation",
    "performance",
    "formats",
)
PAGES = ["loader", "api", "stream", *(pytest.param(page, marks=pytest.mark.slow) for page in SLOW)]


def test_the_deviations_of_the_recipe_are_as_its_page_says():
    page = (ROOT / "docs" / "deviations.md").read_text()
    config, _ = configs.load(str(ROOT / "configs" / "in1k.yaml"), [])
    steps = arithmetic(config, 8, IMAGENET).steps
    images = config.optim.images_per_step
    falls = [-(-int(epoch) * IMAGENET // images) for epoch in (*config.optim.milestones, config.optim.warmup_epochs)]
    assert f"{steps:,} steps: the stream is endless" in page and f"{70 * PADDED - steps} steps in" in page
    assert "steps {:,}, {:,} and {:,}".format(*falls) in page
    early = [int(epoch) * PADDED - fall for epoch, fall in zip((30, 50, 5), falls, strict=True)]
    assert "{}, {} and {} steps early".format(*early) in page


def test_the_fast_configs_batch_norm_sees_what_is_written_there():
    text = (ROOT / "configs" / "in1k_fast.yaml").read_text()
    config, _ = configs.load(str(ROOT / "configs" / "in1k_fast.yaml"), [])
    seen = [arithmetic(config, ranks, IMAGENET).norm_views for ranks in (1, 4, 8)]
    assert "{:,}, {:,} and {:,} views at 1, 4 and 8 ranks".format(*seen) in " ".join(text.replace("#", "").split())


def test_every_file_that_the_documents_name_is_there():
    named = {
        (page, path)
        for page in ("README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*") if p.suffix in (".md", ".py")))
        for path in re.findall(r"(?:fastrot|kernels|configs|bench|docs|tests)/[\w/.-]*[\w/]", (ROOT / page).read_text())
    }
    named = {(page, path) for page, path in named if "NAME" not in path and path != "fastrot/train"}
    assert len(named) > 40
    assert [entry for entry in sorted(named) if not (ROOT / entry[1]).exists()] == []


def blocks_of(path):
    """[language, title or "", text] of a document's fenced blocks."""
    return re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', path.read_text(), re.MULTILINE | re.DOTALL)


def commands_in(text):
    """A shell block's commands, a line each."""
    return [line for line in text.replace("\\\n", " ").splitlines() if shlex.split(line, comments=True)]


def run_command(line):
    """One line of a shell block: fastrot in this process, all else as a shell does it."""
    command, *words = shlex.split(line, comments=True)
    if command != "fastrot":
        subprocess.run(["bash", "-ec", line], check=True, timeout=300)
        return
    out = words[words.index(">") + 1] if ">" in words else os.devnull
    with open(out, "w") as file, contextlib.redirect_stdout(file):
        assert main(words[: words.index(">")] if ">" in words else words) == 0, line


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, narrow):
    """As they stand, from an empty folder with configs/; demo scenes are not drawn, and ResNet-18 is narrow.

    A python block runs, all of a page in one namespace; one with a title, of any language, is that file; bash runs; sh
    needs data or machines that are not here: the next test reads it."""

    def few(folder, train, val, seed):
        write_folder(folder / "train", per_class=8, side=72)
        write_folder(folder / "val", per_class=3, side=72)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scenes, "write", few)
    monkeypatch.setattr(logging, "basicConfig", lambda: None)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    names = {}
    for language, title, text in blocks_of(ROOT / "docs" / f"{page}.md"):
        if title:
            Path(title).write_text(text)
        elif language == "python":
            exec(compile(text, f"{page}.md: {text.splitlines()[0]}", "exec"), names)
        elif language == "bash":
            for line in commands_in(text):
                run_command(line)
    if page == "stream":
        the_golden_values_hold(names)


def the_golden_values_hold(page):
    """What the page's own functions, which know nothing of ours, say of the golden cases."""
    golden = json.loads((ROOT / "tests" / "golden" / "stream.json").read_text())
    for case in golden["philox"]:
        keys = ("seed", "row", "epoch", "purpose", "block")
        assert list(page["philox"](*(case[key] for key in keys))) == case["words"]
    for case in golden["order"]:
        rows = page["full_order"](case["n"], case["seed"], case["epoch"]) if case["n"] < 10**5 else None
        if rows:
            assert [rows[p] for p in case["positions"]] == case["rows"]
        keys = page["round_keys"](case["seed"], case["epoch"])
        assert [page["permuted"](p, case["n"], keys) for p in case["positions"]] == case["rows"]
    for case in golden["order_window"]:
        keys = ("n", "seed", "epoch", "window_rows", "window_chunks")
        assert page["window_order"](*(case[key] for key in keys)) == case["rows"]
    for case in golden["sample"]:
        which = case["seed"], case["row"], case["epoch"]
        assert page["window"](*which, case["height"], case["width"]) == case["window"]
        assert (page["flip"](*which), page["turns"](*which, "one")) == (case["flip"], [case["turn"]])
    for case in golden["jitter"]:
        order, factors = page["jitter"](case["seed"], case["row"], case["epoch"], case["strength"], case["hue"])
        assert order == case["order"] and factors == pytest.approx(case["factors"], rel=1e-15)
    for case in golden["lighting"]:
        alpha = page["lighting"](case["seed"], case["row"], case["epoch"], case["std"])
        assert alpha == pytest.approx(case["alpha"], rel=1e-12)
    for case in golden["draw"]:
        assert page["draw"](case["seed"], case["sample"], case["group"], range(50), case["k"]) == case["drawn"]
    for case in golden["slice"]:
        size = case["images_per_step"], case["ranks"], case["micro_steps"]
        shares = [[page["share"](*size, a, r) for r in range(case["ranks"])] for a in range(case["micro_steps"])]
        assert shares == case["slices"]
    sizes, labels = [(100 + 7 * i % 300, 100 + 13 * i % 400) for i in range(37)], [i % 5 for i in range(37)]
    for case in golden["stream"]:
        steps = range(case["first_step"], case["first_step"] + case["steps"])
        assert page["stream_hash"](case["seed"], sizes, labels, case["batch"], steps, case["views"]) == case["sha256"]
    box = augment.central_boxes(np.array([375]), np.array([500]), 256, 224)
    assert page["central_box"](375, 500, 256, 224) == pytest.approx(box[0].tolist(), rel=1e-15)


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.stem
)
def test_every_command_of_a_document_is_one(path, monkeypatch, tmp_path):
    """Its options are the command's, its keys the config's: of those too whose data or machines are not here."""
    monkeypatch.chdir(ROOT)
    for _, title, text in blocks_of(path):
        if title.endswith(".yaml"):
            (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / title).write_text(text)
    for line in [
        line for language, _, text in blocks_of(path) if language in ("bash", "sh") for line in commands_in(text)
    ]:
        words = shlex.split(line.partition(" > ")[0], comments=True)
        launched = [at for at, word in enumerate(words) if word in ("fastrot/train.py", "fastrot.train")]
        if words[0] != "fastrot" and not launched:
            continue
        name, *rest = ("train", *words[launched[0] + 1 :]) if launched else words[1:]
        command = find(name)
        args, unknown = command.parser().parse_known_intermixed_args(rest)
        assert unknown == [], line
        if hasattr(args, "overrides"):
            named = getattr(args, "config", None) or ""
            there = [str(place / named) for place in (tmp_path, ROOT) if (place / named).is_file()]
            configs.load(there[0] if there else None, args.overrides, name if name in LEARNING else None)


def test_every_public_name_has_a_word_in_the_apis_page():
    page = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in fastrot.__all__ if f"`fastrot.{name}`" not in page] == []
    assert [name for name in fastrot.probes.__all__ if f"`{name}(" not in page] == []


@pytest.fixture(scope="module")
def hooks():
    """docs/hooks.py, as mkdocs loads it."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_is_on_the_configs_page_with_its_type_and_a_meaning(hooks):
    rows = re.findall(r"^\*\*`([\w.]+)`\*\* · (.+?) · default `(.+?)`\n:   (.+)$", hooks.config_page(), re.MULTILINE)
    assert [row[0] for row in rows] == configs.known_keys()
    page = {row[0]: row[1:] for row in rows}
    assert page["data.crop"][:2] == ("int ≥ 8, ≤ 4096", "224") and page["data.resize"][:2] == (
        "int > 0 or null",
        "null",
    )
    assert page["optim.name"][:2] == ("`sgd`, `lars`", "sgd") and page["data.scale"][:2] == ("2 x float", "[0.08, 1]")
    for key, (_, default, meaning) in page.items():
        assert len(meaning) > 8, key
        now, said = (configs.flat(configs.load(None, words)[0])[key] for words in ([], [f"{key}={default}"]))
        assert said == now or said == pytest.approx(now, rel=1e-3), key


def test_every_command_is_on_its_page(hooks):
    page = hooks.commands_page()
    assert [name for names in GROUPS.values() for name in names] == re.findall(
        r"^### fastrot ([\w-]+)$", page, re.MULTILINE
    )
    assert "--resume-anyway KEY" in page and "argparse" not in page


def build_site(root, out):
    """`make docs` of a tree: (exit code, all that was said). --quiet would hide the warnings from --strict."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_site_is_whole_without_a_network(tmp_path):
    """Whatever a browser would load for a page lies in the site."""
    code, said = build_site(ROOT, tmp_path / "site")
    assert code == 0, said
    pages = [page for page in (tmp_path / "site").glob("*.html") if page.name != "404.html"]  # a server's own
    assert len(pages) > 20
    for page in pages:
        loads = re.findall(r'<(?:script|img|iframe|link)[^>]* (?:src|href)="([^"]+)"', page.read_text())
        missing = [one for one in loads if not (page.parent / one.partition("?")[0]).exists()]
        assert loads and missing == [], page.name


@pytest.mark.slow
@pytest.mark.parametrize("link", ["../fastrot/no_such_file.py", "no_such_page.md", "data.md#no-such-part"])
def test_a_dead_link_fails(tmp_path, link):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for path in ROOT.iterdir():
        if path.name != "docs":
            (tmp_path / path.name).symlink_to(path)
    with (tmp_path / "docs" / "gpu.md").open("a") as page:
        page.write(f"[dead]({link})")
    code, said = build_site(tmp_path, tmp_path / "site")
    assert code == 1 and link in said
