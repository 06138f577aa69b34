"""The config: numbers are numbers, unknown keys and contradictions are refused, all at once."""

from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastrot import config as configs
from fastrot.config import fields
from fastrot.errors import UserError

# page*.yaml are suites of fastrot page: tests/page reads them
FILES = sorted(
    path for path in (Path(__file__).parent.parent / "configs").glob("*.yaml") if not path.name.startswith("page")
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_shipped_config_is_valid_and_reads_back(path, tmp_path):
    config, sources = configs.load(str(path), [])
    assert set(sources) == set(configs.known_keys())
    again = tmp_path / "again.yaml"
    again.write_text(configs.to_yaml(config))
    assert configs.load(str(again), [])[0] == config


def test_in1k_is_the_published_recipe():
    """protocols.md, "Rotation pretraining", row by row."""
    config, _ = configs.load(str(FILES[0].parent / "in1k_fp32.yaml"), [])
    o = config.optim
    assert (o.name, o.images_per_step, o.lr, o.momentum, o.nesterov, o.weight_decay) == (
        "sgd",
        128,
        0.2,
        0.9,
        False,
        1e-4,
    )
    assert (o.epochs, o.schedule, o.milestones, o.gamma, o.warmup_epochs, o.warmup_ratio) == (
        70,
        "step",
        (30, 50),
        0.1,
        5,
        0.1,
    )
    assert o.decay_norms and o.clip is None
    assert (config.model.arch, config.model.sync_batchnorm, config.rotation.views) == ("resnet50", True, "all")
    d = config.data
    assert (d.crop, d.scale, d.ratio, d.flip) == (224, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert (d.mean, d.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (config.engine.precision, config.engine.norm) == ("fp32", "torch")
    fast, _ = configs.load(str(FILES[0].parent / "in1k.yaml"), [])
    ours = {"engine.precision": "bf16", "engine.norm": "fused_conv", "engine.stem_channels": 4, "run.out": "runs/in1k"}
    assert configs.flat(fast) == configs.flat(config) | ours | {"engine.cuda_graphs": "auto"}


@pytest.mark.parametrize(
    "name, epochs, milestones, window",
    [("places205", 28, (7, 14, 21), "random"), ("inat18", 84, (24, 48, 72), "random_resized")],
)
def test_the_linear_heads_of_other_sets_are_the_protocols(name, epochs, milestones, window):
    """protocols.md, "Linear heads", row by row."""
    config, _ = configs.load(str(FILES[0].parent / f"linear_{name}.yaml"), [])
    o = config.optim
    assert (o.name, o.images_per_step, o.lr, o.momentum, o.nesterov, o.weight_decay) == (
        "sgd",
        256,
        0.01,
        0.9,
        True,
        1e-4,
    )
    assert (o.epochs, o.schedule, o.milestones, o.gamma, o.warmup_epochs) == (epochs, "step", milestones, 0.1, 0)
    assert (config.linear.jitter, config.linear.lighting, len(config.linear.taps), config.linear.pool) == (
        0,
        0,
        5,
        "specified",
    )
    assert (config.data.window, config.data.crop, config.data.resize or 256, config.data.flip) == (
        window,
        224,
        256,
        0.5,
    )
    assert (config.run.evaluate_every, config.engine.precision) == (10, "fp32")


@pytest.mark.parametrize(
    "text, value", [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.5e-1", 0.25), ("1e3", 1000.0), (".5", 0.5)]
)
def test_a_number_is_a_number(text, value):
    assert configs.load(None, [f"optim.lr={text}"])[0].optim.lr == value


def test_the_last_override_wins_and_sources_are_told(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 0.3, epochs: 9}\ndata:\n")
    config, sources = configs.load(str(file), ["optim.lr=0.1", "optim.lr=0.7"])
    assert config.optim.lr == 0.7 and config.optim.epochs == 9
    assert (sources["optim.lr"], sources["optim.epochs"], sources["optim.momentum"]) == (
        "command line",
        str(file),
        "default",
    )


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("lr=1", "unknown key lr; did you mean optim.lr?"),
        ("nonsense=1", "unknown key nonsense; sections: data, rotation"),
        ("optim.lr=fast", "optim.lr is 'fast'"),
        ("optim.lr=-1", "greater than 0"),
        ("data.crop_by_epoch=::", "data.crop_by_epoch is ':'"),
        ("data.decode=opencv", "'nvimgcodec' or 'torch'"),
        ("run.max_steps=1.5", "run.max_steps is 1.5"),
        ("optim.lr", "expected section.key=value"),
        ("optim.lr=[", "not YAML"),
        ("optim.epochs=.inf", "finite number"),
        ("data.crop=2024-99-01", "quote it"),
        ("run.seed=-1", "greater than or equal to 0"),
        ("engine.images_per_micro_step=1", "greater than or equal to 2"),
    ],
)
def test_a_wrong_key_or_value_is_one_line(override, words):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        configs.load(None, [override])
    assert words in str(error.value)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(UserError) as error:
        configs.load(None, ["optim.lrr=1", "model.archh=x", "data.crop=tiny"])
    assert len(str(error.value).splitlines()) == 3
    with pytest.raises(UserError) as error:
        configs.load(None, ["data.scale=[0.5,0.2]", "optim.epochs=2", "engine.zero=1", "optim.name=lars"])
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for words in ("data.scale", "warmup_epochs", "engine.zero 1 flattens"):
        assert any(words in line for line in lines)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.ratio=[2,1]"],
        ["data.std=[0,1,1]"],
        ["data.resize=20", "data.crop=32"],
        ["data.jpeg_quality=[95,30]"],
        ["data.fit=squash", "data.window=random"],
        ["data.fit=squash", "data.resize=256"],
        ["data.window=random", "data.crop_by_epoch={0: 96}"],
        ["optim.milestones=[5,3]"],
        ["optim.milestones=[3,3]"],
        ["optim.nesterov=true", "optim.name=lars"],
        ["optim.nesterov=true", "optim.momentum=0"],
        ["engine.zero=1", "engine.kind=plain"],
        ["engine.zero=1", "engine.precision=fp16"],
        *(["data.decode_on=gpu", f"data.decode={name}"] for name in ("torch", "turbo", "turbo_fast", "ffcv")),
        ["engine.recompute=true", "engine.compile=true"],
        ["engine.cuda_graphs=true", "engine.zero=1"],
        ["engine.loss_scale=512"],
        ["engine.cuda_graphs=true", "engine.kind=plain", "engine.compile=reduce-overhead"],
        ["engine.cuda_graphs=true", "engine.kind=plain", "rotation.shuffle_labels=true"],
    ],
)
def test_contradictions_between_fields_are_refused(overrides):
    with pytest.raises(UserError):
        configs.load(None, overrides)


