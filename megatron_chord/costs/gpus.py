"""Kinds of GPUs with the figures of their vendors: dense BF16 products, decimal bytes."""

from __future__ import annotations

from dataclasses import dataclass


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
    memory: float
    """Memory size in bytes."""
    source: str


_H100 = "NVIDIA H100 Tensor Core GPU datasheet, SXM"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet, SXM"
GPUS = {
    "h100": Gpu(
        name="H100 SXM",
        driver_name="NVIDIA H100 80GB HBM3",
        peak_flops=989e12,
        bandwidth=3.35e12,
        memory=80e9,
        source=_H100,
    ),
    "h200": Gpu(
        name="H200 SXM",
        driver_name="NVIDIA H200",
        peak_flops=989e12,
        bandwidth=4.8e12,
        memory=141e9,
        source="NVIDIA H200 Tensor Core GPU datasheet, SXM",
    ),
    "h20": Gpu(
        name="H20",
        driver_name="NVIDIA H20",
        peak_flops=148e12,
        bandwidth=4.0e12,
        memory=96e9,
        source="vendor's figures as quoted by [VERL-FA]",
    ),
    "a100-80": Gpu(
        name="A100 SXM 80 GB",
        driver_name="NVIDIA A100-SXM4-80GB",
        peak_flops=312e12,
        bandwidth=2.039e12,
        memory=80e9,
        source=_A100,
    ),
    "a100-40": Gpu(
        name="A100 SXM 40 GB",
        driver_name="NVIDIA A100-SXM4-40GB",
        peak_flops=312e12,
        bandwidth=1.555e12,
        memory=40e9,
        source=_A100,
    ),
}


def gpu_by_driver_name(name: str) -> Gpu | None:
    """The GPU with exactly this driver name; None if it is not listed. An H100 PCIe is not an H100 SXM."""
    return next((gpu for gpu in GPUS.values() if gpu.driver_name == name), None)
