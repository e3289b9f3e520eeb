"""What is stored of a finished request."""

from __future__ import annotations

from typing import Any

from burnish.engine.outputs import RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.measure.json_values import to_plain
from burnish.scale.items import Key
from burnish.scale.store import Outcome


def outcome_of(key: Key, output: RequestOutput, params: SamplingParams, *, with_tokens: bool) -> Outcome:
    """A request's result; `with_tokens` keeps the ids, for a model without a tokenizer, whose texts are empty."""
    if output.finish_reason == "error":
        return Outcome(key=key, error=output.error or "the engine gave no reason")
    metrics = output.metrics
    answer: dict[str, Any] = {
        "text": output.text,
        "finish_reason": output.finish_reason,
        "ttft_ms": metrics.ttft_ms,
        "e2e_ms": metrics.e2e_ms,
    }
    if with_tokens:
        answer["token_ids"] = list(output.token_ids)
    if params.logprobs is not None:
        answer["logprobs"] = to_plain(output.logprobs)
    if params.prompt_logprobs is not None:
        answer["prompt_logprobs"] = to_plain(output.prompt_logprobs)
    if params.n > 1:
        answer["choices"] = [
            {
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                **({"error": choice.error} if choice.error else {}),
                **({"token_ids": list(choice.token_ids)} if with_tokens else {}),
                **({"logprobs": to_plain(choice.logprobs)} if choice.logprobs is not None else {}),
            }
            for choice in output.choices
        ]
    return Outcome(key=key, answer=answer, prompt_tokens=metrics.prompt_tokens, output_tokens=metrics.output_tokens)
