"""How a step is shared out over ranks and micro-steps, and what cannot be."""

import math
from dataclasses import dataclass

from fastrot.config import GRAPHING_MODES, Config
from fastrot.data.build import sides
from fastrot.data.plan import micro_steps_of, slice_of
from fastrot.distributed import Ranks
from fastrot.engine import AUTOCAST
from fastrot.engine.schedules import lr_at
from fastrot.errors import UserError

RECIPE_VIEWS = 512  # that batch norm sees in the published run


@dataclass(frozen=True)
class Arithmetic:
    """How a step is shared out. images: of a step over all ranks; largest: of one rank at once; norm_groups: of ranks
    whose views batch norm sees together; norm_views, norm_most: the fewest and the most that a group sees at once."""

    images: int
    ranks: int
    micro_steps: int
    views_per_image: int
    steps: int
    largest: int
    norm_groups: int
    norm_views: int
    norm_most: int


def arithmetic(config: Config, ranks: int, rows: int) -> Arithmetic:
    """The step's shares. Raises UserError where a rank would get no image."""
    images, engine = config.optim.images_per_step, config.engine
    views = _views_per_image(config)
    if rows < ranks:
        raise UserError(f"data.train: {rows} images for {ranks} ranks; start at most one rank an image")
    if images < ranks:
        raise UserError(
            f"optim.images_per_step {images} leaves some of {ranks} ranks without an image; "
            f"raise it to {ranks} or more, or start fewer ranks"
        )
    micro_steps = micro_steps_of(images, ranks, engine.images_per_micro_step)
    groups = norm_groups(config, ranks)

    def sizes(parts: int) -> list[int]:
        """Images at once of each of so many equal groups of ranks, in every micro-step."""
        slices = (slice_of(images, parts, micro_steps, a, r) for a in range(micro_steps) for r in range(parts))
        return [last - first for first, last in slices]

    norm, most = (bound(sizes(groups)) * views for bound in (min, max))
    if norm < 2:
        raise UserError(
            f"optim.images_per_step {images} leaves batch norm {norm} view at a time; raise it, or rotation.views=all"
        )
    steps = steps_left(config, rows, 0, 0)
    return Arithmetic(images, ranks, micro_steps, views, steps, max(sizes(ranks)), groups, norm, most)


def _views_per_image(config: Config) -> int:
    return 4 if config.rotation.views == "all" else 1


def norm_groups(config: Config, ranks: int) -> int:
    """Into how many groups of neighbouring ranks, all of one size, batch norm parts them: of two that come as near to
    model.norm_views the more, whose ranks say less to one another."""
    if not config.model.sync_batchnorm:
        return ranks
    if config.model.norm_views is None:
        return 1
    images, wanted = config.optim.images_per_step, config.model.norm_views
    views = images * _views_per_image(config) / micro_steps_of(images, ranks, config.engine.images_per_micro_step)
    return min(
        (groups for groups in range(ranks, 0, -1) if ranks % groups == 0),
        key=lambda groups: abs(math.log(views / groups / wanted)),
    )


def refuse_norm_views(config: Config, n: Arithmetic) -> None:
    """Raise UserError where model.norm_views is more than all ranks see at once, or less than one of them does."""
    wanted, most = config.model.norm_views, n.images * n.views_per_image // n.micro_steps
    if wanted is None:
        return
    if wanted > most:
        raise UserError(
            f"model.norm_views {wanted}: all {n.ranks} ranks together see {most} views at once; lower it, or raise "
            "optim.images_per_step or engine.images_per_micro_step"
        )
    if wanted < most // n.ranks:
        raise UserError(
            f"model.norm_views {wanted}: each of {n.ranks} ranks sees {most // n.ranks} views at once; raise it, or set "
            f"engine.images_per_micro_step={max(2, wanted // n.views_per_image)}"
        )


def steps_left(config: Config, rows: int, step: int, position: int) -> int:
    """Steps from here to the end of the schedule; step, position: done, and where the stream stands."""
    optim = config.optim
    if optim.steps is not None:
        return max(0, optim.steps - step)
    return max(0, math.ceil((optim.epochs * rows - position) / optim.images_per_step))


def rate_at(config: Config, rows: int, epoch: float) -> float:
    """The rate of the step that begins at `epoch` = stream position / rows.

    The schedule is counted in epochs, or in steps where optim.steps is set.
    """
    optim = config.optim
    steps_an_epoch = rows / optim.images_per_step
    if optim.steps is not None:
        at, end = round(epoch * steps_an_epoch, 6), float(optim.steps)  # rounded: milestones are whole numbers
        warmup = float(optim.warmup_steps or 0)
    else:
        at, end = epoch, optim.epochs
        warmup = optim.warmup_epochs if optim.warmup_steps is None else optim.warmup_steps / steps_an_epoch
    return lr_at(
        at,
        epochs=end,
        peak=optim.lr,
        schedule=optim.schedule,
        warmup_epochs=warmup,
        warmup_ratio=optim.warmup_ratio,
        milestones=optim.milestones,
        gamma=optim.gamma,
        power=optim.power,
        final=optim.final_lr,
    )


