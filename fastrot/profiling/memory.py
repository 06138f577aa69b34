"""What a training step holds in memory at its height, counted without computing it."""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Held(TorchDispatchMode):
    """Follows the memory of what operations make: `peak`, the most bytes held at a time."""

    def __init__(self, doubled_below: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._doubled_below = doubled_below
        self.peak = self._now = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor, counted: bool = True) -> None:
        """Count a tensor's storage, once, until nothing refers to it; or note that it is not to be counted."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        size *= 2 if size < self._doubled_below else 1
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self._now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)


def peak_of_step(
    model: nn.Module, views: int, channels: int, side: int, dtype: torch.dtype, doubled_below: int = 0
) -> int:
    """Bytes that a forward and backward pass on `views` views [channels, side, side] hold at their height.

    The views, the maps kept for the backward pass, the gradients as they come; not the weights. Traced on a copy of the
    model on the meta device, whose weights and maps are taken to be dtype: nothing is computed, and the kernels' own
    workspaces are not counted. doubled_below: smaller blocks count twice, for an allocator that leaves gaps between
    them. model: returns logits [n, classes], or a list of them.
    """
    model = copy.deepcopy(model).to("meta", dtype).train()
    with torch.device("meta"):
        x = torch.empty(views, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
        target = torch.zeros(views, dtype=torch.long)
    held = _Held(doubled_below)
    for tensor in (*model.parameters(), *model.buffers()):
        held.add(tensor, counted=False)
    held.add(x)
    with held:
        logits = model(x)
        losses = [F.cross_entropy(one.float(), target) for one in (logits if isinstance(logits, list) else [logits])]
        del logits
        torch.stack(losses).sum().backward()
    return held.peak
