"""Peak rates of GPUs by the names that drivers give them."""

from __future__ import annotations

import pytest

from embed_precompute.encoders.peaks import is_known, known_gpus, peak_flops


@pytest.mark.parametrize(
    ("device", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "float16", 835.5),
        ("NVIDIA H200", "float32", 66.9),
        ("NVIDIA GH200 144G HBM3e", "bfloat16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("NVIDIA RTX 6000 Ada Generation", "bfloat16", 364.2),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
        ("h100", "bfloat16", 989.4),
    ],
)
def test_a_gpu_is_known_by_its_product_name(device: str, dtype: str, tera: float) -> None:
    assert peak_flops(device, dtype) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("Tesla V100-SXM2-16GB", "bfloat16"),  # it has no such unit
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bfloat16"),  # a slice of it
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),  # another chip
        ("AMD EPYC 9004", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "int8"),
        ("", "bfloat16"),
    ],
)
def test_what_is_not_known_has_no_peak(device: str, dtype: str) -> None:
    assert peak_flops(device, dtype) is None


def test_every_short_name_is_its_own_key() -> None:
    assert all(peak_flops(name, "float16") for name in known_gpus(["float16"]))


def test_a_gpu_without_bfloat16_is_known_for_other_dtypes() -> None:
    assert is_known("Tesla T4")
    assert not is_known("Abacus")
    assert {"T4", "V100"} <= {*known_gpus(["float16"])} - {*known_gpus(["float16", "bfloat16"])}
