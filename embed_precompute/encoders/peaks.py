"""Peak rates of GPUs, as their makers state them: dense, without sparsity.

A peak is a yardstick and no forecast: a matrix product reaches a part of it, a whole model less.
"""

from __future__ import annotations

import re
from collections.abc import Collection

SHARE_OF_PEAK = 0.4
"""The share that a forecast assumes, of which nothing is measured: Llama 3 405B was trained at 0.38
to 0.43 of the bfloat16 peak of H100 (arXiv 2407.21783, table 4)."""
# Tera-operations per second: bfloat16, float16, float32. Half precision is that of the tensor
# cores, accumulating in float32; a maker who states a rate with 2:4 sparsity gets half of it here.
# float32 is that of the ordinary cores, which is what runs where TF32 is not asked for. 0: the GPU
# has no such unit.
_TERA = {
    # nvidia.com/en-us/data-center/{h100,h200,a100,l40s,l40,l4,a40,a30,a10,v100,tesla-t4}: the
    # tables on these pages. GH200, H800 and H20 have the figures of their datasheets.
    "H100": (989.4, 989.4, 66.9),
    "H100 PCIE": (756, 756, 51.2),
    "H100 NVL": (835.5, 835.5, 60),
    "H200": (989.4, 989.4, 66.9),
    "H200 NVL": (835.5, 835.5, 60),
    "GH200": (989.4, 989.4, 66.9),
    "H800": (989.4, 989.4, 66.9),
    "H800 PCIE": (756, 756, 51.2),
    "H20": (148, 148, 44),
    "A100": (312, 312, 19.5),
    "A100 PCIE": (312, 312, 19.5),
    "A800": (312, 312, 19.5),
    "A800 PCIE": (312, 312, 19.5),
    "A40": (149.7, 149.7, 37.4),
    "A30": (165, 165, 10.3),
    "A10": (125, 125, 31.2),
    "A10G": (70, 70, 35),
    "L40S": (362, 362, 91.6),
    "L40": (181, 181, 90.5),
    "L20": (119.5, 119.5, 59.8),
    "L4": (121, 121, 30.3),
    "V100": (0, 125, 15.7),
    "V100 PCIE": (0, 112, 14),
    "T4": (0, 65, 8.1),
    # The datasheets of HGX B200 and HGX B300, an eighth of each; GB200 of NVL72, a 72nd of it.
    "B200": (2250, 2250, 75),
    "B300": (2250, 2250, 75),
    "GB200": (2500, 2500, 80),
    # The architecture whitepapers (GA102, Ada, Blackwell), tables of the appendix.
    "RTX 3090": (71, 71, 35.6),
    "RTX 4090": (165.2, 165.2, 82.6),
    "RTX 5090": (209.5, 209.5, 104.8),
    "RTX A6000": (154.8, 154.8, 38.7),
    "RTX 6000 ADA": (364.2, 364.2, 91.1),
    # amd.com/en/products/accelerators/instinct/*; MI250X: one of its two dies, which is what a
    # process sees as a GPU.
    "MI250X": (191.5, 191.5, 23.9),
    "MI300X": (1307.4, 1307.4, 163.4),
    "MI325X": (1307.4, 1307.4, 163.4),
    "MI355X": (2516.6, 2516.6, 157.3),
}
_DTYPES = ("bfloat16", "float16", "float32")
_SAYS_NOTHING = re.compile(r"NVIDIA|AMD|TESLA|INSTINCT|GEFORCE|GENERATION|SXM\d?|HBM\d?E?|\d+GB?")
"""Words of a product name that change no rate. Any other word is another product: a laptop's chip,
a slice of a GPU (MIG), a `Ti`."""


def peak_flops(device: str, dtype: str) -> float | None:
    """Dense peak of a GPU, FLOP/s; None where it is not known.

    `device`: its product name, as torch.cuda.get_device_name and nvidia-smi give it, or a short one
    such as `H100`. `dtype`: bfloat16, float16 or float32.
    """
    product = _product(device)
    if product not in _TERA or dtype not in _DTYPES:
        return None
    return _TERA[product][_DTYPES.index(dtype)] * 1e12 or None


def is_known(device: str) -> bool:
    """Whether the GPU has known peaks, in whatever dtypes."""
    return _product(device) in _TERA


def known_gpus(dtypes: Collection[str]) -> list[str]:
    """The short names of all GPUs with a known peak in each of these dtypes."""
    return [name for name in _TERA if all(peak_flops(name, dtype) for dtype in dtypes)]


def _product(device: str) -> str:
    words = re.findall(r"\w+", device.upper())
    return " ".join(word for word in words if not _SAYS_NOTHING.fullmatch(word))
