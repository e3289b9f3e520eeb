"""A tiny decoder, and an engine that answers from a script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from burnish.engine.outputs import EngineStats, RequestMetrics, RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

VOCAB = 61


def make_decoder(seed: int, *, vocab_size: int = VOCAB, context: int = 64) -> Decoder:
    """A random Llama of some thousand parameters whose next-token distributions are far from flat."""
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        rotary_dim=6,
        max_position_embeddings=context,
    )
    return Decoder(config).initialize(std=0.4, seed=seed).eval()


class ScriptedEngine:
    """Answers every prompt from a mapping; a prompt that is missing there is answered with nothing."""

    def __init__(self, answers: Mapping[str, str], *, max_model_len: int = 64) -> None:
        self.answers = answers
        self.max_model_len = max_model_len
        self.asked: list[Any] = []
        self.params: list[SamplingParams] = []

    def generate(self, prompts: Sequence[Any], params: SamplingParams) -> Iterator[RequestOutput]:
        self.asked.extend(prompts)
        self.params.append(params)
        for index, prompt in enumerate(prompts):
            text = self.answers.get(prompt if isinstance(prompt, str) else "", "")
            yield RequestOutput(
                index=index,
                prompt=None,
                text=text,
                token_ids=(1,) * len(text),
                finish_reason="stop",
                metrics=RequestMetrics(
                    prompt_tokens=len(prompt), output_tokens=len(text), ttft_ms=1.0, tpot_ms=1.0, e2e_ms=2.0
                ),
            )

    def stats(self) -> EngineStats:
        return EngineStats(
            engine="scripted",
            dtype="float32",
            device="cpu",
            threads=1,
            weights_bytes=0,
            kv_bytes=0,
            load_s=0.0,
            optimise_s=0.0,
            warmup_s=0.0,
            running=0,
            waiting=0,
            max_num_seqs=8,
            max_model_len=self.max_model_len,
        )
