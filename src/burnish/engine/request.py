"""One request: its prompt's answers, begun, followed and handed back together. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from burnish.engine.outputs import RequestOutput, StreamEvent, make_metrics
from burnish.engine.sequence import Sequence


@dataclass(kw_only=True, eq=False)
class Request:
    """`params.n` sequences of one prompt.

    Attributes:
        followed: its tokens are handed out by `NativeEngine.step_events`.
        shown: tokens of the first answer handed out so far.
    """

    sequences: list[Sequence]
    followed: bool = False
    shown: int = 0

    @property
    def request_id(self) -> int:
        return self.sequences[0].request_id

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    def event(self, *, with_text: bool = False) -> StreamEvent | None:
        """What is new since the last event; None when nothing is. Of several answers only the end is shown.

        Args:
            with_text: tokens wait for the text that they, or the end, make certain.
        """
        first = self.sequences[0]
        output = self.output() if self.finished else None
        if len(self.sequences) > 1:
            return None if output is None else StreamEvent(text=output.text, token_ids=output.token_ids, output=output)
        piece = first.text.take()
        token_ids = tuple(first.token_ids[self.shown :])
        if not (piece or output or (token_ids and not with_text)):
            return None
        self.shown = len(first.token_ids)
        return StreamEvent(text=piece, token_ids=token_ids, output=output)

    def output(self) -> RequestOutput:
        """The finished request as its caller sees it."""
        first = self.sequences[0]
        choices = tuple(sequence.completion() for sequence in self.sequences)
        return RequestOutput(
            index=first.index,
            prompt=first.prompt,
            text=choices[0].text,
            token_ids=choices[0].token_ids,
            finish_reason=choices[0].finish_reason,
            logprobs=choices[0].logprobs,
            error=choices[0].error,
            choices=choices,
            prompt_logprobs=None if first.prompt_logprobs is None else first.prompt_logprobs.result(),
            metrics=make_metrics(
                prompt_tokens=len(first.prompt_ids),
                arrival_s=first.arrival_s,
                token_times_s=sorted(time_s for sequence in self.sequences for time_s in sequence.token_times_s),
                end_s=max(sequence.end_s for sequence in self.sequences),
            ),
        )
