"""A model's chat template renders apart from the server, for as long as it may and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from burnish.errors import BurnishError, DataError
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
