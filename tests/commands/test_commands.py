"""The commands: each shows its own words, costs what it uses, and says with an exit code how it went."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from conftest import ROOT
from fastrot import __version__
from fastrot import config as configs
from fastrot.commands import GROUPS, find
from fastrot.errors import Fault, UserError

NAMES = [name for names in GROUPS.values() for name in names]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("page"))
OWN = {  # an option that no other command's help may show
    "index": "--verify",
    "pack": "--raw-share",
    "profile": "--try",
    "estimate": "--gpus-per-node",
    "tune": "--images-per-s",
    "train": "--deepspeed_config",
    "linear": "--features",
    "features": "--taps",
    "lowshot": "--draws",
    "page": "--suite",
    "launch": "--hours",
    "stream": "--first-step",
    "config": "--schema",
}


def test_the_list_names_every_command_in_its_order_and_every_file_is_listed(fastrot):
    lines = fastrot("--help").out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == NAMES
    files = {path.stem.replace("_", "-") for path in (ROOT / "fastrot" / "commands").glob("*.py")}
    assert files - {"--init--", "base"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_the_commands_own_options_and_example_alone(fastrot, name):
    done = fastrot(name, "--help")
    assert done.code == 0 and find(name).example in done.out
    for other, option in OWN.items():
        assert (option in done.out.split("example:")[0].split()) == (other == name)
    assert done.out.count("example:") == 1


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_line_that_the_command_reads(name):
    for line in find(name).example.splitlines():
        words = shlex.split(line)
        if words[0] == "fastrot":
            assert words[1] == name
            find(name).parser().parse_intermixed_args(words[2 : words.index(">") if ">" in words else None])


def test_the_version_is_the_packages(fastrot):
    assert fastrot("--version").out == f"fastrot {__version__}\n"


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "usage: fastrot COMMAND"),
        (["trian"], "did you mean train?"),
        (["--json"], "'--json' is no command"),
        (["train", "--stepz", "3"], "unknown option --stepz"),
        (["stream", "--step", "3"], "unknown option --step"),  # no abbreviations: they change when options are added
        (["svm", "--train", "a", "--test", "b", "optim.lr=1"], "unknown option optim.lr=1"),
        (["knn", "--train", "a"], "required: --test"),
        (["config", "optim.lr=fast"], "optim.lr is 'fast'"),
    ],
)
def test_wrong_words_are_the_users_error(fastrot, words, says):
    done = fastrot(*words)
    assert done.code == 2 and says in done.err


@pytest.mark.parametrize("at", range(4))
def test_overrides_stand_before_between_and_after_options(fastrot, at):
    options = [["--config", "configs/in1k.yaml"], ["--json"], ["--local_rank=0"]]
    options.insert(at, ["optim.lr=0.5"])
    words = [*(word for words in options for word in words), "run.out=last", "run.out=last one"]
    found = fastrot("config", *words).json
    assert found["optim.lr"] == {"value": 0.5, "source": "command line"}
    assert found["optim.epochs"] == {"value": 70, "source": "configs/in1k.yaml"}
    assert found["run.out"]["value"] == "last one" and found["model.arch"]["source"] == "configs/in1k.yaml"
    assert set(found) == set(configs.known_keys())


def test_a_config_is_printed_with_the_source_of_each_value(fastrot):
    lines = fastrot("config", "--config", "configs/in1k.yaml", "data.train=/a b").out.splitlines()
    assert len(lines) == len(configs.known_keys())
    assert lines[0].split(maxsplit=1) == ["data.train", '"/a b"  (command line)']


def test_the_schema_names_and_describes_every_key_of_every_shipped_config(fastrot):
    schema = json.loads(fastrot("config", "--schema").out)
    sections = {
        name: schema["$defs"][
            body["$ref"].rpartition("/")[2] if "$ref" in body else body["allOf"][0]["$ref"].rpartition("/")[2]
        ]
        for name, body in schema["properties"].items()
    }
    keys = {f"{name}.{key}": body for name, section in sections.items() for key, body in section["properties"].items()}
    assert set(keys) == set(configs.known_keys())
    assert all(
        (body["description"] and "\n" not in body["description"].strip("\n")) or body["description"]
        for body in keys.values()
    )
    assert not any(section.get("additionalProperties", True) for section in sections.values())
    for path in CONFIGS:
        for name, body in yaml.safe_load(path.read_text()).items():
            assert set(body) <= set(sections[name]["properties"]), path


def _owner(path):
    owners = ("linear", "semi", "detect", "segment")
    return next((one for one in owners if path.name.startswith(one)), "train").replace("semi", "finetune")


@pytest.mark.parametrize("command", ["train", "linear", "finetune", "detect", "segment"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_config_of_another_command_is_refused_by_name(fastrot, path, command):
    begin = [] if command == "train" else ["--random-init", "0"]
    done = fastrot(command, "--config", path, "data.train=/no/such/folder", *begin)
    assert done.code == 2
    if command == _owner(path):
        assert "is a config of" not in done.err and "/no/such/folder" in done.err
    else:
        assert len(done.errors) == 1 and f"{path}: is a config of fastrot {_owner(path)}," in done.err


def test_an_override_that_a_training_does_not_read_is_refused(fastrot):
    done = fastrot("train", "data.train=/x", "linear.jitter=0")
    assert done.code == 2 and "fastrot train does not read the section linear" in done.err
    assert "does not read" in fastrot("linear", "--random-init", "0", "finetune.fraction=0.5").err


@pytest.mark.parametrize("command", ["train", "linear", "finetune", "detect", "segment"])
@pytest.mark.parametrize("path", [path for path in CONFIGS if "photos" not in path.name], ids=lambda p: p.name)
def test_a_resolved_config_is_no_others(tmp_path, path, command):
    """As a run folder holds it: every section is set."""
    differs = {"linear": "linear.jitter=0", "detect": "detect.regions=64", "segment": "segment.distort=false"}
    config, _ = configs.load(str(path), [differs[_owner(path)]] if _owner(path) in differs else [])
    file = tmp_path / "config.yaml"
    file.write_text(configs.to_yaml(config))
    if command == _owner(path):
        assert configs.load(str(file), [], command)[0] == config
    else:
        with pytest.raises(UserError, match=f"is a config of fastrot {_owner(path)}"):
            configs.load(str(file), [], command)


@pytest.mark.parametrize("error, code", [(None, 0), (Fault("the disk"), 3), (KeyboardInterrupt(), 130)])
def test_exit_codes(fastrot, monkeypatch, error, code):
    from fastrot.demo import scenes

    def fail(*_):
        if error:
            raise error

    monkeypatch.setattr(scenes, "write", fail)
    done = fastrot("demo-data", "--out", "x")
    assert done.code == code
    assert (done.errors == []) == (error is None)
    if code == 130:
        assert done.errors == ["fastrot: stopped by Ctrl-C"]


def test_what_is_not_finite_is_null_in_json(fastrot, monkeypatch):
    from fastrot.commands import config

    command = replace(config.COMMAND, run=lambda _: {"a": float("nan"), "b": [1.5, {"c": float("-inf")}]})
    monkeypatch.setattr(config, "COMMAND", command)
    assert fastrot("config", "--json").out == '{"a": null, "b": [1.5, {"c": null}]}\n'


def _dry(command, images, out):
    data = [f"data.train={images}", "optim.images_per_step=4", "data.crop=16"]
    return {
        "index": ["index", images],
        "pack": ["pack", images, out / "x.beton"],
        "tune": ["tune", *data],
        "stream": ["stream", *data],
        "features": ["features", "--random-init", 0, "--data", images, "--out", out / "f"],
    }[command]


@pytest.mark.parametrize("command", ["index", "pack", "tune", "stream", "features"])
def test_a_dry_run_says_the_rows_and_writes_nothing(fastrot, images, tmp_path, command):
    done = fastrot(*_dry(command, images, tmp_path), "--dry-run", "--json")
    assert list(done.json["rows"].values()) == [len(list(images.rglob("*.jpg")))]
    assert done.json["sources"]["optim.momentum"] == "default" and "nothing was written" in done.err
    assert not list(tmp_path.iterdir())


HEAVY = {"torchvision", "deepspeed", "nvidia.dali", "torch._dynamo", "torch._inductor"}


def test_a_command_imports_what_it_uses(images, tmp_path):
    """One process for all: what one of them imports it has imported, so those that may import more come last."""
    helps = [["--help"], ["knn", "--help"], ["train", "--help"]]
    light = [["config"], ["index", images, "--verify"], ["index", images, "--dry-run"],
             ["pack", images, tmp_path / "x.beton"], ["pack", images, tmp_path / "y.beton", "--dry-run"]]  # fmt: skip
    commands = [
        *((words, HEAVY | {"torch", "pydantic"}) for words in helps),
        *((words, HEAVY | {"torch"}) for words in light),
        (["stream", "--steps=1", f"data.train={images}"], HEAVY),
    ]
    code = f"""import sys
from fastrot.cli import main
for words, absent in {[(list(map(str, words)), absent) for words, absent in commands]}:
    try:
        assert main(words) == 0, words
    except SystemExit as end:
        assert not end.code, words
    assert not absent & set(sys.modules), (words, absent & set(sys.modules))
import fastrot.report.probing
assert not {HEAVY} & set(sys.modules), "knn"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
