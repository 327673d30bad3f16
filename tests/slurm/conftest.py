"""A real Slurm for the tests. Debian's packages are installed if they are missing and this user may install them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.slurm.box import Box, missing_programs

NODES = 8
"""The largest script asks for this many nodes."""


@pytest.fixture(scope="session")
def slurm() -> None:
    """Make sure that Slurm's programs are there. Skip with the reason where they cannot be installed."""
    missing = missing_programs()
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"no {', '.join(missing)}, and installing slurm-wlm needs root and apt-get")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # start no services
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm"]):
        done = subprocess.run(
            ["apt-get", "-qq", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"apt-get {arguments[0]} failed: {done.stderr.strip()[-300:]}")
    if missing_programs():
        pytest.skip(f"slurm-wlm was installed, but has no {', '.join(missing_programs())}")


@pytest.fixture(scope="session")
def cluster(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    started = Box(tmp_path_factory.mktemp("slurm"), NODES)
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture
def box(cluster: Box) -> Iterator[Box]:
    """The cluster without jobs: those that a failed test leaves are cancelled."""
    yield cluster
    cluster.cancel_all()
