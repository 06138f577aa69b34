"""Kernels by kind, against sums by hand."""

import pytest

from fastrot.profiling.kernels import kinds


def test_kinds_and_gaps_are_shares_of_the_time():
    spans = [
        ("sm90_xmma_fprop_implicit_gemm_bf16", 0.0, 4.0),
        ("batch_norm_collect_statistics_kernel", 4.0, 5.0),
        ("ncclDevKernel_AllReduce_Sum_f32", 4.5, 6.0),  # beside the norm
        ("void multi_tensor_apply_kernel<sgd>", 8.0, 9.0),  # after a gap of 2
        ("Memcpy HtoD", 9.0, 10.0),
    ]
    assert kinds(spans) == pytest.approx(
        {
            "convolutions and products": 0.4,
            "norms and elementwise": 0.1,
            "communication": 0.15,
            "optimiser": 0.1,
            "copies": 0.1,
            "idle": 0.2,
        }
    )
    assert kinds([]) == {}
