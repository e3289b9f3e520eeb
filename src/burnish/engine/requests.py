"""From a prompt and its parameters to a checked `Sequence`, the same for every engine here. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf

from burnish.engine.constrained import Constraint, GrammarCompiler
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
        self._grammars = GrammarCompiler(tokenizer, vocab_size=vocab_size, end_ids=end_ids)

    def make(self, prompt: Prompt, params: SamplingParams, *, index: int | None = None) -> Sequence:
        """Check one request that asks for one answer; nothing runs yet.

        Raises:
            RequestError: naming the lengths when the prompt is too long; the stop strings or tokens cannot work; a
                token id is outside the vocabulary; the constraint cannot be followed; or it asks for several answers.
            MissingExtraError: it asks for a constraint, and the library for that is not installed.
        """
        if params.n != 1:
            raise RequestError("only one answer can be produced here", got=f"n={params.n}", expected="n=1")
        return self.make_choices(prompt, params, index=index)[0]

    def make_choices(self, prompt: Prompt, params: SamplingParams, *, index: int | None = None) -> list[Sequence]:
        """Check one request; a sequence for each of its `params.n` answers, `choice` 0, 1, .... Raises as `make`."""
        text, ids = encode_prompt(prompt, self.tokenizer, vocab_size=self.vocab_size)
        if len(ids) >= self.max_model_len:
            raise RequestError(
                "the prompt is too long for the model",
                got=f"{len(ids)} tokens",
                expected=f"at most {self.max_model_len - 1}, as prompt and answer share {self.max_model_len}",
                remedy="Shorten the prompt; whoever runs the engine may raise max_model_len as far as the model goes.",
            )
        if self.tokenizer is None and params.stop:
            raise RequestError("stop strings need a tokenizer, and the model folder has none")
        self._check_ids(params)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.end_ids)
        first_id, *_ = request_ids = [next(self._next_id) for _ in range(params.n)]
        return [
            Sequence(
                request_id=request_id,
                index=first_id if index is None else index,
                choice=choice,
                prompt=text,
                prompt_ids=ids,
                params=params,
                end_ids=ends,
                max_tokens=min(params.max_tokens, self.max_model_len - len(ids)),
                constraint=self._constraint(params),
                text=TextStream(
                    answer_decoder(self.tokenizer, prompt, ids), params.stop, include_stop=params.include_stop
                ),
            )
            for choice, request_id in enumerate(request_ids)
        ]

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        return None if params.constraint is None else self._grammars.start(*params.constraint)

    def _check_ids(self, params: SamplingParams) -> None:
        for what, ids in (
            ("a stop token", params.stop_token_ids),
            ("a token of logit_bias", [token_id for token_id, _ in params.biases]),
        ):
            if ids and max(ids) >= self.vocab_size:
                raise RequestError(
                    f"{what} is outside the vocabulary", got=max(ids), expected=f"0..{self.vocab_size - 1}"
                )

    def make_all(
        self, prompts: SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None
    ) -> list[Sequence]:
        """One sequence per prompt, in order; raises as `make` and `pairs`."""
        return [self.make(prompt, one, index=index) for index, (prompt, one) in enumerate(self.pairs(prompts, params))]

    def pairs(
        self, prompts: SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None
    ) -> list[tuple[Prompt, SamplingParams]]:
        """Each prompt with its parameters.

        Raises:
            RequestError: the prompts are no list, or the counts of prompts and parameters differ.
        """
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
        return list(zip(prompts, every))


def one_answer(params: SamplingParams | None) -> SamplingParams:
    """The parameters of a request that is streamed.

    Raises:
        RequestError: they ask for several answers.
    """
    params = params or SamplingParams()
    if params.n != 1:
        raise RequestError("several answers cannot be streamed", got=f"n={params.n}", expected="n=1")
    return params


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
