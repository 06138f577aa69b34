"""A cluster's numbers, each with where it is from and how far it may be off."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError, model_validator

from fastrot.config import read_yaml
from fastrot.errors import UserError

FOLDER = Path(__file__).parent / "nodes"


class Known(BaseModel):
    """A number, the least and most that it may be, and where it is from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: NonNegativeFloat
    low: NonNegativeFloat
    high: NonNegativeFloat
    source: Literal["measured", "data sheet", "assumed"]
    note: str = ""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"low {self.low:g}, value {self.value:g}, high {self.high:g} must rise")
        return self


class Hardware(BaseModel):
    """One kind of node and what joins such nodes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    device: str = ""
    """In the name that such a GPU gives itself."""
    fabric: Literal["nccl", "gloo"] = "nccl"
    """What sums over ranks: gloo knows rings alone, NCCL trees besides."""
    gpus: int = Field(gt=0)
    """GPUs a node, where nothing else is asked for."""
    cores: int = Field(gt=0)
    """CPU cores a node."""
    gpu_memory_gib: PositiveFloat
    matmul_flops: Known
    """FLOP/s of a GPU in large convolutions, at the run's precision."""
    memory_bytes: Known
    """Bytes/s that a GPU's memory reads and writes."""
    launch_s: Known
    """Seconds of the host to launch one kernel."""
    gpu_decode: Known
    """JPEGs/s that a GPU's decoder gives at the data's size."""
    core_decode: Known
    """Crops/s that one CPU core gives; where a step was profiled, its whole data path."""
    link_bytes: Known
    """Bytes/s of a GPU to another of its node, one way."""
    link_latency_s: Known
    """Seconds of a small message there."""
    net_bytes: Known
    """Bytes/s of a GPU to one of another node, one way."""
    net_latency_s: Known
    storage_bytes: Known
    """Bytes/s that a node reads of the data set."""
    gpu_hours_to_failure: Known
    """Hours of one GPU between failures that end a run."""
    restart_s: Known
    """Seconds from a failure until the first step again."""


def read(name: str) -> Hardware:
    """By name (nodes/NAME.yaml beside this file) or path. Raises UserError with one line for each thing that is wrong."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise UserError(f"--hardware {name}: no such file; known by name: {known}")
    try:
        return Hardware.model_validate(read_yaml(path, f"--hardware {name}"))
    except ValidationError as errors:
        lines = [f"--hardware {name}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors.errors()]
        raise UserError("\n".join(lines)) from None
