"""Signals that stop a run after a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A run stopped at a signal, after a checkpoint."""

    def __init__(self, number: int, iteration: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped after iteration {iteration}, with a checkpoint")
        self.number = number


class Signals:
    """Inside it, SIGINT and SIGTERM are noted in `number`, for the run to stop when it can; a second one ends the
    process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number
