"""The life of a node's program: start, watch processes until the exit code is known, end, and record a failure."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_chord.cluster.job import Job
from megatron_chord.cluster.outcome import record_failure
from megatron_chord.cluster.servers import ServerLost


def run_watched(
    job: Job,
    *,
    start: Callable[[], None],
    watch: Callable[[], int | None],
    end: Callable[[], None],
    pause_s: float,
) -> int:
    """Call ``start``, then ``watch`` every ``pause_s`` seconds until it returns the exit code. At last call ``end``.

    A lost server and every other error are recorded as failures of the job. A lost server ends the node with exit code
    1; other errors are raised.
    """
    try:
        start()
        while True:
            code = watch()
            if code is not None:
                return code
            time.sleep(pause_s)
    except ServerLost as error:
        record_failure(job.folder, f"server{error.server}", 1, str(error), error.log)
        return 1
    except Exception as error:
        message = f"{job.name}: {type(error).__name__}: {error}"
        record_failure(job.folder, f"node-{job.name}", 1, message)
        raise
    finally:
        end()
