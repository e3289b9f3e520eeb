"""What settings are called where they were given: an option of the command line, or a key of the --config file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from burnish.errors import SettingError

CONFIG_KEYS = "burnish.config_keys"
"""In a context's meta: parameter -> its key and file, as `read_config_file` saw them."""

PARAMETERS = {
    "tokens_per_step": "pack_to",
    "early_stopping_patience": "early_stopping",
    "early_stopping_min_delta": "min_delta",
    "rank_stabilized": "rslora",
    "use_dora": "dora",
    "source": "data",
    "max_running": "concurrency",
    "max_body_bytes": "max_body",
    "stream_interval_s": "stream_interval",
    "slow_reader_timeout_s": "slow_reader",
    "grace_s": "grace",
    "engine_timeout_s": "engine_timeout",
}
"""Of settings that the commands call otherwise: what the parameter is called there."""
_ADAPTERS_ONLY = ("rank", "alpha", "dropout", "target_modules", "dora", "rslora")


def given(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter was given, on the command line or in the --config file."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name not in ("DEFAULT",)


def name_of(context: typer.Context, setting: str) -> str:
    """A setting as the user knows it: "--pack-to", or "pack_to in tune.yaml"; one without an option as it is."""
    parameter = PARAMETERS.get(setting, setting)
    source = context.get_parameter_source(parameter)
    if source is not None and source.name == "DEFAULT_MAP":
        return str(context.meta.get(CONFIG_KEYS, {}).get(parameter, setting))
    for known in context.command.params:
        if known.name == parameter and known.opts and known.opts[0].startswith("-"):
            return max(known.opts, key=len)
    return setting


@contextmanager
def named_as_given(context: typer.Context) -> Iterator[None]:
    """Errors about settings leave the block with the names that the user gave them."""
    try:
        yield
    except SettingError as error:
        raise error.renamed(lambda setting: name_of(context, setting)) from error


def made_together(context: typer.Context, *makers: Callable[[], Any]) -> list[Any]:
    """What the makers give; what is wrong with any of their settings is told at once.

    Raises:
        ConfigError: something is.
    """
    made = [_attempted(make) for make in makers]
    problems = [result for result in made if isinstance(result, SettingError)]
    if problems:
        with named_as_given(context):
            raise SettingError.of(problems)
    return made


def _attempted(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except SettingError as error:
        return error


def check_tune_options(context: typer.Context, options: dict[str, Any]) -> None:
    """Options of `tune` that need another one, or go with another method.

    Raises:
        SettingError: one is of no use.
    """
    problems = []
    needy = [name for name in ("early_stopping", "keep_best", "eval_every") if options[name]]
    if needy and options["eval_data"] is None and options["eval_split"] is None:
        names = " and ".join(f"{{{name}}}" for name in needy)
        verb = "needs" if len(needy) == 1 else "need"
        problems.append(SettingError(f"{names} {verb} rows for evaluation", remedy="Give {eval_data} or {eval_split}."))
    if given(context, "checkpoint_every") and not options["gradient_checkpointing"]:
        problems.append(SettingError("{checkpoint_every} needs {gradient_checkpointing}", remedy="Give both."))
    if options["method"] == "full":
        chosen = [f"{{{name}}}" for name in _ADAPTERS_ONLY if given(context, name)]
        if chosen:
            verb = "is" if len(chosen) == 1 else "are"
            remedy = "Leave one of them out."
            problems.append(
                SettingError(f"{', '.join(chosen)} {verb} for adapters", got="--method full", remedy=remedy)
            )
    if problems:
        raise SettingError.of(problems)
