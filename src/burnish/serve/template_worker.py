"""The chat template's process: `python -m burnish.serve.template_worker DESCRIPTOR`.

A template is a program that came with the model. Jinja's sandbox keeps it from the system, and this process keeps its
time and memory from the server.
"""

from __future__ import annotations

import os

from burnish.data.chat_template import render_chat_template
from burnish.errors import BurnishError
from burnish.serve.channel import take_line

_MEMORY_BYTES = 2 << 30


def main() -> int:
    line = take_line(memory_bytes=_MEMORY_BYTES)
    try:
        template, special_tokens, source = line.receive()
        line.send((0, None, None))
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


if __name__ == "__main__":
    os._exit(main())
