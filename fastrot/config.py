"""Every knob of a run, documented where it stands; read from YAML and dotted overrides."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from fastrot.errors import UserError

Pair = tuple[float, float]
Triple = tuple[float, float, float]
Unit = Annotated[float, Field(ge=0, le=1)]
Tap = Literal["feature1", "feature2", "feature3", "feature4", "feature5", "avg"]


_OWN = ("linear", "finetune", "detect", "segment")  # commands that train, with a section of their own
GRAPHING_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Data(Section):
    train: str | None = None
    """Training images: a folder of class folders, list:FILE with `path<TAB>label` lines, tar shards, voc:ROOT?split=S."""
    val: str | None = None
    """Held-out images, same forms; without it nothing is evaluated."""
    decode: Literal["auto", "dali", "turbo", "turbo_fast", "ffcv", "torch"] = "auto"
    """Decoder: dali; turbo, our own, on the CPU; turbo_fast, which scales large windows in the DCT; ffcv (its
    own pixels: area-averaged); torch (torchvision); or auto = dali on a GPU, turbo on a CPU, where they run,
    else the next, said in a line."""
    decode_on: Literal["auto", "gpu", "cpu"] = "auto"
    """Where dali decodes: gpu is its `mixed` path; auto = gpu on a CUDA machine."""
    crop: Annotated[int, Field(ge=8, le=4096)] = 224
    """Side of a training and evaluation crop, pixels."""
    crop_by_epoch: dict[int, Annotated[int, Field(ge=8, le=4096)]] = {}
    """Progressive resolution: {first epoch: side}; before the first entry and in evaluation, `crop`."""
    resize: PositiveInt | None = None
    """Evaluation resizes the short side to this before its central crop; default crop * 256 / 224."""
    window: Literal["random_resized", "random"] = "random_resized"
    """A training window: of random area and aspect (RandomResizedCrop); or, as on Places205, a random `crop` of the
    central square of the image whose short side was resized to `resize`."""
    scale: Pair = (0.08, 1.0)
    """Window `random_resized`: share of the image's area that it covers: least, most."""
    ratio: Pair = (3 / 4, 4 / 3)
    """Window `random_resized`: its width / height: least, most."""
    flip: Unit = 0.5
    """Probability of a left-right flip."""
    mean: Triple = (0.485, 0.456, 0.406)
    """Per-channel mean, RGB in [0, 1]."""
    std: Triple = (0.229, 0.224, 0.225)
    """Per-channel standard deviation, RGB in [0, 1]."""
    order: Literal["full", "window"] = "full"
    """Shuffle all rows, or (for slow disks) rows inside windows of neighbouring chunks."""
    window_rows: PositiveInt = 1024
    """Order `window`: neighbouring rows a chunk."""
    window_chunks: PositiveInt = 64
    """Order `window`: chunks a window."""
    threads: PositiveInt | None = None
    """Decoding threads a rank; default: as fastrot tune found, else this machine's cores over its ranks."""
    prefetch: PositiveInt | None = None
    """Micro-batches decoded ahead, a rank; each holds n * crop * crop * 3 bytes. Default: as fastrot tune found, else 3."""
    hw_decoder_load: Unit | None = None
    """Share of the JPEGs that dali gives to the GPU's hardware decoder; default: as fastrot tune found, else DALI's."""
    max_bad: Annotated[int, Field(ge=0)] | None = None
    """Unreadable images that stop a run; default: the larger of 10 and 0.1% of the rows."""
    max_pixels: PositiveInt = 178_000_000
    """Images above this many pixels are quarantined at indexing (decompression bombs)."""
    timeout: PositiveFloat = 300.0
    """Seconds without a decoded batch after which the run ends, naming what it waited for."""


class Rotation(Section):
    views: Literal["all", "one"] = "all"
    """Four turns of every image, or one random turn an image."""
    shuffle_labels: bool = False
    """The control: train on labels shuffled within a micro-step; held-out accuracy must stay at chance."""


class Model(Section):
    arch: Literal["resnet18", "resnet34", "resnet50"] = "resnet50"
    """torchvision's ResNet; the task gives it its head."""
    sync_batchnorm: bool = True
    """Batch norm over the views of all ranks (the recipe); false is another recipe."""


