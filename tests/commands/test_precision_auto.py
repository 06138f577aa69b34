"""`engine.precision: auto`: what the device is fast at, said in a line and kept in the run's config."""

from pathlib import Path

import pytest
import torch

from fastrot import machine


@pytest.fixture
def processor(monkeypatch):
    def with_flags(flags):
        real = Path.read_text
        told = lambda path, *a, **k: f"flags : {flags}" if str(path) == "/proc/cpuinfo" else real(path, *a, **k)  # noqa: E731
        monkeypatch.setattr(Path, "read_text", told)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return with_flags


@pytest.mark.parametrize(
    "flags,crop,precision", [("avx2", 224, "fp32"), ("amx_bf16", 224, "bf16"), ("avx512_bf16", 64, "fp32")]
)
def test_a_processor_takes_bf16_where_it_has_units_that_the_crops_fill(processor, flags, crop, precision):
    processor(f"fpu {flags} sse")
    assert machine.precision(crop)[0] == precision


@pytest.mark.parametrize("units,precision", [(True, "bf16"), (False, "fp32")])
def test_a_gpu_takes_bf16_where_it_has_units(monkeypatch, units, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: units)
    assert machine.precision(32) == (precision, f"a card has {'units for it' if units else 'no bf16 units'}")


@pytest.mark.parametrize("crop,words", [(224, []), (64, ["data.crop_by_epoch={2: 224}"])])
def test_it_is_said_and_kept(fastrot, processor, crop, words):
    processor("amx_bf16")
    done = fastrot("config", "engine.precision=auto", f"data.crop={crop}", *words)
    assert 'engine.precision              "bf16"' in done.out
    assert "engine.precision auto: bf16; this processor has units for it" in done.err
