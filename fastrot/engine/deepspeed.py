"""DeepSpeed, ZeRO 0 and 1, with the step's arithmetic kept in our hands."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from fastrot.distributed import Ranks
from fastrot.engine import AUTOCAST, StepSettings
from fastrot.engine.base import Engine
from fastrot.engine.host_collectives import load_host_collectives, without_shared_memory
from fastrot.errors import UserError
from fastrot.profiling.clock import communicating


def settings_to_json(settings: StepSettings, world: int) -> dict[str, Any]:
    """DeepSpeed's config for ours.

    Its batch triple stays constant and its accumulation unmanaged: A backwards and one step, with
    no division but ours; slices may be uneven.
    """
    autocast = AUTOCAST.get(settings.precision)
    return {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "steps_per_print": None,
        "zero_optimization": {"stage": settings.zero, **_bucket_size(settings)},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": autocast is not None, "dtype": str(autocast or torch.bfloat16).split(".")[1]},
        # at stage 0 our own hook clips, since DeepSpeed forgets the norm there
        "gradient_clipping": (settings.clip or 0.0) if settings.zero else 0.0,
    }


def _bucket_size(settings: StepSettings) -> dict[str, int]:
    """ZeRO 1's own buckets, in elements: filled after the backward pass, since it overlaps nothing where we count the
    micro-steps. Its default makes a buffer of 2 GB a step."""
    return (
        {"reduce_bucket_size": max(1, int(settings.bucket_mb * 2**18))} if settings.zero and settings.bucket_mb else {}
    )


def merged(ours: dict[str, Any], path: str, batch: dict[str, int], clip: float | None) -> dict[str, Any]:
    """Ours with the keys of the user's --deepspeed_config file that we leave to DeepSpeed.

    batch  what DeepSpeed's three batch keys mean for this run.
    Raises UserError where the file is no JSON object, naming every key that contradicts the YAML.
    """
    try:
        given = json.loads(Path(path).read_text())
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"--deepspeed_config {path}: cannot be read as JSON ({error})") from None
    if not isinstance(given, dict):
        raise UserError(f"--deepspeed_config {path}: expected a JSON object")
    wrong, out = [], dict(ours)
    wanted = {**ours, **batch, "gradient_clipping": clip or 0.0}
    for key, value in given.items():
        if key in ("optimizer", "scheduler", "fp16", "bf16", "amp"):
            off = isinstance(value, dict) and not value.get("enabled")
            if key in ("optimizer", "scheduler") or (value and not off):
                wrong.append(
                    f"--deepspeed_config: {key} is set in the YAML (optim.*, engine.precision); remove it here"
                )
        elif key in wanted:
            if isinstance(value, dict) and isinstance(wanted[key], dict):
                for name, inner in value.items():
                    if name in wanted[key] and inner not in ("auto", wanted[key][name]):
                        wrong.append(
                            f"--deepspeed_config: {key}.{name} is {inner}, the YAML makes it {wanted[key][name]}"
                        )
                out[key] = {**value, **ours[key]}
            elif value not in ("auto", wanted[key]):
                wrong.append(f"--deepspeed_config: {key} is {value}, the YAML makes it {wanted[key]}")
        else:
            out[key] = value
    if wrong:
        raise UserError("\n".join(wrong))
    return out


class DeepSpeedEngine(Engine):
    """Under cuda_graphs (ZeRO 0) the network is called without DeepSpeed, whose forward and backward pass add hooks and
    counters that no graph replays, and its step keeps the gradients' memory."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: StepSettings,
        ranks: Ranks,
        batch: dict[str, int],
        config_path: str | None,
    ):
        super().__init__(model, optimizer, settings, ranks)
        import deepspeed  # seconds to import, and only this engine needs it
        from deepspeed.utils import logger

        logger.setLevel(logging.WARNING)
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # its missing-CUDA line on every CPU run
        config = settings_to_json(settings, ranks.world)
        if config_path:
            config = merged(config, config_path, batch, settings.clip)
        # its timer would wait for the device at every forward pass and every step
        config.setdefault("timers", {"throughput": {"enabled": False}})
        load_host_collectives()
        if settings.zero == 0:
            optimizer.register_step_pre_hook(self._measure_and_clip)
        with warnings.catch_warnings(), without_shared_memory():
            warnings.simplefilter("ignore")
            self._deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )
        self.module = self._forward if settings.cuda_graphs else self._deepspeed
        if settings.channels_last and not settings.zero:  # not before: DeepSpeed's broadcast wants rows
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not among torch's overloads
        if not settings.zero and not settings.cuda_graphs:
            self._make_buckets()
        # where we average, it would do so a second time
        self._deepspeed.enable_backward_allreduce = self._buckets is None and not settings.cuda_graphs
        if settings.zero and settings.momentum:
            self._make_momentum()

    def _make_momentum(self) -> None:
        """ZeRO links the state of a parameter at its first step: give it zeros to link now."""
        zero = self._deepspeed.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat]["momentum_buffer"] = torch.zeros_like(flat)
        zero._lazy_init_hp_params_optimizer_state()

    def _backward(self, loss: Tensor) -> None:
        if self.cuda_graphs:
            super()._backward(loss)
        else:
            self._deepspeed.backward(loss)

    def train(self, on: bool) -> None:
        self._deepspeed.train(on)

    @property
    def _averages(self) -> bool:
        return self.cuda_graphs  # else DeepSpeed does

    def _step(self) -> None:
        kept = [(p, p.grad) for p in self.model.parameters() if p.grad is not None] if self.cuda_graphs else []
        if self._deepspeed.enable_backward_allreduce and self._ranks.world > 1:
            communicating(self._deepspeed.step)  # it averages and updates in one
        else:
            self._deepspeed.step()
        for parameter, gradient in kept:  # DeepSpeed has dropped them
            parameter.grad = gradient
        if kept:
            torch._foreach_zero_([gradient for _, gradient in kept])
        if self._settings.zero:
            self.grad_norm = self._deepspeed.get_global_grad_norm() or 0.0

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        if not self._settings.zero:
            return super()._momentum(parameter)
        from deepspeed.utils import safe_get_full_optimizer_state

        momentum: Tensor = safe_get_full_optimizer_state(parameter, "momentum_buffer")
        return momentum.view_as(parameter)

    def _set(self, parameter: nn.Parameter, momentum: Tensor | None) -> None:
        if not self._settings.zero:
            return super()._set(parameter, momentum)
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, parameter.data)
        if momentum is not None:
            safe_set_full_optimizer_state(parameter, momentum.to(parameter), "momentum_buffer")

    def _scaler(self) -> GradScaler | None:
        scaler: GradScaler | None = None if self._settings.zero else self._deepspeed.torch_autocast_z0_gradscaler
        return scaler