def deviations(config: Config, ranks: Ranks) -> list[str]:
    """A line for each way in which these ranks and this engine compute another step than the config may seem to say,
    and for what is compiled before the first."""
    e, alone = config.engine, ranks.world == 1
    lines = (
        (
            not alone and not config.model.sync_batchnorm,
            f"model.sync_batchnorm is off: batch norm over each rank's views alone, not the recipe's {RECIPE_VIEWS}",
        ),
        (
            not alone and norm_groups(config, ranks.world) > 1,
            "running statistics are the mean over ranks, of each step's, since not all ranks' norms see the same views",
        ),
        (e.zero and e.precision in AUTOCAST, f"engine.zero 1 communicates gradients in {e.precision}"),
        (
            uses_graphs(config, ranks) and not alone,
            "engine.cuda_graphs averages gradients in one piece after the backward pass, not by engine.bucket_mb",
        ),
        (
            e.cuda_graphs == "auto" and ranks.device.type == "cuda" and _norms_talk(config, ranks),
            "engine.cuda_graphs auto: off, since ranks synchronise their norms; engine.cuda_graphs=collectives captures "
            "that too",
        ),
        (
            e.compile,
            "engine.compile: the network is compiled in the first step of each of "
            f"{len(sides(config))} crop sizes, a minute or more each; later starts find it in the cache",
        ),
        (
            e.norm != "torch" and ranks.device.type == "cuda",
            f"engine.norm {e.norm}: its kernels are compiled in the first step, about a second each, once",
        ),
    )
    return [line for holds, line in lines if holds]


def uses_graphs(config: Config, ranks: Ranks) -> bool:
    """Whether forward and backward are replayed from CUDA graphs of ours."""
    e = config.engine
    if e.cuda_graphs != "auto":
        return bool(e.cuda_graphs)
    can = (
        not e.zero and e.compile not in GRAPHING_MODES and e.precision != "fp16" and not config.rotation.shuffle_labels
    )
    return can and ranks.device.type == "cuda" and not _norms_talk(config, ranks)


def _norms_talk(config: Config, ranks: Ranks) -> bool:
    return norm_groups(config, ranks.world) < ranks.world


def refuse_graphs(config: Config, ranks: Ranks, micro_steps: int) -> None:
    """Raise UserError where a step cannot be, or is not shown to be, replayed rightly from CUDA graphs: ours, or
    those of torch.compile's mode."""
    mode = config.engine.compile
    if mode not in GRAPHING_MODES and not uses_graphs(config, ranks):
        return
    switch = f"engine.compile {mode}" if mode in GRAPHING_MODES else "engine.cuda_graphs"
    if ranks.device.type != "cuda":
        raise UserError(f"{switch} needs a CUDA device, and there is none; set it to false")
    if _norms_talk(config, ranks) and config.engine.cuda_graphs != "collectives":
        raise UserError(
            f"{switch} over {ranks.world} ranks would capture batch norm's communication, or cut its graphs there, which "
            "is not shown to work; set it to false, or model.sync_batchnorm=false (another recipe), or try "
            "engine.cuda_graphs=collectives"
        )
    if mode in GRAPHING_MODES and micro_steps > 1:
        raise UserError(
            f"{switch} keeps gradients in its graphs' memory, where the next of {micro_steps} micro-steps overwrites "
            "them; take engine.compile=max-autotune-no-cudagraphs, or leave engine.images_per_micro_step unset"
        )


def refuse_symmetric_memory(config: Config, ranks: Ranks) -> None:
    """Raise UserError where ranks whose norms are synchronised cannot read one another's memory."""
    if not config.engine.symmetric_memory or not _norms_talk(config, ranks):
        return
    switch, among = "engine.symmetric_memory", ranks.world // norm_groups(config, ranks.world)
    if ranks.device.type != "cuda":
        raise UserError(f"{switch} needs CUDA devices, and there is none; set it to false")
    if ranks.local_world % among:
        raise UserError(
            f"{switch}: norms are synchronised over {among} ranks, not all of which are on one node of "
            f"{ranks.local_world}; set it to false, or model.norm_views so that a node holds whole groups"
        )
    if config.engine.compile:
        raise UserError(f"{switch}: a compiler does not see what ranks read; set it or engine.compile to false")


def refuse_tiny_maps(config: Config, ranks: Ranks) -> None:
    """Raise UserError where a 3 x 3 convolution of stride 2 meets 1 x 1 maps in 16 bits on a CPU: oneDNN leaves the
    weights' gradient unwritten outside the middle (torch 2.11)."""
    smallest = min(sides(config))
    if ranks.device.type == "cpu" and config.engine.precision in AUTOCAST and smallest <= 16:
        raise UserError(
            f"data.crop {smallest} with engine.precision {config.engine.precision} on a CPU: torch's gradients of 1 x 1 "
            "maps hold unwritten memory there; use crops above 16, or fp32"
        )
