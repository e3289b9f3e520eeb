"""Ends before the last step: on a signal, or when the evaluation loss no longer falls; the best weights until then."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from burnish.train.checkpoints import Checkpoint
from burnish.train.config import TrainConfig
from burnish.train.state import RunState, load_parameters

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether someone wants the run to end after the step at hand."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        self.requested = True


@contextlib.contextmanager
def stop_on_signals(notify: Callable[[str], None] | None = None) -> Iterator[StopRequest]:
    """Inside the block the first SIGINT or SIGTERM is a request, and a further SIGINT a KeyboardInterrupt.

    A further SIGTERM changes nothing: launchers send it beside the Ctrl-C that reaches the whole group. Signals that
    the process ignores stay ignored; outside the main thread, where handlers cannot be set, nothing is.

    Args:
        notify: told once, from inside the handler, that the run is about to end.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        request.request()
        if notify is not None:
            # The signal may have come while the same stream was being written to, which does not allow a second writer.
            with contextlib.suppress(RuntimeError):
                notify("stopping after the step at hand; Ctrl-C once more stops at once")

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class EarlyStopping:
    """Watches the evaluation loss: remembers the lowest, and counts evaluations without a real gain.

    A gain is a loss more than `early_stopping_min_delta` below that of the last gain, so that many small ones add up
    to one. Counters stand in the run's state.
    """

    def __init__(self, config: TrainConfig, state: RunState) -> None:
        self.patience, self.min_delta, self.state = (
            config.early_stopping_patience,
            config.early_stopping_min_delta,
            state,
        )

    @property
    def exhausted(self) -> bool:
        """The loss has not fallen for as many evaluations as the patience allows."""
        return self.patience is not None and self.state.without_gain >= self.patience

    def observe(self, loss: float) -> bool:
        """Count an evaluation at the state's step; True if no loss was lower. One that is not finite is no gain."""
        state = self.state
        if loss < (math.inf if state.gain_loss is None else state.gain_loss - self.min_delta):
            state.gain_loss, state.without_gain = loss, 0
        else:
            state.without_gain += 1
        lowest = loss < (math.inf if state.best_loss is None else state.best_loss)
        if lowest:
            state.best_loss, state.best_step = loss, state.step
        return lowest


class BestWeights:
    """The trained parameters at the lowest evaluation loss: in a checkpoint, or in memory where none could be written.

    Args:
        parameters: the trained ones by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self._place: Path | None = None
        self._copies: dict[str, Tensor] = {}

    def keep(self, place: Path | None) -> None:
        """The parameters are the best ones now.

        Args:
            place: the checkpoint that holds them; they are copied into the CPU's memory without one.
        """
        self._place = place
        self._copies = {} if place else {name: value.detach().cpu().clone() for name, value in self.parameters.items()}

    def keep_saved(self, place: Path) -> None:
        """An earlier session's best weights are in this checkpoint.

        Raises:
            CheckpointError: it is not there, or damaged.
        """
        Checkpoint(place)
        self._place, self._copies = place, {}

    def give_back(self) -> None:
        """Set the parameters to the best ones.

        Raises:
            CheckpointError: the checkpoint was damaged since.
        """
        if self._place is not None:
            load_parameters(Checkpoint(self._place), self.parameters)
            return
        with torch.no_grad():
            for name, value in self._copies.items():
                self.parameters[name].copy_(value)
