"""What the documents claim in numbers follows from the shipped configs, and what they show runs."""

import logging
import re
import shlex

import pytest

import fastrot
from conftest import ROOT, write_folder
from fastrot import config as configs
from fastrot.cli import main
from fastrot.demo import scenes
from fastrot.runs.arithmetic import arithmetic

IMAGENET = 1_281_167
PADDED = 10_010  # steps of an epoch in the published run


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


@pytest.mark.parametrize("page", ["loader", "api"])
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, narrow):
    """As they stand, from an empty folder; demo scenes are not drawn, and the network is small."""

    def few(folder, train, val, seed):
        write_folder(folder / "train", per_class=8, side=72)
        write_folder(folder / "val", per_class=3, side=72)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scenes, "write", few)
    monkeypatch.setattr(logging, "basicConfig", lambda: None)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 7
    names = {}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, f"{page}.md: {text.splitlines()[0]}", "exec"), names)
        else:
            command, *words = shlex.split(text, comments=True)
            assert (language, command) == ("bash", "fastrot") and main(words) == 0


def test_every_public_name_has_a_word_in_the_apis_page():
    page = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in fastrot.__all__ if f"`fastrot.{name}`" not in page] == []
    assert [name for name in fastrot.probes.__all__ if f"`{name}(" not in page] == []
