"""`fastrot linear --checkpoint`: the protocol's heads on a frozen backbone, trained in a run folder like any other."""

from functools import partial

from fastrot import pretrain
from fastrot.backbone import load_backbone
from fastrot.config import Config, flat
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.job import Job, open_manifest
from fastrot.profiling.roofline import Row
from fastrot.tasks.linear import LinearTask

_PRETRAINING = {"compile": False, "cuda_graphs": False, "norm": "torch", "stem_channels": 3, "recompute": False}  # and what leaves them out


class LinearJob(Job):
    """A job that learns heads. checkpoint: of the backbone; classes: of the training images."""

    def __init__(self, checkpoint: str, classes: int, *parts):
        self._checkpoint, self._classes = checkpoint, classes
        super().__init__(*parts)

    def make_task(self):
        config = self.config
        backbone, origin = load_backbone(self._checkpoint)
        self.say(origin.says())
        return LinearTask(
            backbone,
            config.linear.taps,
            config.linear.pool,
            config.data.crop,
            self._classes,
            config.data.mean,
            config.data.std,
            self.ranks.device,
            config.run.seed,
            config.linear.jitter,
            config.linear.lighting,
        )

    def step_rows(self, side: int) -> list[Row]:
        """None: the roof is that of pretraining, whose network learns as a whole."""
        return []


def train_heads(checkpoint: str, config: Config, ranks: Ranks, resume: str) -> dict:
    """Train, or go on training, in run.out. Returns what --json prints. Raises UserError."""
    for wrong, line in (
        (config.rotation.views != "one", "rotation.views must be one: an image is one view, and is not turned"),
        (config.engine.kind != "plain", "engine.kind must be plain: DeepSpeed keeps no state for frozen weights"),
        *((getattr(config.engine, key) != off, f"engine.{key} is for pretraining") for key, off in _PRETRAINING.items()),
    ):
        if wrong:
            raise UserError(f"fastrot linear: {line}; configs/linear_in1k.yaml has it")
    labels = open_manifest(config.data.train, config, ranks, "data.train").label
    if labels.ndim > 1 or int(labels.min()) < 0:
        raise UserError(f"{config.data.train}: every image needs one class; fastrot svm is for many labels")
    digest = load_backbone(checkpoint)[1].sha256
    more = {key: value for key, value in flat(config).items() if key.startswith("linear.")} | {"backbone": digest}
    job = partial(LinearJob, checkpoint, int(labels.max()) + 1)
    return pretrain.train(config, ranks, resume, [], None, job, more)
