"""The chat template's process: `python -m burnish.serve.template_worker DESCRIPTOR`.

A template is a program that came with the model. Jinja's sandbox keeps it from the system, and this process keeps its
time and memory from the server.
"""

from __future__ import annotations

import os
import signal
import sys

from burnish.data.chat_template import render_chat_template
from burnish.errors import BurnishError
from burnish.serve.channel import Line

_MEMORY_BYTES = 2 << 30


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _limit_memory()
    line = Line(int(sys.argv[1]))
    try:
        template, special_tokens, source = line.receive()
        while True:
            number, messages, add_generation_prompt = line.receive()
            try:
                text = render_chat_template(
                    template,
                    messages,
                    add_generation_prompt=add_generation_prompt,
                    special_tokens=special_tokens,
                    source=source,
                )
                line.send((number, text, None))
            except BurnishError as error:
                line.send((number, None, error.message))
            except (MemoryError, RecursionError) as error:
                line.send((number, None, f"the chat template in {source} failed: {type(error).__name__}"))
    except (EOFError, OSError):
        return 0


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    except (OSError, ValueError):  # a lower limit is set already
        return


if __name__ == "__main__":
    os._exit(main())
