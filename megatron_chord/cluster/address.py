"""The network of a job, on nodes that have several (``CHORD_NETWORK``).

    python -m megatron_chord.cluster.address     prints NAME=ADDRESS of this node, for CHORD_NODES

The batch script runs it on every node. Without CHORD_NETWORK nodes use the addresses that Slurm has for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

from megatron_chord.network import address_in, interface_of

VARIABLE = "CHORD_NETWORK"
"""Environment variable: an interface, or a range of addresses such as 10.1.0.0/16."""


def main() -> int:
    name = os.environ.get("SLURMD_NODENAME", "")
    try:
        print(f"{name}={address_in(os.environ[VARIABLE])}")
    except ValueError as error:
        print(f"error: {name}: {VARIABLE}: {error}", file=sys.stderr)
        return 2
    return 0


def set_nccl_network(environment: MutableMapping[str, str], address: str) -> None:
    """Have NCCL connect over the network of this node's ``address`` if CHORD_NETWORK is set. NCCL's own variables have
    priority. gloo needs no setting: it uses the interface that leads to MASTER_ADDR."""
    interface = interface_of(address)
    if environment.get(VARIABLE) and interface is not None:
        environment.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        environment.setdefault("NCCL_SOCKET_FAMILY", "AF_INET6" if ":" in address else "AF_INET")


if __name__ == "__main__":
    sys.exit(main())