class Optim(Section):
    name: Literal["sgd", "lars"] = "sgd"
    """SGD with momentum, or LARS for large batches."""
    images_per_step: PositiveInt = 128
    """Images a step over all ranks, before rotation."""
    lr: PositiveFloat = 0.2
    """Peak rate at images_per_step; never scaled behind your back."""
    epochs: PositiveFloat = 70
    """Passes over the training images."""
    steps: PositiveInt | None = None
    """The run's length in steps instead of epochs; milestones are then steps too."""
    momentum: Unit = 0.9
    """Momentum of SGD and LARS; dampening is 0."""
    nesterov: bool = False
    """Nesterov's momentum (SGD)."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty added to the gradient."""
    decay_norms: bool = True
    """Whether the decay also hits batch-norm weights and biases (the recipe: yes)."""
    clip: PositiveFloat | None = None
    """Largest gradient norm over all parameters; none clips nothing."""
    schedule: Literal["step", "cosine", "poly"] = "step"
    """Shape of the rate after warm-up."""
    milestones: tuple[float, ...] = (30, 50)
    """Schedule `step`: epochs (steps, where optim.steps is set) at which the rate is multiplied by gamma."""
    gamma: PositiveFloat = 0.1
    """Schedule `step`: the factor."""
    power: PositiveFloat = 0.9
    """Schedule `poly`: the exponent."""
    final_lr: NonNegativeFloat = 0.0
    """Schedules `cosine` and `poly`: the rate at the end."""
    warmup_epochs: NonNegativeFloat = 5
    """Linear warm-up, per step, over this many epochs."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The warm-up's length in steps instead of epochs."""
    warmup_ratio: Unit = 0.1
    """The warm-up starts at this share of the rate."""
    trust: PositiveFloat = 0.001
    """LARS: trust coefficient eta."""


class Engine(Section):
    kind: Literal["deepspeed", "plain"] = "deepspeed"
    """DeepSpeed, or plain torch (its oracle in the tests)."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """fp32 (the recipe), fp32 with TF32 products on a GPU, or autocast over fp32 weights; fp16 scales its loss."""
    zero: Literal[0, 1] = 0
    """DeepSpeed's ZeRO stage; 1 splits the momentum over the ranks and saves under 100 MB here."""
    images_per_micro_step: Annotated[int, Field(ge=2)] | None = None
    """Most images a rank holds at once; default: its whole share. Batch norm sees a micro-step's views."""
    bucket_mb: NonNegativeFloat = 25.0
    """Several ranks average their gradients in buckets of so many MiB while the backward pass still fills the next
    (ZeRO 1: after it; a compiled backward pass gives all at its end, but where synchronised norms divide it);
    0: in one piece after it."""
    compile: Literal[False, True, "default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"] = False
    """torch.compile the network; true is mode `default`. The last two modes replay CUDA graphs of their own."""
    channels_last: bool = True
    """Keep the network's weights and maps channels-last."""
    cuda_graphs: bool = False
    """Replay forward and backward from a CUDA graph for each shape (plain engine): the host launches nothing."""
    norm: Literal["torch", "fused", "fused_conv"] = "torch"
    """Batch norm, addition and ReLU as torch's modules; or as one function of fewer passes (Triton on a GPU); or, in
    a Bottleneck, as parts of its 1x1 convolutions besides."""
    stem_channels: Literal[3, 4] = 3
    """Channels of the views; the fourth is zero, and so is its filter: memory and tensor cores like fours."""
    recompute: bool = False
    """Keep each residual block's input alone and compute its maps again in the backward pass: a fraction of the
    memory for a second forward pass."""
    max_bad_steps: PositiveInt = 10
    """Steps in a row whose loss is not finite that end a run; seen where a line is logged."""
    deterministic: bool = False
    """Only deterministic CUDA algorithms, so that a resume is equal bit for bit on a GPU; slower."""


