"""The exception tree. Every error a user can cause is one of these, and each carries its exit code.

    BurnishError                 1  something failed while running
    ├── ConfigError              2  an option, a recipe or a path is wrong
    │   └── SettingError         2  settings of a config that are wrong, alone or together
    ├── CheckpointError          2  a model folder or a weight file is missing, corrupt or of the wrong shape
    ├── DataError                2  a data set is missing, empty or malformed
    ├── CompressionError         1  a quantizer or pruner cannot go on (not positive definite, NaN weights, ...)
    ├── CapacityError            3  it will not fit
    │   └── OutOfMemoryError     5  it did not fit while running
    ├── RequestError             2  a generation request is not valid
    ├── WorkerError              1  a worker process died
    ├── GateError                4  the child is worse than its parent
    └── MissingExtraError        6  an optional dependency is not installed

A message says what happened, what was got, what was expected and what to do about it, in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import Formatter


class BurnishError(Exception):
    """Base of every error that burnish raises on purpose.

    Args:
        what: what went wrong, naming the file, key or row.
        got: what was found instead, if that helps.
        expected: what would have been right.
        remedy: what to do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.remedy = remedy
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The whole error as one line."""
        parts = [self.what]
        if self.got is not None:
            parts.append(f"got {self.got}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        line = "; ".join(parts)
        if self.remedy:
            line = f"{line}. {self.remedy}"
        return " ".join(line.split())


class ConfigError(BurnishError):
    exit_code = 2


class SettingError(ConfigError):
    """What is wrong with a config's settings; `what` and `remedy` name them in braces: "{steps} is out of range".

    Whoever read the settings from elsewhere, such as a command line, says with `renamed` what they are called there.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, remedy: str | None = None) -> None:
        self._parts = (what, got, expected, remedy)
        self.problems: list[SettingError] = [self]
        names = {name for text in (what, remedy or "") for _, name, _, _ in Formatter().parse(text) if name}
        self.names = sorted(names)
        same = {name: name for name in names}
        remedy = None if remedy is None else remedy.format_map(same)
        super().__init__(what.format_map(same), got=got, expected=expected, remedy=remedy)

    def renamed(self, name_of: Callable[[str], str]) -> ConfigError:
        """The same, with settings called what `name_of` says."""
        said = [problem._said(name_of) for problem in self.problems]
        return said[0] if len(said) == 1 else ConfigError(_together([error.message for error in said]))

    def _said(self, name_of: Callable[[str], str]) -> ConfigError:
        what, got, expected, remedy = self._parts
        names = {name: name_of(name) for name in self.names}
        remedy = None if remedy is None else remedy.format_map(names)
        return ConfigError(what.format_map(names), got=got, expected=expected, remedy=remedy)

    @classmethod
    def of(cls, problems: Sequence[SettingError]) -> SettingError:
        """One error that tells all of these, in one line."""
        flat = [each for problem in problems for each in problem.problems]
        if len(flat) == 1:
            return flat[0]
        whole = cls("")
        whole.problems = flat
        whole.args = (_together([problem.message for problem in flat]),)
        return whole

    @property
    def message(self) -> str:
        """The whole error as one line."""
        if self.problems != [self]:
            return _together([problem.message for problem in self.problems])
        return super().message


def _together(lines: Sequence[str]) -> str:
    numbered = " ".join(f"({number}) {line.rstrip('.')}." for number, line in enumerate(lines, 1))
    return f"{len(lines)} settings are wrong: {numbered}"


class CheckpointError(BurnishError):
    exit_code = 2


class DataError(BurnishError):
    exit_code = 2


class CompressionError(BurnishError):
    exit_code = 1


class CapacityError(BurnishError):
    exit_code = 3


class OutOfMemoryError(CapacityError):
    exit_code = 5


class RequestError(BurnishError):
    exit_code = 2


class WorkerError(BurnishError):
    exit_code = 1


class GateError(BurnishError):
    exit_code = 4


class MissingExtraError(BurnishError):
    exit_code = 6
