"""W5: answers that copy from their prompts (text-to-SQL: the words of the schema come back), speculation on and off.

    python benchmarks/w5_copying.py MODEL --quantize int8

One request at a time, the bundled task's test questions, with and without speculation in turn; the rate is tokens after
the first per second after the first. Every run asks other questions: what was answered before is remembered (see
`--earlier`), and the same question again would be no guess. Figures:

    real      the bundled model tuned on the task (see tuned.py), which writes the answers itself. Greedy answers have
              to be the same. It is small: what a step costs outside the model weighs more than it would elsewhere.
    scripted  MODEL, of a size that people run, computes every step of the same prompts and answers, but the tokens it
              chooses are replaced by those that the tuned model wrote: random weights copy nothing. Reading, guessing,
              verifying and the decision whether guessing pays are all real; only the text is another model's. It says
              how fast MODEL would be if it answered as the tuned model does, in that model's tokens (of a vocabulary
              of 3072; a larger one spells the same text in fewer).
    rows      as scripted, with the expected answers of other rows (`--rows`, such as WikiSQL's), spelled in tokens of
              `--tokenizer`: what a model that answers right would write. Nobody's own answers.

`real` needs no MODEL: leave it out to measure that alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from session import arguments, record_of, speculates, spread, table, tell
from torch import Tensor
from tuned import DEFAULT, tuned_model

from burnish.data.rows import read_rows
from burnish.data.templates import pick_template
from burnish.data.tokenizer import Tokenizer
from burnish.engine.native import NativeEngine
from burnish.engine.outputs import RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.engine.step import Backend, StepInputs
from burnish.pipeline.evaluate import row_prompt_tokens

MAX_ANSWER = 96
MAX_MODEL_LEN = 512
STATES = ("off", "ngram")
WARM_UP = 4


class ScriptedBackend:
    """A backend that computes as it always does, and whose tokens are then replaced by those of `text`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.text: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, step: StepInputs, *, greedy: bool) -> Tensor:
        """See `Backend.forward`; one sequence, greedy."""
        assert greedy
        assert len(step.context_lens_S) == 1
        self._backend.forward(step, greedy=True)
        following = step.positions_T[step.logit_rows_L] + 1
        return torch.tensor([self.text[min(place, len(self.text) - 1)] for place in following.tolist()])


def main() -> int:
    parser = arguments(__doc__, model=False, runs=2)
    parser.add_argument("model", nargs="?", help="folder of the model that follows the script")
    parser.add_argument("--tuned", type=Path, default=DEFAULT, help="folder of the tuned model; made when absent")
    parser.add_argument("--questions", type=int, default=40, help="asked in each run")
    parser.add_argument("--earlier", type=int, default=200, help="other questions that were answered before")
    parser.add_argument("--rows", help="file of questions with schemas and answers, for the figure of that name")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer that spells them")
    flags = parser.parse_args()
    if (flags.rows is None) != (flags.tokenizer is None) or (flags.rows and not flags.model):
        parser.error("--rows, --tokenizer and MODEL go together")
    if not speculates():
        raise SystemExit("this burnish has no speculation")
    prompts, answers, real = measure_real(flags)
    record: dict[str, Any] = {"work": "w5", "threads": flags.threads, "real": real}
    record |= {"questions": flags.questions, "earlier": flags.earlier}
    rows = [["figure", "off, tokens/s", "on, tokens/s", "ratio", "tokens per step", "guesses that came true"]]
    rows.append(_row("real", real))
    if flags.model:
        record |= {"scripted": measure_scripted(flags, prompts, answers)}
        rows.append(_row("scripted", record["scripted"]))
    if flags.rows:
        record |= {"rows": {"source": Path(flags.rows).name, **measure_scripted(flags, *expected_texts(flags))}}
        rows.append(_row("rows", record["rows"]))
    longest = max(map(len, prompts))
    count = flags.runs * flags.questions
    note = f"{real['same_answers']} of {count} real answers the same; {flags.earlier} questions were answered before; "
    note += f"prompts up to {longest} tokens"
    tell(flags, record, f"{table(rows)}\n\n{note}")
    return 0


def measure_real(flags: argparse.Namespace) -> tuple[list[list[int]], list[list[int]], dict[str, Any]]:
    """The questions, the tuned model's answers to them (token ids both), and its figures."""
    folder = tuned_model(flags.tuned, threads=flags.threads)
    tokenizer = Tokenizer.load(folder)
    rows = read_rows(f"text-to-sql:test:{_asked(flags)}", seed=0)
    template = pick_template("chat", tokenizer, rows)
    prompts = [row_prompt_tokens(row, tokenizer, template) for row in rows.rows]
    engines = {state: _engine(flags, str(folder), state, dtype="auto", quantize="none") for state in STATES}
    params = SamplingParams(max_tokens=MAX_ANSWER)
    answers: dict[str, list[list[int]]] = {}

    def answer(state: str, number: int) -> RequestOutput:
        [output] = list(engines[state].generate([prompts[number]], params))
        answers.setdefault(state, [[] for _ in prompts])[number] = list(output.token_ids)
        return output

    figures = _in_turn(flags, engines, answer)
    same = sum(a == b for a, b in zip(answers["off"][flags.earlier :], answers["ngram"][flags.earlier :]))
    stats = engines["off"].stats()
    named = {"model": "burnish-sql-base, tuned", "dtype": stats.dtype, "backend": stats.backend}
    written = answers["ngram"][: flags.earlier] + answers["off"][flags.earlier :]
    return prompts, written, {**named, **figures, "same_answers": same}


