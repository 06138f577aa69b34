"""What a GPU does in a few steps: its kernels by kind, and the gaps between them."""

import re

from torch.profiler import profile

_KINDS = {  # the first that fits a kernel's name
    "communication": r"nccl",
    "optimiser": r"multi_tensor_apply|fused_sgd|lars",
    "copies": r"memcpy|memset",
    "convolutions and products": r"conv|fprop|dgrad|wgrad|gemm|xmma|cutlass|nvjet",
}
_REST = "norms and elementwise"
IDLE = "idle"


def kinds(spans: list[tuple[str, float, float]]) -> dict[str, float]:
    """Share of the time from the first to the last, by kind; kinds that run beside one another count twice, and `idle`
    is when none runs. spans: (name, begin, end) of each kernel."""
    if not spans:
        return {}
    ordered = sorted(spans, key=lambda span: span[1])
    reached = began = ordered[0][1]
    total = max(end for _, _, end in spans) - began
    out = dict.fromkeys((*_KINDS, _REST, IDLE), 0.0)
    for name, begin, end in ordered:
        out[IDLE] += max(0.0, begin - reached) / total
        reached = max(reached, end)
        out[_kind(name)] += (end - begin) / total
    return out


def _kind(name: str) -> str:
    return next((kind for kind, words in _KINDS.items() if re.search(words, name, re.IGNORECASE)), _REST)


def of_profiler(profiler: profile) -> dict[str, float]:
    """Those that a profiler saw on a GPU; none without one."""
    events = profiler.events() or []
    on_gpu = [event for event in events if event.device_type.name == "CUDA"]
    return kinds([(event.name, event.time_range.start, event.time_range.end) for event in on_gpu])
