"""Plain torch: DeepSpeed's oracle."""

import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler

from fastrot.distributed import Ranks
from fastrot.engine import StepSettings
from fastrot.engine.base import Engine


class PlainEngine(Engine):
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: StepSettings, ranks: Ranks):
        super().__init__(model, optimizer, settings, ranks)
        self.module = self._forward
        self._grad_scaler = GradScaler(ranks.device.type) if settings.precision == "fp16" else None
        optimizer.register_step_pre_hook(self._measure_and_clip)
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not among torch's overloads
        if not settings.cuda_graphs:  # they add gradients where those lay at capture
            self._make_buckets()

    def _step(self) -> None:
        if self._grad_scaler:
            self._grad_scaler.step(self.optimizer)
            self._grad_scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.cuda_graphs)

    def _scaler(self) -> GradScaler | None:
        return self._grad_scaler
