"""One process that renders a chat template: `python -m megatron_chord.data.jinja_worker FD`, for `data.rendering`.

A template is untrusted code from the publisher of the model. Jinja's sandbox denies it access to files and attributes.
This process limits its time and memory. The process reads a JSON line with ``template``, ``names`` and ``cpu_s``, then
lines with ``messages``, ``tools`` and ``add_generation_prompt``. It answers ``{"text"}``, ``{"refused"}`` or
``{"exhausted"}``. A line without ``messages`` asks which variables the template reads; the answer is
``{"variables"}``.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import os
import resource
import signal
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 2 << 30
"""Limit of the address space, in bytes. Python with Transformers' renderer takes 0.25 GB of it."""
MAX_TEXT = 8_000_000
"""Largest number of characters of one rendered conversation."""
_RENDERER = "transformers.utils.chat_template_utils"

# Some templates print today's date. A run that is resumed tomorrow must see the prompts it saw today.
_TEMPLATE_DATE = datetime.datetime(2024, 7, 26)


def main() -> None:
    # The run handles Ctrl-C. When the run ends, the connection closes, and that ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    connection = socket.socket(fileno=int(sys.argv[1]))
    render = load_renderer()
    setting: dict[str, Any] = {}
    for line in connection.makefile("rb"):
        request = json.loads(line)
        if "template" in request:
            setting = request
            continue
        signal.setitimer(
            signal.ITIMER_PROF, setting["cpu_s"]
        )  # beyond this limit the kernel ends the process
        reply = _answer(render, setting, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(reply)
        if reply.startswith(b'{"exhausted"'):
            return


def load_renderer() -> Callable[..., Any]:
    """Transformers' ``render_jinja_template``, which its tokenizers call.

    The module is imported without the packages ``transformers`` and ``transformers.utils`` around it, whose imports
    take twice as long as everything else in this process. If that fails, all of Transformers is imported.
    """
    try:
        return _import_alone()
    except Exception:  # another version of Transformers may need more of its packages
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        return importlib.import_module(_RENDERER).render_jinja_template


def _import_alone() -> Callable[..., Any]:
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers")
    folder = os.path.dirname(spec.origin)
    for name, path in (("transformers", folder), ("transformers.utils", os.path.join(folder, "utils"))):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    return importlib.import_module(_RENDERER).render_jinja_template


def _answer(render: Any, setting: dict[str, Any], request: dict[str, Any]) -> bytes:
    try:
        if "messages" not in request:
            return json.dumps({"variables": _variables(setting["template"])}).encode() + b"\n"
        texts, _ = render(
            conversations=[request["messages"]],
            tools=request["tools"] or None,
            chat_template=setting["template"],
            add_generation_prompt=request["add_generation_prompt"],
            strftime_now=_TEMPLATE_DATE.strftime,
            **setting["names"],
        )
        reply = {"text": texts[0]}
        if len(texts[0]) > MAX_TEXT:
            reply = {"refused": f"it has {len(texts[0])} characters, at most {MAX_TEXT} are tokenised"}
        return json.dumps(reply).encode() + b"\n"
    except MemoryError:
        return b'{"exhausted": "needs more memory than %d GiB"}\n' % (MEMORY_BYTES >> 30)
    except Exception as error:  # any exception of the template concerns this conversation
        kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
        return json.dumps({"refused": f"{kind}{error}"[:500]}).encode() + b"\n"


def _variables(template: str) -> list[str]:
    """The names that the template may look up, including those that it sets itself in some branch."""
    from jinja2 import meta
    from transformers.utils import chat_template_utils

    # This environment also has the tags that only Transformers defines.
    environment = chat_template_utils._compile_jinja_template(template).environment
    return sorted(meta.find_undeclared_variables(environment.parse(template)))


if __name__ == "__main__":
    main()
    os._exit(0)
