"""What both engines share: exact scaling, state by parameter name, sums over ranks."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from fastrot.distributed import Ranks
from fastrot.engine import AUTOCAST, StepSettings
from fastrot.engine.buckets import Buckets
from fastrot.engine.optimizers import clip_and_measure
from fastrot.profiling.clock import communicating

_PREFIX = "momentum_buffer/"


class Engine:
    """A model, its optimiser, and the five calls the loop makes.

    module     called for the forward pass, under autocast: views [n, C, S, S], or what else a task's network takes, ->
               what it gives.
    grad_norm  norm of the last step's gradient before clipping: a tensor, or a float under ZeRO 1;
               infinite where fp16 skipped the update.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: StepSettings, ranks: Ranks):
        self.model, self.optimizer = model, optimizer
        self.module: Callable[..., Any] = model
        self.grad_norm: Tensor | float = 0.0
        self._settings, self._ranks = settings, ranks
        self._autocast = AUTOCAST.get(settings.precision)
        self._buckets: Buckets | None = None
        self._measure = True

    def backward(self, loss: Tensor, views_of_step: int, last: bool = False) -> None:
        """Add the gradient of a micro-step. loss: the sum over this rank's views.

        Scaled by ranks / views of the whole step, so that the mean over ranks is the mean over
        views however uneven the shares are.
        last  no micro-step of this step follows: gradients may be averaged while they come.
        """
        if last and self._buckets:
            self._buckets.expect()
        self._backward(loss * (self._ranks.world / views_of_step))

    def _forward(self, *views: Any) -> Any:
        with torch.autocast(self._ranks.device.type, self._autocast, enabled=self._autocast is not None):
            return self.model(*views)

    def _backward(self, loss: Tensor) -> None:
        """A captured one reads the loss scale where the scaler keeps it on the device, whatever it is by then."""
        scaler = self._scaler()
        (scaler.scale(loss) if scaler else loss).backward()

    def step(self, measure: bool = True) -> None:
        """Average the gradients over ranks, clip, update, forget them.

        measure  whether grad_norm is wanted; a clipped step has it anyway.
        """
        self._measure = measure
        self.grad_norm = math.inf  # stays so where fp16 skips the update
        communicating(self._average)
        if self._settings.average_statistics:
            communicating(self._mean_over_ranks, _running_statistics(self.model))
        self._step()

    def _average(self) -> None:
        """Average the gradients over ranks, or wait for what the backward pass has sent."""
        if self._buckets:
            self._buckets.finish()
        elif self._averages and self._ranks.world > 1:
            self._mean_over_ranks([p.grad for p in self.model.parameters() if p.grad is not None])

    @property
    def _averages(self) -> bool:
        """Whether gradients that no bucket takes are averaged here."""
        return True

    def _mean_over_ranks(self, tensors: list[Tensor]) -> None:
        """In place, in one piece."""
        flat = torch._utils._flatten_dense_tensors(tensors)
        dist.all_reduce(flat)
        flat /= self._ranks.world
        torch._foreach_copy_(tensors, list(torch._utils._unflatten_dense_tensors(flat, tensors)))

    def _step(self) -> None:
        """Clip, update, forget; DeepSpeed averages here what has no buckets."""
        raise NotImplementedError

    def _make_buckets(self) -> None:
        """Over several ranks, once the layout of the weights is final: the buckets take it over."""
        if self._ranks.world > 1 and self._settings.bucket_mb:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self._buckets = Buckets(trained, self._settings.bucket_mb, self._ranks.world)

    def train(self, on: bool) -> None:
        """Train mode, or (False) evaluation with running statistics."""
        self.model.train(on)

    def reduce(self, values: Tensor, greatest: bool = False) -> Tensor:
        """Sum over all ranks, or the greatest of theirs, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX if greatest else dist.ReduceOp.SUM)
        return values

    def gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's, by rank."""
        mine = torch.tensor(values, dtype=torch.float64, device=self._ranks.device)
        rows = mine.new_empty(self._ranks.world * len(values))
        dist.all_gather_into_tensor(rows, mine)
        found: list[list[float]] = rows.view(self._ranks.world, -1).tolist()
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """(model, optimiser, scalars), whole tensors by name: free of the number of ranks.

        Collective under ZeRO 1: every rank calls it.
        """
        momenta = {}
        if self._settings.momentum:
            for name, parameter in self.model.named_parameters():
                momenta[_PREFIX + name] = self._momentum(parameter)
        scaler = self._scaler()
        return self.model.state_dict(), momenta, {"loss_scale": scaler.state_dict() if scaler else None}

    def load_state(self, model: dict[str, Tensor], momenta: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Continue from `state`, at any number of ranks. Raises RuntimeError on missing or other keys."""
        self.model.load_state_dict(model)
        for name, parameter in self.model.named_parameters():
            self._set(parameter, momenta.get(_PREFIX + name))
        if (scaler := self._scaler()) and scalars["loss_scale"]:
            scaler.load_state_dict(scalars["loss_scale"])
        self.hold_scale()

    def hold_scale(self) -> None:
        """From here on fp16's loss scale is the fixed one, if there is one."""
        if (scaler := self._scaler()) and self._settings.loss_scale:
            fixed = {"scale": self._settings.loss_scale, "growth_factor": 1.0, "backoff_factor": 1.0}
            scaler.load_state_dict(scaler.state_dict() | fixed)

    @property
    def cuda_graphs(self) -> bool:
        """Whether a micro-step may be replayed from a graph: gradients then keep their memory."""
        return self._settings.cuda_graphs

    @property
    def scales_loss(self) -> bool:
        """Whether a non-finite gradient skips the step (fp16) rather than spoiling the weights."""
        return self._scaler() is not None

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.optimizer.state.get(parameter, {})
        momentum: Tensor = state.get("momentum_buffer", torch.zeros_like(parameter))
        return momentum.detach()

    def _set(self, parameter: nn.Parameter, momentum: Tensor | None) -> None:
        if momentum is not None:
            self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)

    def _scaler(self) -> GradScaler | None:
        return None

    def _measure_and_clip(self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        """Runs between unscaling and the update, on averaged fp32 gradients."""
        if not self._measure and self._settings.clip is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.grad_norm = clip_and_measure(parameters, self._settings.clip)


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """Of the norms that learn them."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    return [t for module in norms for t in (module.running_mean, module.running_var) if t is not None]
