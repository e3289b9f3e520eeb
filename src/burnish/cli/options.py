"""Options that several commands share, and --config: a YAML file whose keys are the command's own options."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli.setting_names import CONFIG_KEYS
from burnish.errors import ConfigError


def read_config_file(context: typer.Context, value: Path | None) -> Path | None:
    """Make a YAML file's values the command's defaults, strictly; flags on the command line override them."""
    if value is None or context.resilient_parsing:
        return value
    import yaml

    try:
        record: Any = yaml.safe_load(value.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {value}") from error
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{value} cannot be read", got=reason) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{value} is not YAML", got=" ".join(str(error).split())) from error
    if record is None:
        record = {}
    if not isinstance(record, dict):
        raise ConfigError(f"{value} holds no settings", got=type(record).__name__, expected="key: value lines")
    # Keys are written as the flags are, with either dash or underscore.
    repeatable = {parameter.name for parameter in context.command.params if getattr(parameter, "multiple", False)}
    known = {parameter.name for parameter in context.command.params if parameter.name not in (None, "config", "help")}
    defaults: dict[str, Any] = {}
    for key, setting in record.items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{value} has an unknown key {key}",
                expected=None if close else f"one of {', '.join(sorted(known))}",
                remedy=f"Did you mean {close[0].replace('_', '-')}?" if close else None,
            )
        if isinstance(setting, list):
            setting = [str(item) for item in setting]
            if name not in repeatable:
                setting = ",".join(setting)
        defaults[name] = setting
        context.meta.setdefault(CONFIG_KEYS, {})[name] = f"{key} in {value}"
    context.default_map = {**(context.default_map or {}), **defaults}
    return value


GateData = Annotated[str | None, typer.Option(help="Held-out rows to compare on.")]
GateRows = Annotated[int, typer.Option(help="Held-out questions that child and parent answer; 0 for none.")]
MaxKl = Annotated[float | None, typer.Option(help="Largest mean KL from the parent, nats per token.")]
MaxKlP99 = Annotated[float | None, typer.Option(help="Largest 99th percentile of the KL, nats per token.")]
MinAgreement = Annotated[float | None, typer.Option(help="Least share of equal greedy tokens, 0..1.")]
MaxPerplexityRatio = Annotated[float | None, typer.Option(help="Largest perplexity over the parent's, such as 1.05.")]
MaxScoreDrop = Annotated[
    float | None, typer.Option(help="Share of the task score that may be lost; more fails if it is not chance.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        callback=read_config_file,
        is_eager=True,
        help="YAML file with options of this command; flags override it.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never reach for the network.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto by size and hardware.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; all cores when not given.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read pytorch_model.bin, as weights only.")]
Adapter = Annotated[
    str | None, typer.Option("--adapter", metavar="DIR", help="LoRA adapter to run on the model, unmerged.")
]
Engine = Annotated[str, typer.Option("--engine", help="native, transformers, ctranslate2 or openai:URL[#NAME].")]
Quantize = Annotated[
    str,
    typer.Option(
        "--quantize",
        help="int8 or int4: quantize a dense checkpoint's linears while it is read; auto: int8 on a CPU where it is "
        "measured to be good enough; none.",
    ),
]
WeightsCache = Annotated[
    bool, typer.Option("--weights-cache/--no-weights-cache", help="Keep quantized weights on disk for the next time.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Most memory of the process (GPU: of the card), such as 4GiB."),
]
KvMemory = Annotated[
    str | None, typer.Option("--kv-memory", metavar="SIZE", help="Memory of the KV cache alone, such as 512MiB.")
]
KvDtype = Annotated[
    str | None, typer.Option("--kv-dtype", help="Of the KV cache: auto, float32, bfloat16, float16 or int8.")
]
MaxBatchTokens = Annotated[
    int | None, typer.Option("--max-batch-tokens", help="Tokens computed in one step; prompts are read in such pieces.")
]
Speculation = Annotated[
    str,
    typer.Option(
        "--speculation",
        help="ngram: guess tokens that copy the prompt or the answer and verify them, where it is measured to pay; "
        "auto: so with few sequences at once; off. Answers are the same.",
    ),
]
TensorParallel = Annotated[
    int, typer.Option("--tensor-parallel", metavar="N", help="Processes that share every block (see docs/sharding.md).")
]
PipelineParallel = Annotated[
    int, typer.Option("--pipeline-parallel", metavar="N", help="Stages of blocks, each with processes of its own.")
]
Template = Annotated[str, typer.Option("--template", help="auto, chat, alpaca, sql-context or plain.")]
Columns = Annotated[
    str | None,
    typer.Option("--columns", metavar="FIELD=COLUMN,...", help="Which columns hold instruction, context and answer."),
]
Track = Annotated[
    str | None,
    typer.Option(
        "--track",
        metavar="URI",
        envvar="BURNISH_TRACK",
        help="Mirror the run: http://MLFLOW, sqlite:///FILE, mysql://..., postgresql://..., FILE.jsonl or "
        "wandb://PROJECT[/RUN].",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds something.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, hub id, or burnish-sql-base.", show_default=False)
]


def parse_columns(text: str | None) -> dict[str, str] | None:
    """Read --columns.

    Raises:
        ConfigError: not FIELD=COLUMN pairs.
    """
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not pairs or any(not sign or not name.strip() or not column.strip() for name, sign, column in pairs):
        raise ConfigError("--columns is malformed", got=repr(text), expected="FIELD=COLUMN pairs joined by commas")
    return {name.strip(): column.strip() for name, _, column in pairs}


def parse_numbers(option: str, text: str) -> list[float]:
    """Read an option that is numbers joined by commas.

    Raises:
        ConfigError: a part is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--{option} is malformed", got=repr(text), expected="numbers joined by commas") from error
