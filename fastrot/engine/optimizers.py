"""Optimisers: pure torch, pure functions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

HEAD = "fc."  # torchvision's name of a network's last layer


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_norms: bool, head_rate: float = 1.0
) -> list[dict[str, Any]]:
    """Matrices and filters in one group, vectors (norms, biases) in another that may go undecayed.

    head_rate  rate of the last layer in terms of the others'; groups of its own where it is not 1.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = head_rate if name.startswith(HEAD) else 1.0
            groups.setdefault((rate, p.ndim > 1), []).append(p)
    return [
        {
            "params": params,
            "adapt": matrices,
            "weight_decay": weight_decay if matrices or decay_norms else 0.0,
            "rate": rate,
        }
        for (rate, matrices), params in groups.items()
    ]


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    decay_norms: bool,
    trust: float,
    head_rate: float = 1.0,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """SGD or LARS over the model's parameters.

    fused  one pass over the weights; not where a loss scaler must unscale before our clipping.
    """
    groups = parameter_groups(model, weight_decay, decay_norms, head_rate)
    if name == "lars":
        return LARS(groups, lr=lr, momentum=momentum, trust=trust)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose rate in each layer follows ||w|| / ||g||.

    Groups with adapt=False (norms, biases) get plain SGD. The rate enters after the momentum.
    Source: You, Gitman, Ginsburg, arXiv:1708.03888.
    """

    def __init__(
        self,
        params: list[dict[str, Any]] | list[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ):
        each = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        super().__init__(params, each | {"foreach": True})  # which zero_grad reads

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch has an overload each
        """One update; no host sync. Layers of zero norm keep a ratio of 1."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if group["adapt"]:
                w = torch.stack(torch._foreach_norm(params))
                g = torch.stack(torch._foreach_norm([p.grad for p in params]))
                ratio = group["trust"] * w / (g + group["weight_decay"] * w)
                ratio = torch.where((w > 0) & (g > 0), ratio, 1.0)
                torch._foreach_mul_(updates, list(ratio.unbind()))
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)


def clip_and_measure(parameters: Sequence[nn.Parameter], most: float | None) -> Tensor:
    """The gradient's norm over all parameters before clipping (a device tensor, no host sync)."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    if most is not None:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm
