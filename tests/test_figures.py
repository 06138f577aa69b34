"""tools/figures.py: documents say what bench/results says."""

import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "figures.py"
spec = importlib.util.spec_from_file_location("figures", TOOL)
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)

WAY = "<!--= a.json / rows / arm=x, y / pace ; {:,.0f} -->"


@pytest.fixture
def results(tmp_path):
    rows = [{"arm": "x, y", "pace": 1801.4}, {"arm": "z", "pace": 1}]
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    return tmp_path


def test_a_figure_that_is_right_stays(results):
    text = f"turbo {WAY}1,801<!-- --> images/s"
    assert figures.renewed(text, results) == (text, [])


def test_a_figure_that_is_not_is_named_and_set(results):
    text, wrong = figures.renewed(f"one\nturbo {WAY}1,900<!-- --> images/s", results)
    assert text == f"one\nturbo {WAY}1,801<!-- --> images/s"
    assert [line for line, _ in wrong] == [2] and "1,900" in wrong[0][1] and "1,801" in wrong[0][1]


@pytest.mark.parametrize(
    "way", ["b.json / rows", "a.json / rows / arm=no / pace", "a.json / no", "a.json / rows / arm=z / pace / more"]
)
def test_a_way_that_leads_nowhere_is_named(results, way):
    text = f"<!--= {way} ; {{:,.0f}} -->1<!-- -->"
    unchanged, wrong = figures.renewed(text, results)
    assert unchanged == text and "leads nowhere" in wrong[0][1]
