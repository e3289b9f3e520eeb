"""What is checked before a model learns from rows: whether they can teach it to answer and to stop.

Counts run over all examples. What needs a second rendering or decoding is looked at in the first `NUM_CHECKED` of them,
because it hangs on template and tokenizer more than on the row. Texts are compared after Unicode NFC, which some
tokenizers apply. A rendered row is compared without its white space, since SentencePiece's kind puts a space after
every special token; an answer is compared with it, except at its two ends.
"""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from burnish.data.encoding import IGNORE, Example
from burnish.data.templates import Rendered, Template, row_prompt_tokens
from burnish.data.tokenizer import Tokenizer
from burnish.errors import DataError

NUM_CHECKED = 512


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was found.

    Attributes:
        num_examples: sequences to learn from.
        num_checked: how many of them were rendered and decoded again.
        num_bad_rows: rows that cannot be used; `num_empty_answers` of them for want of an answer or another text.
        num_too_long: rows left out for their length.
        num_truncated: rows cut; `num_ends_cut` of them lost their end token.
        num_duplicates: examples equal to an earlier one, token by token.
        num_without_end: uncut examples whose last token is no end token that is learned.
        num_wrong_masks: examples whose labels are not exactly their answers with the end tokens.
        num_other_prompts: checked examples that begin otherwise than the prompt at inference.
        num_other_texts: checked examples that decode to another text than was rendered.
        num_other_answers: checked examples whose answer decodes to another text.
        num_doubled_begins: examples that begin with two begin tokens.
        largest_id: largest token id.
        label_share: learned tokens over all tokens.
        pad_differs_from_eos: the pad token is no end token (None: there is no pad token).
        end_is_spelled: the template spells out the end marker itself.
        warnings: what is worth knowing, one line each.
        errors: what makes training pointless or harmful, one line each.
    """

    num_examples: int
    num_checked: int
    num_bad_rows: int
    num_empty_answers: int
    num_too_long: int
    num_truncated: int
    num_ends_cut: int
    num_duplicates: int
    num_without_end: int
    num_wrong_masks: int
    num_other_prompts: int
    num_other_texts: int
    num_other_answers: int
    num_doubled_begins: int
    largest_id: int
    label_share: float
    pad_differs_from_eos: bool | None
    end_is_spelled: bool
    warnings: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()

    @property
    def ends_learned(self) -> bool:
        """Every example that was not cut at its end ends with an end token that is learned."""
        return self.num_without_end == 0

    @property
    def prompts_are_prefixes(self) -> bool:
        """The prompt made for inference has the ids that the training example begins with."""
        return self.num_other_prompts == 0

    @property
    def answers_round_trip(self) -> bool:
        """Decoding the learned ids gives the answer back."""
        return self.num_other_answers == 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Preflight:
        """What `to_dict` gave, after a detour through JSON."""
        return cls(**{**value, "warnings": tuple(value["warnings"]), "errors": tuple(value["errors"])})

    def with_bad_rows(self, reasons: Sequence[str]) -> Preflight:
        """The same with the rows that could not be used, each with its reason."""
        return self.with_bad_counts(len(reasons), sum(is_empty(reason) for reason in reasons))

    def with_bad_counts(self, num_bad_rows: int, num_empty: int) -> Preflight:
        warnings = self.warnings
        if num_bad_rows:
            empty = f", {num_empty} of them because a text is empty" if num_empty else ""
            warnings = (*warnings, f"{num_bad_rows} rows are unusable{empty}")
        return replace(self, num_bad_rows=num_bad_rows, num_empty_answers=num_empty, warnings=warnings)

    def require(self, *, vocab_size: int | None = None) -> Preflight:
        """Itself, if nothing stands against training.

        Args:
            vocab_size: of the model; a token beyond it is an error, too.

        Raises:
            DataError: all errors on one line.
        """
        errors = self.errors
        if vocab_size is not None and self.largest_id >= vocab_size:
            errors = (*errors, f"token {self.largest_id} is beyond the model's vocabulary of {vocab_size}")
        if errors:
            raise DataError(
                f"the data cannot be learned from: {'; '.join(errors)}", remedy="See the rows with burnish data inspect"
            )
        return self


def is_empty(reason: str) -> bool:
    """Whether a row is bad because a text in it is empty, by the reason that the reader of rows gave."""
    return reason.endswith((" is empty", " is null"))


class PreflightCounter:
    """Counts over examples as they are made; in memory it holds 8 bytes of each, to know it again.

    Args:
        tokenizer, template: what the examples are made with.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.num_examples = self.num_labels = self.num_tokens = self.num_truncated = 0
        self.num_ends_cut = self.num_without_end = self.num_wrong_masks = self.num_doubled_begins = 0
        self.num_checked = self.num_other_prompts = self.num_other_texts = self.num_other_answers = 0
        self.num_spelled = 0
        self.largest_id = -1
        self._digests = array("Q")

    def add(self, example: Example) -> None:
        """Count one example."""
        tokenizer, tokens = self.tokenizer, example.tokens
        self.num_examples += 1
        self.num_tokens += len(tokens)
        self.num_labels += len(tokens) - example.labels.count(IGNORE)
        self.num_truncated += example.truncated
        self.num_ends_cut += example.end_cut
        self.num_without_end += not example.end_cut and example.labels[-1] not in tokenizer.eos_ids
        self.num_wrong_masks += not _mask_is_right(example, tokenizer.eos_ids)
        self.num_doubled_begins += len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.bos_id
        self.largest_id = max(self.largest_id, *tokens)
        self._digests.append(token_digest(example))
        if self.num_checked < NUM_CHECKED:
            self.num_checked += 1
            self._check(example)

    def _check(self, example: Example) -> None:
        tokenizer = self.tokenizer
        rendered = self.template.render(example.row, tokenizer)
        self.num_spelled += bool(rendered.end)
        if example.truncated:
            return
        start = example.num_prompt_tokens
        prompt, answer = example.tokens[:start], example.tokens[start:]
        self.num_other_prompts += prompt != row_prompt_tokens(example.row, tokenizer, self.template)
        self.num_other_texts += _bare(_decoded(prompt, answer, rendered, tokenizer)) != _bare(_text(rendered))
        wanted = _without_specials(rendered.answer, tokenizer).strip()
        self.num_other_answers += _nfc(tokenizer.decode(answer).strip()) != _nfc(wanted)

    def result(self, *, num_too_long: int, max_length: int) -> Preflight:
        """What the examples counted so far came to."""
        pad = self.tokenizer.pad_id
        found = Preflight(
            num_examples=self.num_examples,
            num_checked=self.num_checked,
            num_bad_rows=0,
            num_empty_answers=0,
            num_too_long=num_too_long,
            num_truncated=self.num_truncated,
            num_ends_cut=self.num_ends_cut,
            num_duplicates=len(self._digests) - len(np.unique(np.frombuffer(self._digests, dtype=np.uint64))),
            num_without_end=self.num_without_end,
            num_wrong_masks=self.num_wrong_masks,
            num_other_prompts=self.num_other_prompts,
            num_other_texts=self.num_other_texts,
            num_other_answers=self.num_other_answers,
            num_doubled_begins=self.num_doubled_begins,
            largest_id=self.largest_id,
            label_share=round(self.num_labels / max(1, self.num_tokens), 4),
            pad_differs_from_eos=None if pad is None else pad not in self.tokenizer.eos_ids,
            end_is_spelled=self.num_spelled == self.num_checked,
        )
        return replace(found, warnings=_warnings(found, self.template, max_length), errors=_errors(found))


