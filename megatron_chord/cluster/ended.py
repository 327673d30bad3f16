"""The end of a run in a job: rank 0 records in the job's folder that the policy, or the checkpoint of a stop, is
complete. What fails afterwards, when processes end, does not change the exit code of the job.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_ENDED = "ended"


def record_end(code: int) -> None:
    """Record the exit code of the run, if this process is rank 0 of a job. Without the file the exit codes of the ranks
    count, so nothing is raised."""
    folder = os.environ.get("CHORD_JOB")
    if folder is None or os.environ.get("RANK") != "0":
        return
    temporary = Path(folder) / f".{_ENDED}"
    with contextlib.suppress(OSError):
        temporary.write_text(f"{code}\n")
        temporary.replace(Path(folder) / _ENDED)


def recorded_end(folder: Path) -> int | None:
    """The exit code that rank 0 has recorded. None: the run has not ended, or rank 0 failed."""
    try:
        return int((folder / _ENDED).read_text())
    except (OSError, ValueError):
        return None
