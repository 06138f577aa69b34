"""What must hold between the keys of a config."""

from fastrot.config.fields import GRAPHING_MODES, Config


def cross_field_errors(config: Config) -> list[str]:
    """What is wrong between fields, a line each; empty where all is well."""
    return [line for wrong, line in (*_in_the_recipe(config), *_in_how_it_runs(config)) if wrong]


def _in_the_recipe(config: Config) -> tuple[tuple[bool, str], ...]:
    """(whether it is wrong, a line) of what the images and the steps are."""
    data, optim = config.data, config.optim
    return (
        (not 0 < data.scale[0] <= data.scale[1] <= 1, f"data.scale {list(data.scale)} must rise within (0, 1]"),
        (not 0 < data.ratio[0] <= data.ratio[1], f"data.ratio {list(data.ratio)} must rise and be above 0"),
        (
            data.jpeg_quality[0] > data.jpeg_quality[1],
            f"data.jpeg_quality {list(data.jpeg_quality)} must rise",
        ),
        (
            data.fit == "squash" and (data.window == "random" or data.resize is not None),
            "data.fit squash crops nothing after a resize; leave out data.window random and data.resize",
        ),
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
            config.model.norm_views is not None and not config.model.sync_batchnorm,
            "model.norm_views groups ranks whose norms are synchronised; model.sync_batchnorm is false",
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
    graphs = engine.cuda_graphs not in (False, "auto")
    return (
        (
            "://" in (data.stage or ""),
            f"data.stage {data.stage} must be a folder on this machine's disk",
        ),
        (
            (config.run.mirror or "").startswith(("http://", "https://")),
            "run.mirror cannot be written by http; name s3://, gs:// or a folder of a shared disk",
        ),
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
        (graphs and engine.zero == 1, "engine.cuda_graphs keeps whole gradients; use engine.zero 0"),
        (
            graphs and engine.compile in GRAPHING_MODES,
            f"engine.cuda_graphs would capture the CUDA graphs that engine.compile {engine.compile} makes; set one of them "
            "to false, or engine.compile=max-autotune-no-cudagraphs",
        ),
        (
            engine.loss_scale is not None and engine.precision != "fp16",
            f"engine.loss_scale is fp16's; engine.precision is {engine.precision}",
        ),
        (
            graphs and config.rotation.shuffle_labels,
            "engine.cuda_graphs would replay one shuffle of rotation.shuffle_labels; set one of them to false",
        ),
        (
            data.hw_decoder_load is not None and data.decode not in ("auto", "dali"),
            f"data.hw_decoder_load is dali's; data.decode is {data.decode}",
        ),
        (
            data.decode_on == "gpu" and data.decode not in ("auto", "dali"),
            f"data.decode_on gpu is dali's; data.decode is {data.decode}, which decodes on the CPU alone",
        ),
    )
