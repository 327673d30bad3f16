"""Kinds of GPUs with the figures of their vendors: dense BF16 products, decimal bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    name: str
    driver_name: str
    """The driver's name of the GPU, which ``torch.cuda.get_device_name`` returns."""
    peak_flops: float
    """Peak FLOP/s of BF16 matrix products without sparsity."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""
    link: float
    """Bytes per second, both directions together, between the GPUs of one machine: NVLink, or PCIe without it."""
    memory: float
    """The vendor's decimal size of the memory, in bytes."""
    visible: float
    """The size of the memory that the driver reports to a process, in bytes. vLLM's share is a share of this size. It
    is the total that PyTorch's out-of-memory messages name, or ``memory`` where none is known to us."""
    source: str
    product_cost: float = 1.0
    """The time of a training pass's matrix products and attention over their time at the peak, relative to an H100."""


_H100 = "NVIDIA H100 Tensor Core GPU datasheet, SXM"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet, SXM"
_BLACKWELL_PRODUCTS = 1.34
"""[MLENG]: the same software trains Llama-3.1-8B in BF16 at 8192 tokens with 461 TFLOP/s on an H200 and 778 on a B200:
1.69 times as fast, with 2.275 times the peak and 1.67 times the bandwidth. With this number the planner predicts 1.69.
Assumed to hold for FP8 and for GB200, too."""
GPUS = {
    "h100": Gpu(
        name="H100 SXM",
        driver_name="NVIDIA H100 80GB HBM3",
        peak_flops=989e12,
        bandwidth=3.35e12,
        link=900e9,
        memory=80e9,
        visible=79.1 * GIB,
        source=_H100,
    ),
    "h200": Gpu(
        name="H200 SXM",
        driver_name="NVIDIA H200",
        peak_flops=989e12,
        bandwidth=4.8e12,
        link=900e9,
        memory=141e9,
        visible=139.8 * GIB,
        source="NVIDIA H200 Tensor Core GPU datasheet, SXM",
    ),
    "h20": Gpu(
        name="H20",
        driver_name="NVIDIA H20",
        peak_flops=148e12,
        bandwidth=4.0e12,
        link=900e9,
        memory=96e9,
        visible=96e9,
        source="vendor's figures as quoted by [VERL-FA]",
    ),
    "a100-80": Gpu(
        name="A100 SXM 80 GB",
        driver_name="NVIDIA A100-SXM4-80GB",
        peak_flops=312e12,
        bandwidth=2.039e12,
        link=600e9,
        memory=80e9,
        visible=79.1 * GIB,
        source=_A100,
    ),
    "a100-40": Gpu(
        name="A100 SXM 40 GB",
        driver_name="NVIDIA A100-SXM4-40GB",
        peak_flops=312e12,
        bandwidth=1.555e12,
        link=600e9,
        memory=40e9,
        visible=39.4 * GIB,
        source=_A100,
    ),
    "h100-pcie": Gpu(
        name="H100 PCIe",
        driver_name="NVIDIA H100 PCIe",
        peak_flops=756e12,
        bandwidth=2.0e12,
        link=128e9,
        memory=80e9,
        visible=79.1 * GIB,
        source="NVIDIA H100 Tensor Core GPU datasheet, PCIe; without NVLink bridges",
    ),
    "l40s": Gpu(
        name="L40S",
        driver_name="NVIDIA L40S",
        peak_flops=362e12,
        bandwidth=0.864e12,
        link=64e9,
        memory=48e9,
        visible=44.4 * GIB,
        source="NVIDIA L40S datasheet",
    ),
    "b200": Gpu(
        name="B200",
        driver_name="NVIDIA B200",
        peak_flops=2250e12,
        bandwidth=8.0e12,
        link=1800e9,
        memory=180e9,
        visible=178.3 * GIB,
        source="NVIDIA DGX B200 datasheet, an eighth of the machine",
        product_cost=_BLACKWELL_PRODUCTS,
    ),
    "gb200": Gpu(
        name="GB200",
        driver_name="NVIDIA GB200",
        peak_flops=2500e12,
        bandwidth=8.0e12,
        link=1800e9,
        memory=186e9,
        visible=186e9,
        source="NVIDIA GB200 NVL72 product page, a 72nd of the rack",
        product_cost=_BLACKWELL_PRODUCTS,
    ),
    "mi300x": Gpu(
        name="MI300X",
        driver_name="AMD Instinct MI300X",
        peak_flops=1307.4e12,
        bandwidth=5.3e12,
        link=896e9,
        memory=192e9,
        visible=192e9,
        source="AMD Instinct MI300X datasheet; the trainer itself was never run on it",
    ),
}


def gpu_named(name: str) -> Gpu:
    """The GPU of this name, in upper or lower case: a key of ``GPUS``, or its name with other separators.

    Raises:
        ValueError: it is not listed.
    """
    plain = re.sub(r"[\s_]+", "-", name.strip().lower())
    if plain not in GPUS:
        raise ValueError(f"GPU {name!r} is not known; known are {', '.join(GPUS)}")
    return GPUS[plain]


def gpu_by_driver_name(name: str) -> Gpu | None:
    """The GPU with exactly this driver name; None if it is not listed. An H100 PCIe is not an H100 SXM."""
    return next((gpu for gpu in GPUS.values() if gpu.driver_name == name), None)
