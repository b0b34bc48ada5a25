"""Requests to stop a run: signals, and notices of preemption."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether the run was asked to stop; a context manager that catches SIGTERM and the first Ctrl-C.

    A signal that arrives while something is compiled, evaluated or saved takes effect at the next step. Of several
    processes each may get the notice at another time: jax's coordination service, which then catches SIGTERM, names the
    step that all of them reach.
    """

    def __init__(self):
        self.reason = "a preemption notice"
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to stop before the step after `step`, the same on all processes."""
        return self._asked or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step))

    def _note(self, number: int, frame: Any) -> None:
        self.reason, self._asked = signal.Signals(number).name, True
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])  # a second Ctrl-C stops at once
