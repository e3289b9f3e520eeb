"""A model's chat template renders apart from the server, for as long as it may and no longer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

import pytest

from burnish.errors import BurnishError, DataError, WorkerError
from burnish.serve import child, templates
from burnish.serve.templates import TemplateRenderer

MESSAGES = [{"role": "user", "content": "hi"}]


def rendered(
    template: str, work: Callable[[TemplateRenderer], Coroutine[Any, Any, Any]], *, timeout_s: float = 60
) -> Any:
    async def run() -> Any:
        renderer = TemplateRenderer(template, {"bos_token": "<s>"}, source="a/model", timeout_s=timeout_s)
        try:
            return await work(renderer)
        finally:
            await renderer.close()

    return asyncio.run(run())


def test_conversations_that_come_together_get_their_own_texts() -> None:
    async def several(renderer: TemplateRenderer) -> list[str]:
        each = [[{"role": "user", "content": str(number)}] for number in range(5)]
        return await asyncio.gather(*(renderer.render(messages) for messages in each))

    template = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}!{% endif %}"
    assert rendered(template, several) == [f"<s>{number}!" for number in range(5)]


def test_a_template_that_runs_on_is_ended_and_the_next_one_is_served() -> None:
    template = (
        "{% if messages[0].content == 'slow' %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}ok"
    )

    async def slow_then_quick(renderer: TemplateRenderer) -> str:
        await renderer.render(MESSAGES)
        with pytest.raises(DataError, match="takes too long"):
            await renderer.render([{"role": "user", "content": "slow"}])
        renderer._timeout_s = 60
        return await renderer.render(MESSAGES)

    assert rendered(template, slow_then_quick, timeout_s=5) == "ok"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('not this') }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{{ 'x' * (4 * 10**9) }}",
    ],
)
def test_a_template_that_reaches_too_far_is_an_error(template: str) -> None:
    with pytest.raises(BurnishError):
        rendered(template, lambda renderer: renderer.render(MESSAGES))


def test_the_start_of_the_process_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        """A process that listens when a test says so, and takes no time to answer then."""

        made: ClassVar[list[Slow]] = []

        def __init__(
            self, module: str, *, on_messages: Callable[[list[Any]], None], on_end: Callable[[], None]
        ) -> None:
            self.take, self.sent = on_messages, []
            self.made.append(self)

        async def start(self, first: Any) -> None:
            pass

        def send(self, message: Any) -> None:
            self.sent.append(message)
            self.take([(message[0], "text", None)])

        def kill(self) -> None:
            pass

        async def stop(self) -> None:
            pass

    monkeypatch.setattr(templates, "Child", Slow)

    async def late(renderer: TemplateRenderer) -> None:
        asking = asyncio.create_task(renderer.render(MESSAGES))
        for _ in range(100):
            await asyncio.sleep(0.001)  # far longer than a conversation may take
        [process] = Slow.made
        assert not asking.done()
        assert process.sent == []
        process.take([(0, None, None)])
        assert await asking == "text"

    rendered("", late, timeout_s=0.01)


def test_a_process_that_dies_at_its_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child.sys, "executable", "/bin/false")
    with pytest.raises(WorkerError, match="process died"):
        rendered("x", lambda renderer: renderer.render(MESSAGES))
    monkeypatch.setattr(child.sys, "executable", "/nowhere/at/all")
    with pytest.raises(WorkerError, match="cannot be started; got No such file"):
        rendered("x", lambda renderer: renderer.render(MESSAGES))


def test_a_signal_for_the_whole_group_is_left_to_the_server() -> None:
    async def signalled(renderer: TemplateRenderer) -> str:
        await renderer.open()
        assert renderer._child is not None
        for which in (signal.SIGINT, signal.SIGTERM):  # it cannot have got as far as to ignore them
            os.kill(renderer._child.pid, which)
        return await renderer.render(MESSAGES)

    assert rendered("{{ messages[0].content }}", signalled) == "hi"
