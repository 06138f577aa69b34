"""What a step needs of memory by estimate, what is left for it here, and what would fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from fastrot import machine
from fastrot.config import Config
from fastrot.data.build import settings_of, sides
from fastrot.data.decode import GPUS_OWN
from fastrot.data.loader import DECODES_IN_FLIGHT
from fastrot.distributed import Ranks
from fastrot.engine import AUTOCAST
from fastrot.errors import Fault, UserError
from fastrot.profiling.memory import peak_of_step
from fastrot.runs.arithmetic import Arithmetic, arithmetic

GIB = 2**30
_ROOM = 0.9  # of what is left that a proposal takes: kernels have workspaces, allocators gaps
# glibc gives blocks above this back to the kernel; of smaller ones its heap took about twice the bytes (measured on
# ResNets, 1.0 to 1.2 of gaps)
_HEAP = 32 * 2**20
# what the host's allocator, CUDA and NCCL, cuBLAS and cuDNN say in errors that they raise for other reasons too
_RAN_OUT = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
_LEAST = 2  # images a rank at once that engine.images_per_micro_step allows


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at the height of a step.

    state      weights, and of momentum and gradients what lies there from one micro-step to the next.
    maps       of `images` images at once: views, what the backward pass keeps of them, gradients as they come.
    ahead      decoded batches that wait where the step wants them.
    device     cuda or cpu: where state, maps and these lie; left: the bytes free there, of the rank that has the least
               of it, for one rank.
    on_host    decoded batches that a decoder of the CPU has in hand for a GPU; host_left: the bytes free there, likewise.
    fits       most images at once that would fit, None if not even two do; fits_norm: views that batch norm then sees.
    """

    state: int
    maps: int
    ahead: int
    device: str
    left: int
    on_host: int
    host_left: int
    images: int
    side: int
    norm: int
    fits: int | None
    fits_norm: int

    @property
    def needed(self) -> int:
        """Where state and maps lie."""
        return self.state + self.maps + self.ahead

    @property
    def enough(self) -> bool:
        return self.needed <= self.left and self.on_host <= self.host_left

    def says(self) -> str:
        """What is needed and what is left, for a person."""
        where = "GPU memory" if self.device == "cuda" else "host memory"
        host = self.on_host > self.host_left
        return (
            f"a rank's {self.images} images of {self.side} at once need about {self.needed / GIB:.1f} GiB of {where}, "
            f"and {self.left / GIB:.1f} GiB are left"
            + (f"; {self.on_host / GIB:.1f} GiB of the host's, and {self.host_left / GIB:.1f} are left" if host else "")
        )

    def proposes(self) -> str:
        """What would fit, for a person."""
        if self.fits is None:
            return f"not even {_LEAST} images at once would fit; lower data.crop, or set engine.recompute=true"
        return f"engine.images_per_micro_step={self.fits} would fit{self._norm_at(self.fits_norm)}"

    def _norm_at(self, views: int) -> str:
        return f" (batch norm then sees {views} views, not {self.norm})" if views != self.norm else ""


