"""The newest supported Megatron-Core, for tests.

`make test` puts it beside the environment, together with Triton, which its import needs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from megatron_chord.runtime.megatron import TESTED
from tests.support import interpreter

VERSION = list(TESTED)[-1]
FOLDER = Path(sys.prefix) / "megatron"


def variables() -> dict[str, str]:
    """Return the environment variables with which a process finds it before the installed version."""
    if not (FOLDER / f"megatron_core-{VERSION}.dist-info").is_dir():
        pytest.skip(f"there is no megatron-core {VERSION} in {FOLDER}, where `make test` puts it")
    return {
        "PYTHONPATH": os.pathsep.join(
            [str(FOLDER), str(interpreter.FOLDER), os.environ.get("PYTHONPATH", "")]
        )
    }
