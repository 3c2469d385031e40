"""Handling of SIGINT and SIGTERM. These signals make a run save a checkpoint and stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The exception that ends a run after the run received a signal and saved a checkpoint."""

    def __init__(self, number: int, iteration: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped after iteration {iteration} and saved a checkpoint")
        self.number = number


class Signals:
    """A context manager that stores the number of a received SIGINT or SIGTERM in `number`.

    The run then saves a checkpoint and stops. A second signal ends the process immediately.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set signal handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number
