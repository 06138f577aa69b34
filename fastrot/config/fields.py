"""Every knob of a run, documented where it stands."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

Pair = tuple[float, float]
Triple = tuple[float, float, float]
Unit = Annotated[float, Field(ge=0, le=1)]
Tap = Literal["feature1", "feature2", "feature3", "feature4", "feature5", "avg"]

GRAPHING_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Data(Section):
    train: str | None = None
    """Training images: a folder of class folders, list:FILE with `path<TAB>label` lines, tar shards, NAME.beton,
    voc:ROOT?split=S; or an address (s3://, gs://, http(s)://), with `stage`, or of shards or a .beton."""
    val: str | None = None
    """Held-out images, same forms; without it nothing is evaluated."""
    stage: str | None = None
    """A folder on each machine's own disk: where data.train and data.val are addresses (s3://, gs://, http(s)://), they
    are copied below it once a machine, as fastrot stage does, and read there. Without it shards and .beton are read where
    they are."""
    decode: Literal["auto", "dali", "turbo", "turbo_fast", "ffcv", "nvimgcodec", "torch"] = "auto"
    """Decoder: dali; turbo, our own, on the CPU; turbo_fast, which scales large windows in the DCT; ffcv (its
    own pixels: area-averaged); nvimgcodec, the library under DALI's decoders by itself (on a GPU not yet seen); torch
    (torchvision); or auto = dali on a GPU, turbo on a CPU, where they run,
    else the next, said in a line."""
    decode_on: Literal["auto", "gpu", "cpu"] = "auto"
    """Where dali and nvimgcodec decode: gpu is DALI's `mixed` path; auto = gpu on a CUDA machine."""
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
    """Window `random_resized`: its width / height: least, most; `squash`: in terms of the image's own."""
    fit: Literal["crop", "squash"] = "crop"
    """How an image becomes a square. crop: its aspect is kept, and evaluation shows the central square; squash: its sides are
    scaled apart, and evaluation shows it whole."""
    flip: Unit = 0.5
    """Probability of a left-right flip."""
    jpeg: Unit = 0.0
    """Share of the training crops that are encoded as a JPEG again, so that a file's own traces say nothing of its turn."""
    jpeg_quality: tuple[Annotated[int, Field(ge=1, le=100)], Annotated[int, Field(ge=1, le=100)]] = (30, 95)
    """Quality of these JPEGs: least, most."""
    chroma_shift: Annotated[float, Field(ge=0, le=16)] = 0.0
    """Most pixels of a training crop that red and blue are each moved along each axis, against a lens's colour fringes."""
    border: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Most of a training crop's side that a bar of one colour covers at an edge, against frames and captions."""
    blur: Annotated[float, Field(ge=0, le=16)] = 0.0
    """Largest standard deviation, pixels, of a blur of training crops, drawn apart for its two axes, against resampling's
    traces."""
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
    readers: PositiveInt = 8
    """Images that a rank reads at once; more for a disk across a network, which answers many in the time of one."""
    hw_decoder_load: Unit | None = None
    """Share of the JPEGs that dali gives to the GPU's hardware decoder; default: as fastrot tune found, else 0.99."""
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
    init: str | None = None
    """Weights that a new run begins with: a run, a checkpoint, or any ResNet's file. The last layer is drawn all the same.
    Default: all are drawn."""
    sync_batchnorm: bool = True
    """Batch norm over the views of all ranks (the recipe); false is another recipe."""
    norm_views: PositiveInt | None = None
    """Batch norm over groups of neighbouring ranks that see as near to this many views at once as equal groups can (the
    recipe: 512); running statistics are the mean over the groups. Default: one group of all ranks."""


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
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "fp32"
    """fp32 (the recipe), fp32 with TF32 products on a GPU, or autocast over fp32 weights; fp16 scales its loss. auto:
    bf16 where this device is faster with it, else fp32, said in a line; the run's config keeps what was taken."""
    loss_scale: PositiveFloat | None = None
    """fp16: a fixed loss scale (the published fp16 variant: 512); default: it moves."""
    zero: Literal[0, 1] = 0
    """DeepSpeed's ZeRO stage; 1 splits the momentum over the ranks and saves under 100 MB here."""
    images_per_micro_step: Annotated[int, Field(ge=2)] | None = None
    """Most images a rank holds at once; default: its whole share. Batch norm sees a micro-step's views."""
    bucket_mb: NonNegativeFloat = 25.0
    """Several ranks average their gradients in buckets of so many MiB while the backward pass still fills the next
    (ZeRO 1: after it; a compiled backward pass gives all at its end); 0: in one piece after it."""
    compile: Literal[False, True, "default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"] = False
    """torch.compile the network; true is mode `default`. The last two modes replay CUDA graphs of their own."""
    channels_last: bool = True
    """Keep the network's weights and maps channels-last."""
    cuda_graphs: Literal[False, True, "auto", "collectives"] = False
    """Replay forward and backward from a CUDA graph for each shape: the host launches nothing. auto: where there is a
    GPU and no norm to synchronise; collectives: over ranks with synchronised norms too, whose communication NCCL then
    captures (not yet seen on GPUs)."""
    symmetric_memory: bool = False
    """Synchronised norms of ranks that share a node read one another's memory over NVLink instead of asking NCCL (not
    yet seen on GPUs)."""
    norm: Literal["torch", "fused", "fused_conv", "fused_chain"] = "torch"
    """Batch norm, addition and ReLU as torch's modules; or as one function of fewer passes (Triton on a GPU); or, in
    a Bottleneck, as parts of its 1x1 convolutions besides; or these too where blocks meet, so that a block's last norm,
    addition and ReLU are parts of the next block's first convolution (compiled or recomputed, it is fused_conv)."""
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
    mirror: str | None = None
    """An address (s3://, gs://, a folder of a shared disk) where each checkpoint is copied to, beside the training; a run
    whose folder is empty, or older, goes on from there."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Of the stream and of the first weights."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps; default: the whole schedule. The schedule itself does not shrink."""
    max_hours: PositiveFloat | None = None
    """Stop after so many hours of this start, with a checkpoint and exit code 75; the same command goes on. As a signal
    (SIGTERM, SIGUSR1) does; leave a few minutes of a scheduler's limit."""
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
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Who gets the numbers of metrics.jsonl too, in the run's folder: TensorBoard; Weights & Biases and MLflow, where their own
    variables (WANDB_MODE, MLFLOW_TRACKING_URI) name no other place."""


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