class Run(Section):
    out: str = "runs/rotation"
    """The run's folder: config, metrics, checkpoints; nothing is written outside it but named caches."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Of the stream and of the first weights."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps; default: the whole schedule. The schedule itself does not shrink."""
    log_every: PositiveInt = 50
    """Steps between lines of metrics.jsonl; a checkpoint's step is logged too."""
    evaluate_every: PositiveInt = 1
    """Epochs between evaluations of the held-out images; the end is evaluated always."""
    evaluate_every_steps: PositiveInt | None = None
    """Steps between them instead."""
    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints; the end is saved always."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Checkpoints kept; the best on the held-out images is kept besides."""
    timeout: PositiveFloat = 600.0
    """Seconds that ranks wait for one another in training; one that is gone or stopped then ends the run."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""


class Linear(Section):
    taps: tuple[Tap, ...] = ("feature1", "feature2", "feature3", "feature4", "feature5")
    """Where a head reads the frozen backbone; avg is stage 4's global average."""
    pool: Literal["specified", "gap", "adaptive"] = "specified"
    """How a head pools; specified is the protocol's, for crops of 224."""
    jitter: Unit = 0.4
    """Brightness, contrast and saturation are multiplied by up to 1 +- this; 0 leaves them."""
    lighting: NonNegativeFloat = 0.1
    """Standard deviation of the weights of the principal colours that are added; 0 adds none."""


class Finetune(Section):
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of every class of data.train to learn from, drawn by run.seed; at least an image a class."""
    names: str | None = None
    """Instead of a drawn share: a published list of file names, one a line (what follows a space is not read)."""
    head_rate: PositiveFloat = 1.0
    """The last layer's rate is this many times optim.lr."""


class Detect(Section):
    model: Literal["c4", "fpn"] = "c4"
    """Faster R-CNN on stage 3's maps, whose box head is stage 4; or Mask R-CNN on a feature pyramid, with masks."""
    regions: PositiveInt = 512
    """Regions sampled an image in training."""
    shorts: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = tuple(range(480, 801, 32))
    """Training resizes the short side to one of these, drawn by image and epoch."""
    test_short: PositiveInt = 800
    """Evaluation resizes the short side to this."""
    longest: PositiveInt = 1333
    """Where the long side would pass this it is resized to it instead."""
    figures: Literal["voc", "coco"] = "voc"
    """Figures: VOC's 11-point AP, as mmdetection and as detectron2 define it; or COCO's AP, of boxes and masks."""


class Segment(Section):
    classes: Annotated[int, Field(ge=2, le=255)] = 21
    """Classes of a pixel, 0 to this less one; 255 is no class."""
    base: tuple[PositiveInt, PositiveInt] = (2048, 512)
    """Long and short side within which an image is resized, before `scales`."""
    scales: Pair = (0.5, 2.0)
    """Training multiplies `base` by a factor between these."""
    crop: PositiveInt = 512
    """Side of training's crops; smaller images are padded."""
    slide: tuple[PositiveInt, PositiveInt] | None = None
    """Evaluation slides windows of this (side, stride) over an image; default: the whole image at once."""
    align_corners: bool = False
    """How logits are resized: corners' centres on one another."""
    distort: bool = True
    """Whether training shifts brightness, contrast, saturation and hue."""


class Config(Section):
    """A run's settings: ten sections, each of which may be left out."""

    data: Data = Data()
    rotation: Rotation = Rotation()
    linear: Linear = Linear()
    finetune: Finetune = Finetune()
    detect: Detect = Detect()
    segment: Segment = Segment()
    model: Model = Model()
    optim: Optim = Optim()
    engine: Engine = Engine()
    run: Run = Run()


def cross_field_errors(config: Config) -> list[str]:
    """What is wrong between fields, a line each; empty where all is well."""
    return [line for wrong, line in (*_in_the_recipe(config), *_in_how_it_runs(config)) if wrong]


def _in_the_recipe(config: Config) -> tuple[tuple[bool, str], ...]:
    """(whether it is wrong, a line) of what the images and the steps are."""
    data, optim = config.data, config.optim
    return (
        (not 0 < data.scale[0] <= data.scale[1] <= 1, f"data.scale {list(data.scale)} must rise within (0, 1]"),
        (not 0 < data.ratio[0] <= data.ratio[1], f"data.ratio {list(data.ratio)} must rise and be above 0"),
        (min(data.std) <= 0, f"data.std {list(data.std)} must be above 0"),
        (
            data.resize is not None and data.resize < data.crop,
            f"data.resize {data.resize} is below data.crop {data.crop}",
        ),
        (
            data.window == "random" and bool(data.crop_by_epoch),
            "data.window random cuts data.crop out of data.resize; data.crop_by_epoch cannot change it",
        ),
        (
            config.finetune.names is not None and config.finetune.fraction < 1,
            "finetune.names and finetune.fraction both choose images; set one",
        ),
        (
            optim.steps is None
            and optim.warmup_steps is None
            and optim.warmup_epochs >= optim.epochs
            and optim.warmup_epochs > 0,
            f"optim.warmup_epochs {optim.warmup_epochs:g} leaves nothing of optim.epochs {optim.epochs:g}",
        ),
        (
            optim.steps is not None and (optim.warmup_steps or 0) >= optim.steps,
            f"optim.warmup_steps {optim.warmup_steps} leaves nothing of optim.steps {optim.steps}",
        ),
        (
            optim.steps is not None and optim.warmup_steps is None and optim.warmup_epochs > 0,
            "optim.steps counts the run in steps; set optim.warmup_steps too",
        ),
        (
            not 0 < config.segment.scales[0] <= config.segment.scales[1],
            f"segment.scales {list(config.segment.scales)} must rise and be above 0",
        ),
        (
            list(optim.milestones) != sorted(set(optim.milestones)),
            f"optim.milestones {list(optim.milestones)} must rise",
        ),
        (optim.nesterov and optim.name == "lars", "optim.nesterov is SGD's; optim.name is lars"),
        (optim.nesterov and optim.momentum == 0, "optim.nesterov needs optim.momentum above 0"),
    )


