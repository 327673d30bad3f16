"""A pytest plugin (``-p tests.support.bare``) that imitates a GPU machine with hardly any package installed.

Optional packages cannot be imported, and torch reports a CUDA device. Tests then run as they would there until they use
the device.
"""

from __future__ import annotations

import sys

import torch

OPTIONAL = (
    "vllm",
    "triton",
    "transformer_engine",
    "mbridge",
    "matplotlib",
    "liger_kernel",
    "trl",
    "accelerate",
)
PYTEST_PLUGINS = ("xdist", "pytest_timeout")

for _name in (*OPTIONAL, *PYTEST_PLUGINS):
    sys.modules[_name] = None  # type: ignore[assignment]  (what ``import`` and ``find_spec`` take for "not there")
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
