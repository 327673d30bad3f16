"""A pytest plugin (``-p tests.support.bare``): a GPU machine on which hardly anything is installed.

What is optional cannot be imported, and torch says that there is a CUDA device, so that tests get as far as they would
there before they touch it.
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
