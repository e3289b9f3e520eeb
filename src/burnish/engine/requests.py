"""From a prompt and its parameters to a checked `Sequence`, the same for every engine here. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf

from burnish.engine.prompts import Prompt, TextTokenizer, answer_decoder, encode_prompt
from burnish.engine.sampling import SamplingParams
from burnish.engine.sequence import Sequence
from burnish.engine.text_stream import TextStream
from burnish.errors import RequestError


class RequestFactory:
    """Checks requests against one model's limits.

    Args:
        vocab_size: of the model's output.
        max_model_len: most tokens of prompt and answer together.
        end_ids: tokens that end an answer.
    """

    def __init__(
        self, tokenizer: TextTokenizer | None, *, vocab_size: int, max_model_len: int, end_ids: frozenset[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.end_ids = end_ids
        self._next_id = itertools.count()

    def make(self, prompt: Prompt, params: SamplingParams, *, index: int | None = None) -> Sequence:
        """Check one request; nothing runs yet.

        Raises:
            RequestError: naming the lengths when the prompt is too long; or the stop strings or tokens cannot work.
        """
        text, ids = encode_prompt(prompt, self.tokenizer, vocab_size=self.vocab_size)
        if len(ids) >= self.max_model_len:
            raise RequestError(
                "the prompt is too long for the model",
                got=f"{len(ids)} tokens",
                expected=f"at most {self.max_model_len - 1}, as prompt and answer share {self.max_model_len}",
                remedy="Shorten the prompt, or raise max_model_len where the model allows it.",
            )
        if self.tokenizer is None and params.stop:
            raise RequestError("stop strings need a tokenizer, and the model folder has none")
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.end_ids)
        if any(token >= self.vocab_size for token in params.stop_token_ids):
            raise RequestError(
                "a stop token is outside the vocabulary",
                got=max(params.stop_token_ids),
                expected=f"0..{self.vocab_size - 1}",
            )
        request_id = next(self._next_id)
        return Sequence(
            request_id=request_id,
            index=request_id if index is None else index,
            prompt=text,
            prompt_ids=ids,
            params=params,
            end_ids=ends,
            max_tokens=min(params.max_tokens, self.max_model_len - len(ids)),
            text=TextStream(answer_decoder(self.tokenizer, prompt, ids), params.stop),
        )

    def make_all(
        self, prompts: SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None
    ) -> list[Sequence]:
        """One sequence per prompt, in order; raises as `make`, and when the counts of prompts and parameters differ."""
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, SequenceOf):
            raise RequestError(
                "prompts must be a list of prompts", got=type(prompts).__name__, remedy="Put a single one in a list."
            )
        if params is None or isinstance(params, SamplingParams):
            every = [params or SamplingParams()] * len(prompts)
        else:
            every = list(params)
        if len(every) != len(prompts):
            raise RequestError(
                "prompts and parameters differ in number", got=f"{len(prompts)} prompts, {len(every)} parameters"
            )
        return [self.make(prompt, one, index=index) for index, (prompt, one) in enumerate(zip(prompts, every))]


def context_length(asked: int | None, *, longest: int, unlimited: bool) -> int:
    """`max_model_len` to use: what was asked for, or all that the model was made for.

    Args:
        longest: the model's max_position_embeddings.
        unlimited: positions are not bound to a table or a trained range (ALiBi).

    Raises:
        RequestError: more was asked for than the model can do.
    """
    if asked is None:
        return longest
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 2:
        raise RequestError("max_model_len is out of range", got=asked, expected="an integer >= 2")
    if asked > longest and not unlimited:
        raise RequestError(
            "max_model_len is more than the model was made for", got=asked, expected=f"at most {longest}"
        )
    return asked