def _in_how_it_runs(config: Config) -> tuple[tuple[bool, str], ...]:
    """The same of the engine and the decoder."""
    data, optim, engine = config.data, config.optim, config.engine
    return (
        (engine.zero == 1 and engine.kind == "plain", "engine.zero 1 is DeepSpeed's; engine.kind is plain"),
        (
            engine.zero == 1 and optim.name == "lars",
            "engine.zero 1 flattens the layers whose norms optim.name lars needs; use engine.zero 0",
        ),
        (
            engine.zero == 1 and engine.precision == "fp16",
            "engine.zero 1 with engine.precision fp16: DeepSpeed 0.19's loss scale never falls there after an "
            "overflow; use bf16, or engine.zero 0",
        ),
        (
            engine.recompute and bool(engine.compile),
            "engine.recompute with engine.compile: the compiler chooses what to compute again; set one to false",
        ),
        (
            engine.cuda_graphs and engine.kind != "plain",
            "engine.cuda_graphs is the plain engine's; set engine.kind=plain",
        ),
        (
            engine.cuda_graphs and engine.compile in GRAPHING_MODES,
            f"engine.cuda_graphs would capture the CUDA graphs that engine.compile {engine.compile} makes; set one of them "
            "to false, or engine.compile=max-autotune-no-cudagraphs",
        ),
        (
            engine.cuda_graphs and engine.precision == "fp16",
            "engine.cuda_graphs with engine.precision fp16: the loss scale changes from step to step; use bf16",
        ),
        (
            engine.cuda_graphs and config.rotation.shuffle_labels,
            "engine.cuda_graphs would replay one shuffle of rotation.shuffle_labels; set one of them to false",
        ),
        (
            data.hw_decoder_load is not None and data.decode not in ("auto", "dali"),
            f"data.hw_decoder_load is dali's; data.decode is {data.decode}",
        ),
        (data.decode == "torch" and data.decode_on == "gpu", "data.decode_on gpu is dali's; data.decode is torch"),
    )


class _Loader(yaml.SafeLoader):
    """YAML whose 1e-4 is a number (YAML 1.2's rule; PyYAML's own follows 1.1, where it is text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _shown(text: str) -> str:
    """As it is, or escaped where it would not stay on its line."""
    return text if text.isprintable() else repr(text)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{_shown(where)}{line}: not YAML ({_shown(why)})") from None
    except RecursionError:
        raise UserError(f"{_shown(where)}: not YAML (nested too deep)") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # what PyYAML's constructors raise for a value that is none of its kind, such as the date 2024-99-01
        raise UserError(f"{_shown(where)}: {_shown(str(error))}; quote it") from None


def _section(name: str) -> type[Section]:
    return cast(type[Section], Config.model_fields[name].annotation)


def is_text(key: str) -> bool:
    """Whether the values of a section.key are text, which an override gives letter by letter."""
    section, _, name = key.partition(".")
    field = _section(section).model_fields.get(name) if section in Config.model_fields else None
    return field is not None and field.annotation in (str, str | None)


def _value(key: str, text: str, where: str) -> Any:
    """An override's value. Text is taken as it is, but for quotes around it and for nothing or `null`, which unset
    the key; all else is YAML."""
    if not is_text(key):
        return _parse(text, where)
    if text in ("", "null"):
        return None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return str(_parse(text, where)) if quoted else text


def _flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{section: {key: value}} as {section.key: value}; values that are mappings stay whole."""
    flat: dict[str, Any] = {}
    for section, body in tree.items():
        if section in Config.model_fields and isinstance(body, dict):
            flat |= {f"{section}.{key}": value for key, value in body.items()}
        elif not (section in Config.model_fields and body is None):
            flat[str(section)] = body
    return flat