def expected_texts(flags: argparse.Namespace) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and expected answers of the rows, as token ids."""
    tokenizer = Tokenizer.load(flags.tokenizer)
    prompts, answers = [], []
    for row in read_rows(flags.rows, limit=_asked(flags)).rows:
        # Encoded as one text and cut, so that the edge is spelled as it would be when the model goes on.
        question = f"{row.context}\n\nQuestion: {row.instruction}\nSQL:"
        prompt = tokenizer.encode_prompt(question)
        prompts.append(prompt)
        answers.append(tokenizer.encode_prompt(f"{question} {row.answer}\n")[len(prompt) :])
    return prompts, answers


def measure_scripted(flags: argparse.Namespace, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
    """The figures of MODEL, following the answers word for word."""
    engines = {
        state: _engine(flags, flags.model, state, dtype=flags.dtype, quantize=flags.quantize) for state in STATES
    }
    scripts = {}
    for state, engine in engines.items():
        engine.runner.backend = scripts[state] = ScriptedBackend(engine.runner.backend)

    def answer(state: str, number: int) -> RequestOutput:
        scripts[state].text = prompts[number] + answers[number]
        params = SamplingParams(max_tokens=len(answers[number]), ignore_eos=True)
        [output] = list(engines[state].generate([prompts[number]], params))
        assert list(output.token_ids) == answers[number]
        return output

    figures = _in_turn(flags, engines, answer)
    return {**record_of("w5", flags, engines["off"].stats()), **figures}


def _engine(flags: argparse.Namespace, model: str, state: str, *, dtype: str, quantize: str) -> NativeEngine:
    return NativeEngine(
        model,
        dtype=dtype,
        quantize=quantize,
        kv_dtype=flags.kv_dtype,
        threads=flags.threads,
        max_num_seqs=1,
        max_model_len=MAX_MODEL_LEN,
        speculation=state,
    )


def _asked(flags: argparse.Namespace) -> int:
    """Questions needed in all."""
    return flags.earlier + flags.runs * flags.questions


def _in_turn(flags: argparse.Namespace, engines: dict[str, NativeEngine], answer: Any) -> dict[str, Any]:
    """Every question with each engine, one engine after the other; the earlier ones unmeasured and before."""
    for number in range(flags.earlier):
        answer("ngram", number)
    for number in range(min(WARM_UP, flags.earlier)):
        answer("off", number)
    before = engines["ngram"].stats()
    tokens = dict.fromkeys(engines, 0)
    seconds = dict.fromkeys(engines, 0.0)
    ratios = []
    for run in range(flags.runs):
        spent = dict.fromkeys(engines, 0.0)
        begin = flags.earlier + run * flags.questions
        for number in range(begin, begin + flags.questions):
            for state in engines:
                output = answer(state, number)
                tokens[state] += output.metrics.output_tokens - 1
                spent[state] += (output.metrics.e2e_ms - (output.metrics.ttft_ms or 0.0)) / 1e3
        ratios.append(spent["off"] / spent["ngram"])
        for state in engines:
            seconds[state] += spent[state]
    after = engines["ngram"].stats()
    # The steps of prompts give one token each, and none of them is counted.
    steps = after.steps - before.steps - flags.runs * flags.questions
    return {
        "rate_off": round(tokens["off"] / seconds["off"], 2),
        "rate_on": round(tokens["ngram"] / seconds["ngram"], 2),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "tokens": tokens["ngram"],
        "steps": steps,
        "tokens_per_step": round(tokens["ngram"] / steps, 3),
        "drafted": after.drafted_tokens - before.drafted_tokens,
        "accepted": after.accepted_tokens - before.accepted_tokens,
    }


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    drafted, accepted = figures["drafted"], figures["accepted"]
    return [
        name,
        f"{figures['rate_off']:.1f}",
        f"{figures['rate_on']:.1f}",
        spread(figures["ratios"], 2),
        f"{figures['tokens_per_step']:.2f}",
        f"{accepted} of {drafted}" + (f", {100 * accepted / drafted:.0f} %" if drafted else ""),
    ]


if __name__ == "__main__":
    sys.exit(main())
