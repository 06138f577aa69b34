"""What bench/step.py holds a step against: the same step in plain PyTorch, and the data path that feeds it."""

import statistics
from collections.abc import Callable, Iterator
from itertools import islice

import torch
import torchvision
from harness import spread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torchvision.transforms.v2.functional import normalize

from fastrot import config as configs
from fastrot.data.build import make_loader, open_manifest
from fastrot.data.loader import MicroBatch
from fastrot.distributed import Ranks
from fastrot.profiling.clock import Clock

_WARM_BATCHES = 8  # untimed before a lap: what was made ahead is gone, and the pace is steady


def plain_pytorch(
    arch: str, weights: dict[str, Tensor], pixels: Tensor, ranks: Ranks, compiled: bool
) -> tuple[Callable[[], Tensor], nn.Module]:
    """The same step as people write it: torchvision's network and its usual rotation, channels-last, bf16 autocast,
    fused SGD. (a step -> its mean loss, the network).

    pixels  uint8 [n, S, S, 3], on the device. Over several ranks: DistributedDataParallel, whose norms torch
    synchronises on GPUs alone.
    """
    device = ranks.device
    model = getattr(torchvision.models, arch)(num_classes=4)
    model.load_state_dict(weights)
    model = model.to(device, memory_format=torch.channels_last)
    if ranks.world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = DistributedDataParallel(model) if ranks.world > 1 else model
    if compiled:
        network = torch.compile(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)

    def step() -> Tensor:
        images = pixels.permute(0, 3, 1, 2).float().div(255)
        images = normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        views = torch.cat([torch.rot90(images, turn, (2, 3)) for turn in range(4)])
        views = views.to(memory_format=torch.channels_last)
        turns = torch.arange(4, device=device).repeat_interleave(len(images))
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(network(views), turns)
        loss.backward()
        optimizer.step()
        return loss

    return step, model


def communicated(step: Callable[[], object], ranks: Ranks) -> dict[str, float]:
    """Of a step: what ranks say to one another, in messages, and the seconds of NCCL's kernels (of gloo's work), which
    begin before the last rank is there."""
    on_gpu = [ProfilerActivity.CUDA] if ranks.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu], acc_events=True) as seen:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    own = [event for event in seen.events() if event.name.startswith(("ncclDev", "ncclKernel", "gloo:"))]
    return {"messages": len(own), "seconds": sum(event.time_range.elapsed_us() for event in own) / 1e6}


def batches_of(folder: str, images: int, side: int, ranks: Ranks) -> tuple[Iterator[MicroBatch], str]:
    """A rank's batches of real images without end, as training loads them, and the line that says how."""
    config, _ = configs.load(None, [f"data.train={folder}", f"data.crop={side}"])
    manifest = open_manifest(folder, config, ranks, "--data")
    loader, says = make_loader(config, manifest, ranks, images, None)
    steps = loader.train(range(10**9), 0, images * ranks.world, ranks.world, ranks.rank, 1, lambda epoch: side)
    return (micro for step in steps for micro in step.micro_steps), says


def fed(step, batches: Iterator[MicroBatch], lap: int, rounds: int, device: torch.device) -> dict[str, dict]:
    """Spreads of the seconds a step takes: the data path alone, the step alone on its resident batch, and both at
    once, with the shares of that time spent on waiting for data and on copying it. step.whole(batch or None)."""
    clock, taken, shares = Clock(device), {"data_alone": [], "step_alone": [], "both": []}, {"wait": [], "copy": []}

    def data_alone(times: int) -> None:
        for host in islice(batches, times):
            host.to(device)

    def both(times: int) -> None:
        for host in clock.waiting(islice(batches, times)):
            with clock.stage("copy"):
                batch = host.to(device)
            step.whole(batch)

    def step_alone(times: int) -> None:
        for _ in range(times):
            step.whole()

    for number in range(rounds + 1):
        for name, work in (("data_alone", data_alone), ("step_alone", step_alone), ("both", both)):
            work(1 if name == "step_alone" else _WARM_BATCHES)
            clock.skip()
            work(lap)
            clock.end_step()
            (times,) = clock.read()
            total = sum(times.values())
            if number:
                taken[name].append(total / lap)
                if name == "both":
                    for stage, values in shares.items():
                        values.append(times[stage] / total)
    spreads = {name: spread(values, "_s") for name, values in taken.items()}
    return spreads | {f"{stage}_share": statistics.median(values) for stage, values in shares.items()}