@pytest.mark.parametrize("word", ["true", "false", "default", "max-autotune-no-cudagraphs", "reduce-overhead"])
def test_compile_is_a_switch_or_a_mode(word):
    config, _ = configs.load(None, [f"engine.compile={word}"])
    assert config.engine.compile == {"true": True, "false": False}.get(word, word)
    assert configs.Config.model_validate(yaml.safe_load(configs.to_yaml(config))) == config


@pytest.mark.parametrize(
    "override",
    [
        "engine.compile=fast",
        "engine.compile=2",
        "engine.bucket_mb=-1",
        "data.jpeg=1.5",
        "data.chroma_shift=-1",
        "data.border=0.5",
        "data.blur=17",
        "data.fit=stretch",
    ],
)
def test_a_wrong_value_is_one_line(override):
    with pytest.raises(UserError) as error:
        configs.load(None, [override])
    key, value = override.split("=")
    assert len(str(error.value).splitlines()) == 1 and f"{key} is " in str(error.value) and value in str(error.value)


@pytest.mark.parametrize(
    "text, words", [("- 1", "expected sections"), ("a: [", "not YAML"), ("optim: 3", "unknown key optim")]
)
def test_a_config_file_that_is_none(tmp_path, text, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        configs.load(str(file), [])
    with pytest.raises(UserError, match="No such file"):
        configs.load(str(tmp_path / "none.yaml"), [])


def test_every_field_is_documented_where_it_stands():
    source = Path(fields.__file__).read_text()
    for key in configs.known_keys():
        name = key.split(".")[1]
        assert f"    {name}: " in source
        after = source.split(f"    {name}: ", 1)[1].split("\n", 1)[1].lstrip()
        assert after.startswith('"""'), f"{key} has no docstring"


def test_yaml_written_is_plain_yaml():
    config, _ = configs.load(None, ["data.train=/x"])
    assert yaml.safe_load(configs.to_yaml(config))["data"]["train"] == "/x"


TEXT = ["data.train", "data.val", "run.out", "finetune.names"]


@pytest.mark.parametrize("key", TEXT)
@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_text_arrives_letter_by_letter(key, text):
    """A folder called `x #2`, `010`, `*.tar` or `a: b`."""
    assume(text != "null" and not (len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"))
    assert configs.flat(configs.load(None, [f"{key}={text}"])[0])[key] == text


@pytest.mark.parametrize(
    "text", ["/data/set #2", "a\nb", "x ", " x", "2012", "010", "*.tar", "{000..003}.tar", "/d/a: b", "~", "true", "[a"]
)
def test_text_that_yaml_would_change_arrives_unchanged(text):
    assert configs.load(None, [f"data.train={text}"])[0].data.train == text


@pytest.mark.parametrize(
    "text, value",
    [('"/x y"', "/x y"), ("'/x #y'", "/x #y"), ('"null"', "null"), ("null", None), ("", None), ("'", "'")],
)
def test_quotes_around_text_are_taken_off_and_nothing_unsets_it(text, value):
    assert configs.load(None, [f"data.train={text}"])[0].data.train == value


def test_text_keys_are_those_that_are_text():
    assert [key for key in configs.known_keys() if configs.is_text(key)] == [
        "data.train",
        "data.val",
        "data.stage",
        "finetune.names",
        "model.init",
        "run.out",
        "run.mirror",
    ]


ODD = [
    "!!bool x",
    "!!int",
    "!!timestamp x",
    "0001-01-01T00:00:00+23:59",
    "[" * 500,
    "a\nb: [",
    "{[]: 1}",
    "\0",
    "9" * 5000,
]


@pytest.mark.parametrize("key", [key for key in configs.known_keys() if key not in TEXT])
@given(text=st.one_of(st.sampled_from(ODD), st.text(), st.integers().map(str), st.floats().map(repr)))
@settings(max_examples=15, deadline=None)
def test_any_text_for_any_other_key_is_read_or_refused_in_a_line(key, text):
    try:
        configs.load(None, [f"{key}={text}"])
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@settings(deadline=None)
@given(st.text())
def test_an_override_of_any_text_is_read_or_refused_in_a_line(text):
    """Read where it happens to be an override, of which hypothesis finds some in the sources."""
    try:
        configs.load(None, [text])
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert text.partition("=")[0] in configs.known_keys()