def known_keys() -> list[str]:
    """Every dotted key there is, in the order of the sections."""
    return [f"{name}.{key}" for name in Config.model_fields for key in _section(name).model_fields]


def _meant_for(values: dict[str, Any]) -> str | None:
    """The command that a file's values are for; None where several could read it.

    `linear`, `finetune`, `detect` and `segment` have a section each, and a file that sets one of them is for that
    command. A file that says how to learn (optim) and sets none is for `train`. A resolved config, as run folders hold,
    sets several: it is for the one whose section differs from the defaults, or for `train` where rotation.views is all.
    """
    own = {name: [key for key in values if key.startswith(f"{name}.")] for name in _OWN}
    named = [name for name, keys in own.items() if keys]
    if len(named) > 1:
        usual = flat(Config())
        named = [name for name, keys in own.items() if any(_changed(values[key], usual.get(key)) for key in keys)]
        if not named:
            return "train" if values.get("rotation.views") == "all" else None
    if len(named) == 1:
        return named[0]
    learns = any(key.startswith("optim.") for key in values)
    return "train" if not named and learns and values.get("rotation.views") != "one" else None


def _changed(value: Any, usual: Any) -> bool:
    return bool(value != usual)


def _refuse_foreign(path: str | None, values: dict[str, Any], overrides: list[str], command: str) -> None:
    """Raise UserError where a command that trains is given a file, or an override, that is another's."""
    meant = _meant_for(values)
    if meant not in (None, command):
        raise UserError(
            f"--config {path}: is a config of fastrot {meant}, and fastrot {command} would train another thing with it"
        )
    for override in overrides:
        section = override.partition(".")[0]
        if section in _OWN and section != command:
            raise UserError(f"{_shown(override)}: fastrot {command} does not read the section {section}")


def load(path: str | None, overrides: list[str], command: str | None = None) -> tuple[Config, dict[str, str]]:
    """The resolved config, and where each key's value comes from (file, command line, default).

    path       a YAML file of sections, or None for the defaults.
    overrides  "section.key=value", the last one wins. Values of text keys are taken literally, others are YAML.
    command    train, linear, finetune, detect or segment: refuse a file that is for another of them, or an override that it does not
               read. A command that trains nothing reads any file, and of it what it needs.
    Raises UserError with one line for each thing that is wrong.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"--config {path}: {reason}") from None
        tree = _parse(text, path) or {}
        if not isinstance(tree, dict):
            raise UserError(f"--config {path}: expected sections ({', '.join(Config.model_fields)})")
        values = _flatten(tree)
        sources = dict.fromkeys(values, path)
    if command is not None:
        _refuse_foreign(path, values, overrides, command)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: expected section.key=value, as in optim.lr=0.1")
        values[key] = _value(key, value, override)
        sources[key] = "command line"
    return _validated(values, sources), {key: sources.get(key, "default") for key in known_keys()}


def _validated(values: dict[str, Any], sources: dict[str, str]) -> Config:
    known = known_keys()
    wrong = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.6) or [
                k for k in known if k.endswith("." + key.rpartition(".")[2])
            ]
            hint = f"; did you mean {near[0]}?" if near else f"; sections: {', '.join(Config.model_fields)}"
            wrong.append(f"{sources[key]}: unknown key {_shown(key)}{hint}")
    tree: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key in known:
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
    try:
        config = Config.model_validate(tree)
    except ValidationError as errors:
        for error in errors.errors():
            key = ".".join(str(part) for part in error["loc"][:2])
            wrong.append(f"{sources.get(key, 'default')}: {key} is {error['input']!r}: {error['msg']}")
    else:
        wrong += cross_field_errors(config)
    if wrong:
        raise UserError("\n".join(wrong))
    return config


def flat(config: Config) -> dict[str, Any]:
    """The resolved config as {section.key: value}, plain JSON values."""
    return {
        f"{section}.{key}": value
        for section, body in config.model_dump(mode="json").items()
        for key, value in body.items()
    }


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