def estimate(config: Config, n: Arithmetic, ranks: Ranks, model: nn.Module, dtype: torch.dtype) -> Memory:
    """The step's memory, from a trace of `model` (on the CPU, no norm over ranks) on the meta device. Collective.

    dtype  of the network's maps. As torch runs it: what a compiler fuses needs less.
    """
    side, views = max(sides(config)), n.views_per_image
    waiting, in_hand = _ahead(config, ranks)
    crop = side**2 * 3

    def maps(images: int) -> int:
        gaps = _HEAP if ranks.device.type == "cpu" else 0
        return peak_of_step(model, images * views, config.engine.stem_channels, side, dtype, gaps)

    left, host_left = _left(ranks)
    all_of_it = Memory(
        state=state_bytes(config, n, model),
        maps=maps(n.largest),
        ahead=n.largest * crop * waiting,
        device=ranks.device.type,
        left=left,
        on_host=n.largest * crop * in_hand,
        host_left=host_left,
        images=n.largest,
        side=side,
        norm=n.norm_views,
        fits=n.largest,
        fits_norm=n.norm_views,
    )
    if all_of_it.enough:
        return all_of_it
    few, in_parts = min(_LEAST, n.largest), state_bytes(config, replace(n, micro_steps=2), model)
    fewest = replace(
        all_of_it,
        state=in_parts,
        images=few,
        maps=maps(few),
        ahead=few * crop * waiting,
        on_host=few * crop * in_hand,
    )
    fits = _between(fewest, replace(all_of_it, state=in_parts))
    # smaller blocks leave more gaps, so that line is not sure
    while fits and fits > few and replace(fewest, maps=maps(fits), ahead=fits * crop * waiting).needed > _ROOM * left:
        fits = max(few, fits * 4 // 5)
    engine = config.engine.model_copy(update={"images_per_micro_step": fits or _LEAST})
    fewer = arithmetic(config.model_copy(update={"engine": engine}), n.ranks, n.images)
    return replace(all_of_it, fits=fits, fits_norm=fewer.norm_views)


def _ahead(config: Config, ranks: Ranks) -> tuple[int, int]:
    """(batches that wait where the step is, batches that wait on a GPU's host): the loader brings them to the device as
    soon as they are decoded, and those at the decoder lie where it decodes."""
    done = settings_of(config, ranks).prefetch + 1
    data = config.data
    apart = ranks.device.type == "cuda" and (data.decode_on == "cpu" or data.decode not in ("auto", *GPUS_OWN))
    return (done, DECODES_IN_FLIGHT) if apart else (done + DECODES_IN_FLIGHT, 0)


def _between(fewest: Memory, most: Memory) -> int | None:
    """The most images for which there is room, on the line between those two."""
    shares = [1.0]
    for room, few, many in (
        (_ROOM * most.left, fewest.needed, most.needed),
        (_ROOM * most.host_left, fewest.on_host, most.on_host),
    ):
        if few > room:
            return None
        if many > few:
            shares.append((room - few) / (many - few))
    return fewest.images + int(min(shares) * (most.images - fewest.images))


def state_bytes(config: Config, n: Arithmetic, model: nn.Module) -> int:
    """Weights with their copies for autocast, and what training keeps beside them from one micro-step to the next."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    copies = AUTOCAST[config.engine.precision].itemsize * trained if config.engine.precision in AUTOCAST else 0
    kept = (
        config.optim.momentum > 0,
        n.micro_steps > 1,  # gradients
        n.ranks > 1,  # and the piece or the buckets they are averaged in
        config.engine.zero == 1,  # flat weights
    )
    return 4 * weights + copies + 4 * trained * sum(kept)


def _left(ranks: Ranks) -> tuple[int, int]:
    """(bytes left on the device, on the host) for one rank; of all ranks the least, so that all judge alike."""
    host = machine.memory_left() // ranks.local_world
    device = torch.cuda.mem_get_info(ranks.device)[0] if ranks.device.type == "cuda" else host
    both = torch.tensor([device, host], device=ranks.device)
    dist.all_reduce(both, op=dist.ReduceOp.MIN)
    device, host = both.tolist()
    return device, host


def admit(memory: Memory, say: Callable[[str], None]) -> None:
    """Refuse what the kernel would kill, with a UserError; say a line where a GPU's memory may run out."""
    if memory.enough:
        return
    if memory.device == "cuda" and memory.on_host <= memory.host_left:
        say(f"{memory.says()}: {memory.proposes()}; trying it all the same")
        return
    raise UserError(f"{memory.says()}: {memory.proposes()}")


@contextmanager
def running_out_is_a_fault(memory: Memory) -> Iterator[None]:
    """What torch raises where memory ran out is a Fault of one line: batch, size, and what would fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        ran_out = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not ran_out and not any(words in str(error) for words in _RAN_OUT):
            raise
        fewer = max(_LEAST, memory.images // 2)
        raise Fault(
            f"out of memory: {memory.says()}, by the estimate at its start; set engine.images_per_micro_step="
            f"{min(memory.fits or fewer, fewer)} or less"
        ) from None
