"""The training loop.

Nothing in an iteration waits for the device: losses are kept there, and read, checked and logged every `log_every`
iterations, and before a checkpoint. Each iteration begins with a seed of its own, a function of the run's seed, the
iteration and the process, and so does all that is drawn to augment an image: a run that goes on from a checkpoint
makes the steps it would have made, on the CPU to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from relops.models import load_backbone
from relops.training import checkpoint, prediction
from relops.training._files import check_kinds, locked, make_folder, write_json
from relops.training._optional import MODULES, require_all
from relops.training.config import TrainConfig
from relops.training.data import (
    Batch,
    EpochSampler,
    Transformed,
    open_data,
    warn_of_common_images,
    with_proposals,
)
from relops.training.distributed import World, world
from relops.training.log import Clock, Log, Losses, without_nan
from relops.training.optimization import WeightAverage, lr_factor, make_optimizer, set_lr

EPOCHS = 12  # where neither iterations nor epochs are given
EXAMPLES = 8  # images that predictions/ has
FILES = (
    "last.pt",
    "model.pt",
    "log.jsonl",
    "metrics.json",
    "curves.png",
    *(f"predictions/{i}.png" for i in range(EXAMPLES)),
)
FOLDERS = ("predictions", "tensorboard")
STATE = ("model", "optimizer", "average", "phase", "iteration", "losses", "times", "config", "classes")


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


def seed_of(*numbers: int) -> int:
    """32 mixed bits: torch's generator of the CPU looks at no more."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def train(config: TrainConfig, restart: bool = False) -> dict[str, Any]:
    """Trains, from `config.output`/last.pt on where there is one, and returns the metrics of the last evaluation.

    In `config.output` are then: last.pt, the checkpoint; model.pt, the trained detector; log.jsonl, metrics.json,
    curves.png and predictions/, of the first images to evaluate on.

    Args:
        restart: begins anew instead.

    Raises:
        ValueError: naming the setting or file, the rule, and what was got; also where another process has the folder.
        Interrupted: at SIGINT or SIGTERM; the same call goes on.
        FloatingPointError: at a loss that is not finite. The checkpoint is from before.
    """
    require_all(*MODULES)
    if not config.output:
        raise ValueError("output must name a folder, got ''")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with world(config.device) as here, Signals() as signals:
        run = Run(config, here, signals)
        try:
            run.begin(restart)
            return run()
        finally:
            run.close()