def token_digest(example: Example) -> int:
    """64 bits of an example's tokens and mask."""
    content = array("i", example.tokens).tobytes() + bytes(label != IGNORE for label in example.labels)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _mask_is_right(example: Example, end_ids: frozenset[int]) -> bool:
    """Labels are the tokens or masked, one run per answer, each run up to an end, the last one where the answer is."""
    labels, tokens, start = example.labels, example.tokens, example.num_prompt_tokens
    if len(labels) != len(tokens) or labels[start:] != tokens[start:]:
        return False
    if example.num_answers == 1:
        return labels[:start].count(IGNORE) == start
    runs, inside = 1, False
    for number, label in enumerate(labels[:start]):
        if label != IGNORE and label != tokens[number]:
            return False
        if inside and label == IGNORE:
            runs += 1
            if tokens[number - 1] not in end_ids:
                return False
        inside = label != IGNORE
    return runs == example.num_answers and not inside


def _errors(found: Preflight) -> tuple[str, ...]:
    errors = []
    if found.num_without_end:
        errors.append(f"{found.num_without_end} answers end without an end token that is learned, so it would not stop")
    if found.num_wrong_masks:
        errors.append(f"the label masks of {found.num_wrong_masks} rows are not their answers")
    if found.num_other_prompts:
        errors.append(
            f"{found.num_other_prompts} of {found.num_checked} prompts have other token ids than at inference"
        )
    return tuple(errors)


def _warnings(found: Preflight, template: Template, max_length: int) -> tuple[str, ...]:
    """One line per thing worth knowing."""
    checked = found.num_checked
    lines = [
        (found.num_too_long, f"{found.num_too_long} rows are longer than {max_length} tokens: left out"),
        (
            found.num_truncated - found.num_ends_cut,
            f"{found.num_truncated - found.num_ends_cut} prompts were cut at their start, answers are whole",
        ),
        (found.num_ends_cut, f"{found.num_ends_cut} texts were cut at their end: they lost their end token"),
        (found.num_duplicates, f"{found.num_duplicates} rows are duplicates"),
        (found.num_other_texts, f"{found.num_other_texts} of {checked} rendered rows decode to another text"),
        (
            found.num_other_answers,
            f"{found.num_other_answers} of {checked} answers change when they are tokenized and decoded",
        ),
        (found.num_doubled_begins, f"{found.num_doubled_begins} rows begin with two begin tokens"),
        (
            found.pad_differs_from_eos is False,
            "the pad token is an end token; padding is masked, so the end is learned all the same",
        ),
        (
            template.name == "chat" and not found.end_is_spelled,
            "the chat template spells out no end marker; the tokenizer's end token is added",
        ),
    ]
    return tuple(line for count, line in lines if count)


def _text(rendered: Rendered) -> str:
    return rendered.prompt + rendered.answer + rendered.end


def _decoded(prompt: list[int], answer: list[int], rendered: Rendered, tokenizer: Tokenizer) -> str:
    """Text of both parts, without the begin and end tokens that the template did not spell out."""
    if rendered.add_special_tokens and prompt and prompt[0] == tokenizer.bos_id:
        prompt = prompt[1:]
    if not rendered.end or not tokenizer.eos_ids & set(tokenizer.encode(rendered.end)):
        answer = answer[:-1]
    return tokenizer.decode(prompt, skip_special_tokens=False) + tokenizer.decode(answer, skip_special_tokens=False)


def _without_specials(text: str, tokenizer: Tokenizer) -> str:
    ids = tokenizer.encode(text)
    return tokenizer.decode(ids) if tokenizer.special_ids & set(ids) else text


def _bare(text: str) -> str:
    return "".join(_nfc(text).split())


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
