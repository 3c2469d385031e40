"""The log of a run (as JSON lines, in TensorBoard and on the terminal), and the losses and times to log."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relops.training._files import written
from relops.training.distributed import World
from relops.training.errors import LossError

SHOWN = ("AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log, or return an empty list if the file does not exist.

    An incomplete last line is skipped. Damaged lines are also skipped, with a message on standard error.
    """
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            if not _is_line(line):
                raise ValueError("a line must be a JSON object with an iteration and numeric values")
        except (ValueError, RecursionError) as error:
            print(f"{path}: line {number} is damaged and is skipped: {error}", file=sys.stderr)
        else:
            lines.append(line)
    return lines


def _is_line(line: Any) -> bool:
    def is_number(x: Any) -> bool:
        return x is None or (type(x) in (int, float) and not abs(x) > sys.float_info.max)

    if not (isinstance(line, dict) and type(line.get("iteration")) is int and line["iteration"] >= 0):
        return False
    losses = line.get("losses", {})
    others = [value for name, value in line.items() if name != "losses"]
    return isinstance(losses, dict) and all(map(is_number, [*others, *losses.values()]))


def without_nan(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN, which JSON does not support, with None."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in metrics.items()}


def in_words(metrics: Mapping[str, Any]) -> str:
    """Format the most important metrics as text."""
    words = [f"{name} {metrics[name]:.4f}" for name in SHOWN if metrics.get(name) is not None]
    return "  ".join(words) or "no AP, because the test images have no objects"


class Log:
    """A writer for `log.jsonl`, for TensorBoard files if TensorBoard is installed, and for progress on the terminal.

    Args:
        folder: the folder for the files.
        iteration: the last finished iteration. Lines of later iterations are removed, because they will be written
            again.
        total: the number of iterations of the run.
    """

    def __init__(self, folder: Path, iteration: int, total: int) -> None:
        self.path, self.total = folder / "log.jsonl", total
        self.lines = [line for line in read_lines(self.path) if line["iteration"] <= iteration]
        with written(self.path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in self.lines).encode())

        self.board = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("TensorBoard is not installed, so its files are not written")
        else:
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)
            print(f"TensorBoard files are written to {folder / 'tensorboard'}")

        self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self.bar = tqdm(total=total, initial=iteration, dynamic_ncols=True)

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in (line | {f"losses/{name}": x for name, x in line.get("losses", {}).items()}).items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, line["iteration"])
        if "loss" in line and self.bar is not None:
            self.bar.set_postfix(loss=f"{line['loss']:.3f}")
        elif "loss" in line:
            remaining = (self.total - line["iteration"]) * line["minutes"] / line["iteration"]
            self.say(
                f"{line['iteration']}/{self.total}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  "
                f"{line['images_per_second']:.1f} images/s  {remaining:.1f} min left"
            )
        else:
            self.say(f"{line['iteration']}/{self.total}  {in_words(line)}")

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()


class Losses:
    """The losses since the last line of the log. They stay on the device until `read` transfers them all at once.

    Attributes:
        values: the losses that were read, averaged over the processes, as one dict per iteration.
    """

    def __init__(self, values: list[dict[str, float]] | None = None) -> None:
        self.values = values or []
        self._unread: list[tuple[int, list[int], dict[str, Tensor]]] = []

    def add(self, iteration: int, image_ids: list[int], losses: dict[str, Tensor]) -> None:
        self._unread.append((iteration, image_ids, {name: loss.detach() for name, loss in losses.items()}))

    def read(self, world: World) -> None:
        """Read the losses of all processes. All processes must call this method in the same iteration.

        Raises:
            LossError: If a loss of any process is not finite. The error is raised in all processes.
        """
        if not self._unread:
            return
        flat = iter(torch.stack([x.float() for _, _, losses in self._unread for x in losses.values()]).tolist())
        own = [(iteration, ids, {name: next(flat) for name in losses}) for iteration, ids, losses in self._unread]
        self._unread = []
        for entries in zip(*world.gather(own)):
            for iteration, image_ids, losses in entries:
                if not all(math.isfinite(loss) for loss in losses.values()):
                    raise LossError(
                        f"losses must be finite, got {losses} in iteration {iteration} for images {image_ids}. "
                        "The last checkpoint was saved before this iteration"
                    )
            names = {name: None for _, _, losses in entries for name in losses}
            self.values.append(
                {name: sum(losses.get(name, 0.0) for _, _, losses in entries) / world.size for name in names}
            )

    def pop_means(self) -> dict[str, float]:
        """Return the mean of each loss over the iterations in `values`, and clear `values`."""
        names = {name: None for losses in self.values for name in losses}
        means = {name: sum(losses.get(name, 0.0) for losses in self.values) / len(self.values) for name in names}
        self.values = []
        return means


class Clock:
    """A clock for the training time (including data loading) and the total time of a run, in minutes.

    Args:
        training, elapsed: for a resumed run, the training time and the total time before it was interrupted.
    """

    def __init__(self, training: float = 0.0, elapsed: float = 0.0) -> None:
        self._training, self._elapsed = training, elapsed
        self._begin = time.monotonic()
        self._running: float | None = None

    def start(self) -> None:
        self._running = time.monotonic()

    def stop(self) -> None:
        self._training, self._running = self.training, None

    @property
    def training(self) -> float:
        return self._training + (0.0 if self._running is None else (time.monotonic() - self._running) / 60)

    @property
    def elapsed(self) -> float:
        return self._elapsed + (time.monotonic() - self._begin) / 60
