"""Log-probabilities of tokens under the model itself: float32 log-softmax of its logits, nothing else applied.

Shapes: L rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from burnish.engine.sampled import TokenLogprob


def token_logprobs(logprobs_LV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """Report one token per row.

    Args:
        logprobs_LV: float32 log-softmax of the logits.
        token_ids: the token of each row.
        num_top: likeliest tokens to report of each row, at most the vocabulary.
    """
    chosen_L1 = torch.tensor(token_ids, device=logprobs_LV.device)[:, None]
    chosen = logprobs_LV.gather(1, chosen_L1)[:, 0].tolist()
    most = min(max(num_top, default=0), logprobs_LV.shape[1])
    if most == 0:
        return [TokenLogprob(token_id, logprob) for token_id, logprob in zip(token_ids, chosen)]
    values_LN, ids_LN = logprobs_LV.topk(most)
    return [
        TokenLogprob(token_id, logprob, tuple(zip(ids[:count], values[:count])))
        for token_id, logprob, ids, values, count in zip(
            token_ids, chosen, ids_LN.tolist(), values_LN.tolist(), num_top
        )
    ]


# Bounds the memory of the second copy of the logits.
_ROWS_AT_ONCE = 64


class PromptLogprobs:
    """The prompt's log-probabilities, gathered while the prompt is read, in one piece or several.

    Args:
        num_top: likeliest tokens to report beside each token of the prompt.
        prompt_ids: the prompt.
    """

    def __init__(self, num_top: int, prompt_ids: Sequence[int]) -> None:
        self.num_top = num_top
        self._prompt_ids = prompt_ids
        self._found: list[TokenLogprob] = []

    @property
    def position(self) -> int:
        """The position whose logits are wanted next; its row tells the log-probability of the token after it."""
        return len(self._found)

    @property
    def complete(self) -> bool:
        return len(self._found) >= len(self._prompt_ids) - 1

    def add(self, logits_LV: Tensor, *, start: int) -> None:
        """Take the logits of positions start..start+L-1 of the sequence.

        Rows of positions taken before (read again after a preemption) and of the prompt's last position or later (they
        tell nothing about the prompt) are passed over.

        Args:
            logits_LV: the model's own logits, any float dtype; not modified.
        """
        first = self.position - start
        last = min(len(self._prompt_ids) - 1 - start, logits_LV.shape[0])
        assert first >= 0 or self.complete, "a position of the prompt was left out"
        if first >= last:
            return
        for begin in range(first, last, _ROWS_AT_ONCE):
            end = min(begin + _ROWS_AT_ONCE, last)
            next_ids = list(self._prompt_ids[start + begin + 1 : start + end + 1])
            logprobs_LV = logits_LV[begin:end].log_softmax(dim=-1, dtype=torch.float32)
            self._found += token_logprobs(logprobs_LV, next_ids, [self.num_top] * len(next_ids))

    def result(self) -> tuple[TokenLogprob | None, ...]:
        """One entry per token of the prompt read so far; nothing comes before the first, so its entry is None."""
        return (None, *self._found)
