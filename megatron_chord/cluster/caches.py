"""The folders of compiled kernels on a node's own disk. Programs load and run what is in them.

Their default is in ``/tmp``, where any user of the node can make a folder with a name that can be guessed. So a node
uses such a folder only if it belongs to the user of the job and nobody else can write to it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE")
"""The batch script (slurm/lib/launch.sh) sets all of them."""
_SHARED = Path("/tmp")


def make_own_caches(environment: Mapping[str, str], shared: Path = _SHARED) -> None:
    """Make the folders of ``VARIABLES`` that lie directly in ``shared``, for this user alone.

    Raises:
        PermissionError: such a folder belongs to another user, is no folder, or others can write to it.
    """
    for name in VARIABLES:
        folder = Path(environment.get(name) or "/")
        if folder.parent != shared:
            continue
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if not is_own or stat.S_IMODE(status.st_mode) & 0o022:
            raise PermissionError(
                f"{name} is {folder}. It must be a folder of user {os.getuid()} that nobody else can write to, because "
                f"the job executes the kernels in it, but it has mode {stat.filemode(status.st_mode)} and user "
                f"{status.st_uid}. Set {name} to another folder"
            )