class Run:
    """One process's part in a run."""

    log: Log | None = None

    def __init__(self, config: TrainConfig, here: World, signals: Signals) -> None:
        self.world, self.signals = here, signals
        self.lock = contextlib.ExitStack()
        self.folder = Path(config.output)
        self.path = self.folder / "last.pt"
        self.data = open_data(config.data, "train", annotations=config.train_annotations)
        self.test_data = open_data(
            config.data, "test", self.data.classes, config.test_annotations, self.data.pixel_range
        )  # fmt: skip
        if not self.data.classes:
            raise ValueError(f"{config.data}: the images to train on must have objects of at least one class, got none")
        warn_of_common_images(self.data, self.test_data)
        if config.proposals is not None:
            self.data = with_proposals(self.data, config.proposals)
        if config.test_proposals is not None:
            self.test_data = with_proposals(self.test_data, config.test_proposals)
        self.sampler = EpochSampler(
            len(self.data), config.batch, config.seed, here.rank, here.size, self.data.aspect_ratios()
        )
        iterations = config.iterations or round((config.epochs or EPOCHS) * self.sampler.batches_per_epoch)
        self.config = config = dataclasses.replace(config, iterations=iterations, epochs=None)
        self.determining = config.determining() | {"processes": here.size}

        torch.manual_seed(seed_of(config.seed))
        self.model = prediction.build(config.model, len(self.data.classes), config.options).to(here.device)
        if config.backbone_weights is not None:
            weights = checkpoint.load(Path(config.backbone_weights))
            for name, value in weights.items():
                if not isinstance(value, torch.Tensor):
                    raise ValueError(
                        f"{config.backbone_weights}: must hold tensors by name, got {type(value).__name__} as {name!r}"
                    )
            try:
                load_backbone(self.model, weights)
            except ValueError as error:
                raise ValueError(f"{config.backbone_weights}: {error}") from error
        if self.model.uses_masks and not self.data.has_masks:
            warnings.warn(
                f"{config.data}: no object has a mask, so {config.model} is trained by boxes alone", stacklevel=2
            )
        for data in (self.data, self.test_data):
            data.use_masks(self.model.uses_masks)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if self.model.uses_proposals and None in (config.proposals, config.test_proposals):
            raise ValueError(f"model {config.model} is given proposals: proposals and test_proposals must name files")

    def _claim(self, restart: bool) -> None:
        """The folder is there, is this run's alone, and can take what the run will write."""
        make_folder(self.folder)
        self.lock.enter_context(locked(self.folder))
        check_kinds(self.folder, FILES, FOLDERS)
        for left in self.folder.glob("*.pt.*.tmp"):  # of a run that was killed
            left.unlink()
        if restart:
            for name in ("last.pt", "model.pt", "log.jsonl", "metrics.json"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)

    def begin(self, restart: bool) -> None:
        """Claim the folder, and resume from the checkpoint where there is one."""
        iterations = self.config.iterations
        self.world.on_main(lambda: self._claim(restart))  # nobody looks for a checkpoint before that
        stored = None
        if self.path.exists():
            stored = checkpoint.load(self.path, *STATE)
            checkpoint.check_same(self.path, stored["config"], self.determining)
            checkpoint.check_same(self.path, {"classes": stored["classes"]}, {"classes": self.data.classes})
            if self.world.is_main:
                print(f"{self.path}: goes on after iteration {stored['iteration']} of {iterations}")
        self.stored = stored

        fractions = itertools.accumulate(fraction for _, fraction in self.model.phases)
        self.ends = [round(iterations * fraction) for fraction in fractions]

        self.iteration = stored["iteration"] if stored else 0
        self.losses = Losses(stored["losses"] if stored else None)
        training, elapsed, self.logged = stored["times"] if stored else (0.0, 0.0, 0.0)
        self.clock = Clock(training, elapsed)
        self.log = Log(self.folder, self.iteration, iterations) if self.world.is_main else None
        self.batches = self._load_batches()

    def __call__(self) -> dict[str, Any]:
        for phase in range(len(self.ends)):
            self._prepare(phase)
            if self.stored and phase <= self.stored["phase"]:
                if phase < self.stored["phase"]:
                    continue
                self._restore(self.stored)
                self._evaluate_if_due()
            self._train_until(self.ends[phase])
        return self._finish()

    def close(self) -> None:
        self.batches = iter(())  # ends the workers, also where an exception keeps the run alive
        # DistributedDataParallel must not be the last to hold the process group: it would end the group's threads while
        # it holds the interpreter's lock, which these may be waiting for.
        self.parallel = self.model
        if self.log is not None:
            self.log.close()
        self.lock.close()

    def _load_batches(self) -> Iterator[Batch]:
        config = self.config
        images = Transformed(
            self.data, config.min_size, config.max_size, True, config.seed, config.vertical_flip, config.cache
        )
        indices = itertools.islice(self.sampler.batches(self.iteration), config.iterations - self.iteration)
        return iter(prediction.loader(images, indices, config.workers, self.world.device))

    def _prepare(self, phase: int) -> None:
        """A phase begins: the model may copy and freeze weights, and all that depends on which of them are trained is
        made anew."""
        config = self.config
        torch.manual_seed(seed_of(config.seed, phase))
        self.model.start_phase(phase)
        self.model.zero_grad()
        self.phase = phase
        self.optimizer = make_optimizer(
            self.model, config.optimizer, config.lr, config.weight_decay, config.momentum, config.backbone_lr,
            self.model.slower,
        )  # fmt: skip
        self.average = WeightAverage(self.model, config.ema) if config.ema is not None else None
        self.parallel: nn.Module = self.model
        if self.world.size > 1:
            # Which parameters take part in the loss depends on the images (no objects, no masks), and may differ
            # between processes, whatever the model: all gradients are awaited, or known not to come.
            self.parallel = DistributedDataParallel(self.model, find_unused_parameters=True)

    def _restore(self, stored: dict[str, Any]) -> None:
        checkpoint.load_weights(self.path, self.model, stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        if self.average is not None:
            checkpoint.load_weights(self.path, self.average.model, stored["average"])

    def _train_until(self, end: int) -> None:
        config = self.config
        begin = self.ends[self.phase - 1] if self.phase else 0
        self.model.train()
        self.clock.start()
        while self.iteration < end:
            self._step(next(self.batches), self.iteration - begin, end - begin)
            self.iteration += 1
            stop = self.world.largest(self.signals.number)
            last = self.iteration == config.iterations
            if self.iteration % config.log_every == 0 or last:
                self._log()
            if stop or last or self.iteration % config.checkpoint_every == 0 or self._is_evaluated(self.iteration):
                self._save()
            if stop:
                raise Interrupted(stop, self.iteration)
            self._evaluate_if_due()
        self.clock.stop()

    def _step(self, batch: Batch, step: int, steps: int) -> None:
        """The step-th of this phase."""
        config, device = self.config, self.world.device
        torch.manual_seed(seed_of(config.seed, self.iteration, self.world.rank))
        set_lr(self.optimizer, lr_factor(config.schedule, step, steps, config.warmup, config.milestones))
        image_ids = batch.image_ids.tolist()
        batch = prediction.on_device(batch, device, config.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            losses = self.parallel(batch.images, batch.sizes, batch.targets)
        self.losses.add(self.iteration + 1, image_ids, losses)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], config.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, step)
        if self.log is not None:
            self.log.step()

    def _log(self) -> None:
        self.losses.read(self.world)
        iterations = len(self.losses.values)
        losses = self.losses.take_means()
        minutes, seconds = self.clock.training, (self.clock.training - self.logged) * 60
        self.logged = minutes
        if self.log is not None:
            self.log.write(
                {
                    "iteration": self.iteration,
                    "minutes": minutes,
                    "elapsed_minutes": self.clock.elapsed,
                    "loss": sum(losses.values()),
                    "losses": losses,
                    "lr": max(group["lr"] for group in self.optimizer.param_groups),
                    "images_per_second": iterations * self.config.batch * self.world.size / seconds,
                }
            )

    def _save(self) -> None:
        self.losses.read(self.world)  # weights that came of a loss that is not finite are not saved
        self.clock.stop()
        if self.world.is_main:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.model.state_dict() if self.average is not None else None,
                "phase": self.phase,
                "iteration": self.iteration,
                "losses": self.losses.values,
                "times": (self.clock.training, self.clock.elapsed, self.logged),
                "config": self.determining,
                "classes": self.data.classes,
                "pixel_range": self.data.pixel_range and tuple(self.data.pixel_range),
            }
            checkpoint.save(self.path, state)
        self.clock.start()

    def _is_evaluated(self, iteration: int) -> bool:
        """Whether an evaluation belongs after it."""
        every = self.config.eval_every
        return iteration == self.config.iterations or (every is not None and iteration > 0 and iteration % every == 0)

    def _evaluate_if_due(self) -> None:
        """Always just after a checkpoint: what is interrupted here begins again when the run goes on."""
        if not self._is_evaluated(self.iteration):
            return
        logged = self.log is not None and any(x["iteration"] == self.iteration and "AP" in x for x in self.log.lines)
        if self.world.largest(logged):
            return
        self.clock.stop()
        config = self.config
        evaluator = prediction.evaluate(
            self._evaluated(), self.test_data, config.batch, config.min_size, config.max_size, self.world,
            config.workers, config.amp, config.channels_last, stop=lambda: bool(self.signals.number),
        )  # fmt: skip
        if evaluator is None:
            raise Interrupted(self.world.largest(self.signals.number), self.iteration)
        if self.log is not None:
            times = {"minutes": self.clock.training, "elapsed_minutes": self.clock.elapsed}
            self.log.write({"iteration": self.iteration, **times, **without_nan(evaluator.summarize())})
        self.model.train()
        self.clock.start()

    def _evaluated(self) -> nn.Module:
        return self.model if self.average is None else self.average.model

    def _finish(self) -> dict[str, Any]:
        metrics = None
        if self.log is not None:
            config = self.config
            metrics = next(x for x in reversed(self.log.lines) if "AP" in x and x["iteration"] == config.iterations)
            detector = prediction.Detector(
                self._evaluated(), config.model, config.options, self.data.classes, config.min_size, config.max_size,
                config.data, config.train_annotations, config.test_annotations, self.data.pixel_range,
            )  # fmt: skip
            detector.save(self.folder / "model.pt")
            write_json(self.folder / "metrics.json", metrics)
            prediction.draw_examples(detector, self.test_data, self.folder / "predictions", EXAMPLES)
            from relops.training.plots import plot_curves

            plot_curves(self.log.lines, self.folder / "curves.png")
        return self.world.gather(metrics)[0]
