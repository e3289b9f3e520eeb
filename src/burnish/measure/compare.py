"""A child model beside its parent, token by token, and the gate that decides whether the child is still good."""

# N predicted tokens of a batch, D hidden, C tokens of one chunk, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from burnish.errors import ConfigError
from burnish.measure.intervals import percentile
from burnish.measure.paired import TaskComparison
from burnish.measure.scoring import (
    LabelledTokens,
    LanguageModel,
    batch_spans,
    chosen_hidden,
    chunks,
    default_window,
    device_of,
    evaluation_mode,
    make_spans,
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far a child's next-token distributions are from its parent's. KL(parent || child) in nats per token."""

    kl_mean: float
    kl_p99: float
    kl_max: float
    greedy_agreement: float
    """Share of positions where both name the same most likely token, 0..1."""
    perplexity_child: float
    perplexity_parent: float
    num_tokens: int
    num_sequences: int
    positions: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_models(
    child: LanguageModel,
    parent: LanguageModel,
    examples: Sequence[Sequence[int] | LabelledTokens],
    *,
    positions: str = "labels",
    window: int | None = None,
    batch_tokens: int = 2048,
    chunk_tokens: int = 128,
) -> Comparison:
    """Run both models over held-out tokens and compare what they would say next.

    Args:
        child: the merged, quantized or pruned model.
        parent: what it was made from; the same vocabulary.
        examples: token ids, or examples with labels; held out, never the calibration set.
        positions: `labels` (only what an example answers; all of a plain token list), or `all`.
        window: longest stretch seen at once; the child's context, at most 2048, when None.
        batch_tokens: padded tokens per forward.
        chunk_tokens: positions whose logits exist at the same time, twice.

    Raises:
        ConfigError: the vocabularies differ.
        DataError: there is nothing to score.
    """
    window = window or default_window(child)
    spans = make_spans(examples, window=window, stride=max(1, window // 2), positions=positions)
    divergences: list[float] = []
    agreed = 0
    nll_child = nll_parent = 0.0
    child_device, parent_device = device_of(child), device_of(parent)
    with torch.inference_mode(), evaluation_mode(child, parent):
        for batch in batch_spans(spans, batch_tokens=batch_tokens, device=child_device):
            child_ND = chosen_hidden(child, batch)
            parent_ND = chosen_hidden(parent, batch.to(parent_device))
            for part in chunks(len(child_ND), chunk_tokens):
                child_CV = _log_probabilities(child, child_ND[part])
                parent_CV = _log_probabilities(parent, parent_ND[part]).to(child_device)
                if child_CV.shape != parent_CV.shape:
                    raise ConfigError(
                        "child and parent have different vocabularies",
                        got=f"{child_CV.shape[-1]} and {parent_CV.shape[-1]} tokens",
                        remedy="Compare a model with the one it was made from.",
                    )
                divergence_C = (parent_CV.exp() * (parent_CV - child_CV)).sum(-1).clamp_min(0)
                divergences.extend(divergence_C.tolist())
                agreed += int((child_CV.argmax(-1) == parent_CV.argmax(-1)).sum())
                targets_C1 = batch.targets_N[part, None]
                nll_child -= child_CV.gather(-1, targets_C1).double().sum().item()
                nll_parent -= parent_CV.gather(-1, targets_C1).double().sum().item()
    count = len(divergences)
    finite = all(math.isfinite(value) for value in divergences)
    return Comparison(
        kl_mean=math.fsum(divergences) / count if finite else math.nan,
        kl_p99=(percentile(divergences, 0.99) or 0.0) if finite else math.nan,
        kl_max=max(divergences) if finite else math.nan,
        greedy_agreement=agreed / count,
        perplexity_child=_exp(nll_child / count),
        perplexity_parent=_exp(nll_parent / count),
        num_tokens=count,
        num_sequences=len({span.sequence for span in spans}),
        positions=positions,
    )


def _log_probabilities(model: LanguageModel, hidden_CD: Tensor) -> Tensor:
    return model.logits(hidden_CD).float().log_softmax(-1)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """What a child may lose. None leaves a figure unjudged; scores and drops are shares in 0..1."""

    max_kl_mean: float | None = None
    max_kl_p99: float | None = None
    min_greedy_agreement: float | None = None
    max_perplexity_ratio: float | None = None
    """Child's perplexity over parent's."""
    max_score_drop: float | None = None
    """Parent's score less child's. Of paired answers a larger drop counts when it is not chance: see `paired`."""
    min_score: float | None = None

    def __post_init__(self) -> None:
        shares = ("min_greedy_agreement", "max_score_drop", "min_score")
        for name in (item.name for item in fields(self)):
            limit, most = getattr(self, name), 1 if name in shares else math.inf
            if limit is not None and not 0 <= limit <= most:
                raise ConfigError(f"{name} is out of range", got=limit, expected=f"0 to {most}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`pass` or `fail`, and for every limit that was broken one sentence."""

    verdict: str
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "reasons": list(self.reasons)}


class Gate:
    """Judges a child by limits on what it may lose against its parent."""

    def __init__(self, limits: GateLimits) -> None:
        self.limits = limits

    def judge(
        self,
        comparison: Comparison | None = None,
        *,
        score: float | None = None,
        parent_score: float | None = None,
        task: TaskComparison | None = None,
        worst_layers: Sequence[tuple[str, float]] = (),
    ) -> Verdict:
        """Hold the figures against the limits. A figure that is NaN breaks its limit.

        Args:
            comparison: needed for the limits on KL, agreement and perplexity.
            score: the child's task score, needed for the limits on the score.
            parent_score: the parent's, needed for `max_score_drop`.
            task: both models' answers to the same questions, instead of these two.
            worst_layers: (name, error), named in the reasons when the child fails.

        Raises:
            ConfigError: a limit is set whose figure was not measured.
        """
        limits = self.limits
        reasons: list[str] = []

        def at_most(label: str, value: float | None, limit: float | None) -> None:
            if limit is not None and not _known(label, value) <= limit:
                reasons.append(f"{label} is {value:.4g}, more than {limit:.4g}")

        def at_least(label: str, value: float | None, limit: float | None) -> None:
            if limit is not None and not _known(label, value) >= limit:
                reasons.append(f"{label} is {value:.4g}, less than {limit:.4g}")

        at_most("mean KL", comparison and comparison.kl_mean, limits.max_kl_mean)
        at_most("p99 KL", comparison and comparison.kl_p99, limits.max_kl_p99)
        at_least("greedy agreement", comparison and comparison.greedy_agreement, limits.min_greedy_agreement)
        at_most("perplexity ratio", comparison and _perplexity_ratio(comparison), limits.max_perplexity_ratio)
        if task is None:
            drop = None if score is None or parent_score is None else parent_score - score
            at_most("score drop", drop, limits.max_score_drop)
        elif limits.max_score_drop is not None:
            reasons += task.losses(limits.max_score_drop)
        at_least("score", score if task is None else task.score, limits.min_score)
        if reasons and worst_layers:
            worst = sorted(worst_layers, key=lambda layer: -layer[1])[:3]
            reasons.append("worst layers: " + ", ".join(f"{name} ({error:.3g})" for name, error in worst))
        return Verdict(verdict="fail" if reasons else "pass", reasons=tuple(reasons))


def _known(label: str, value: float | None) -> float:
    if value is None:
        raise ConfigError(f"a limit on {label} is set, but {label} was not measured", remedy="Measure it or drop it.")
    return value


def _perplexity_ratio(comparison: Comparison) -> float:
    if not comparison.perplexity_parent:
        return math.nan
    return comparison.perplexity_child / comparison.perplexity_parent
