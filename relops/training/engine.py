"""The training loop.

Most iterations do not wait for the device. The losses stay on the device, and are read and checked only every
`log_every` iterations and before each checkpoint.

Each iteration sets its own random seed, which depends only on the run's seed, the iteration and the process. The
augmentation of each image also has its own seed. Therefore a run that resumes from a checkpoint takes the same steps as
an uninterrupted run. On the CPU, the results of both runs are bitwise identical.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from relops.models.detectors.base import BaseDetector
from relops.training import checkpoint
from relops.training._files import check_kinds, locked, make_folder, write_json
from relops.training._optional import MODULES, require_all
from relops.training.config import EPOCHS, TrainConfig
from relops.training.data import (
    Batch,
    DetectionData,
    EpochSampler,
    Transformed,
    open_data,
    warn_of_common_images,
    with_proposals,
)
from relops.training.data.batches import load_batches
from relops.training.detector import Detector, build_model
from relops.training.distributed import World, world
from relops.training.errors import UsageError
from relops.training.evaluation import evaluate
from relops.training.log import Clock, Log, Losses, without_nan
from relops.training.optimization import WeightAverage, lr_factor, make_optimizer, set_lr
from relops.training.plots import plot_curves
from relops.training.prediction import draw_examples
from relops.training.signals import Interrupted, Signals

EXAMPLES = 8  # number of images in predictions/
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


def seed_of(*numbers: int) -> int:
    """Hash numbers to a seed of 32 bits, because torch's CPU generator uses only the lowest 32 bits of a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def train(config: TrainConfig, restart: bool = False) -> dict[str, Any]:
    """Train a detector, or resume its training if `config.output` contains a checkpoint last.pt.

    The run writes these files to `config.output`:

    - last.pt: the checkpoint.
    - model.pt: the trained detector.
    - log.jsonl: losses, learning rates and metrics.
    - metrics.json: the metrics of the last evaluation.
    - curves.png: a plot of losses and average precision.
    - predictions/: drawings of the first test images with their detections.

    Args:
        config: the settings.
        restart: start over even if there is a checkpoint.

    Returns:
        The metrics of the last evaluation.

    Raises:
        UsageError: If a setting or a file is invalid, or if another process is using the folder. The message names the
            setting or file, the rule that it breaks, and the invalid value.
        Interrupted: If SIGINT or SIGTERM is received. Calling `train` again with the same settings resumes the run.
        LossError: If a loss is not finite. The last checkpoint was saved before this loss occurred.
    """
    require_all(*MODULES)
    if not config.output:
        raise UsageError("output must name a folder, got ''")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with world(config.device) as current_world, Signals() as signals:
        run = Run(config, current_world, signals)
        try:
            run.begin(restart)
            return run.train()
        finally:
            run.close()


def _open_both(config: TrainConfig) -> tuple[DetectionData, DetectionData]:
    """Open the training data and the test data, and add the proposals for which files are given."""
    data = open_data(config.data, "train", annotations=config.train_annotations)
    if not data.classes:
        raise UsageError(f"{config.data}: the training images must have objects of at least one class, got none")
    test_data = open_data(config.data, "test", data.classes, config.test_annotations, data.pixel_range)
    warn_of_common_images(data, test_data)
    if config.proposals is not None:
        data = with_proposals(data, config.proposals)
    if config.test_proposals is not None:
        test_data = with_proposals(test_data, config.test_proposals)
    return data, test_data


def _make_model(config: TrainConfig, num_classes: int) -> BaseDetector:
    """Build the model with its initial weights."""
    torch.manual_seed(seed_of(config.seed))
    model = build_model(config.model, num_classes, config.options)
    if model.uses_proposals and None in (config.proposals, config.test_proposals):
        raise UsageError(f"model {config.model} needs proposals: proposals and test_proposals must name files")
    if config.backbone_weights is not None:
        checkpoint.load_backbone_weights(Path(config.backbone_weights), model)
    return model


class Run:
    """The part of a run that one process executes.

    Creating a `Run` opens the input files. Then `begin` locks the output folder and loads the checkpoint, and `train`
    trains the model. `close` must be called at the end, even after an error.
    """

    # These attributes are set by __init__. `config.iterations` is the length of the run, even if `epochs` was given.
    # `determining` contains the settings that must equal those in a checkpoint, and `ends` contains the iteration at
    # which each phase ends.
    world: World
    signals: Signals
    folder: Path
    checkpoint_file: Path
    data: DetectionData
    test_data: DetectionData
    sampler: EpochSampler
    iterations: int
    config: TrainConfig
    determining: dict[str, Any]
    model: BaseDetector
    ends: list[int]
    lock: contextlib.ExitStack

    # These attributes are set by begin. `stored` is the content of the checkpoint, `iteration` is the number of
    # completed iterations, and `logged` is the training time in minutes at the last line of the log. Only the main
    # process has a log.
    stored: dict[str, Any] | None
    iteration: int
    losses: Losses
    clock: Clock
    logged: float
    log: Log | None = None
    batches: Iterator[Batch]

    # These attributes are set by _start_phase. `parallel` is the model, or a wrapper that averages the gradients of the
    # model over processes.
    phase: int
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    parallel: nn.Module

    def __init__(self, config: TrainConfig, world: World, signals: Signals) -> None:
        self.world, self.signals = world, signals
        self.folder = Path(config.output)
        self.checkpoint_file = self.folder / "last.pt"
        self.lock = contextlib.ExitStack()

        self.data, self.test_data = _open_both(config)
        aspect_ratios = self.data.aspect_ratios()
        self.sampler = EpochSampler(len(self.data), config.batch, config.seed, world.rank, world.size, aspect_ratios)
        self.iterations = config.iterations or round((config.epochs or EPOCHS) * self.sampler.batches_per_epoch)
        self.config = dataclasses.replace(config, iterations=self.iterations, epochs=None)
        self.determining = self.config.determining() | {"processes": world.size}

        self.model = _make_model(config, len(self.data.classes)).to(world.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if self.model.uses_masks and not self.data.has_masks:
            warnings.warn(
                f"{config.data}: no object has a mask, so {config.model} is trained with boxes only", stacklevel=2
            )
        for data in (self.data, self.test_data):
            data.use_masks(self.model.uses_masks)
        fractions = itertools.accumulate(fraction for _, fraction in self.model.phases)
        self.ends = [round(self.iterations * fraction) for fraction in fractions]

    def begin(self, restart: bool) -> None:
        """Lock the folder, and load the state of the run from its checkpoint or, without one, set the initial state."""
        # All processes wait here until the folder is locked. Only then do they look for a checkpoint.
        self.world.on_main(lambda: self._claim(restart))
        self.stored = self._load_checkpoint() if self.checkpoint_file.exists() else None
        start = self.stored or {"iteration": 0, "losses": [], "times": (0.0, 0.0, 0.0)}
        self.iteration = start["iteration"]
        self.losses = Losses(start["losses"])
        training, elapsed, self.logged = start["times"]
        self.clock = Clock(training, elapsed)
        self.log = Log(self.folder, self.iteration, self.iterations) if self.world.is_main else None

        config = self.config
        images = Transformed(
            self.data, config.min_size, config.max_size, True, config.seed, config.vertical_flip, config.cache
        )
        indices = itertools.islice(self.sampler.batches(self.iteration), self.iterations - self.iteration)
        self.batches = iter(load_batches(images, indices, config.workers, self.world.device))

    def _claim(self, restart: bool) -> None:
        """Create and lock the folder, and check that the files of the run can be written there."""
        make_folder(self.folder)
        self.lock.enter_context(locked(self.folder))
        check_kinds(self.folder, FILES, FOLDERS)
        for stale in self.folder.glob("*.pt.*.tmp"):  # temporary files of a run that was killed
            stale.unlink()
        if restart:
            for name in ("last.pt", "model.pt", "log.jsonl", "metrics.json"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)

    def _load_checkpoint(self) -> dict[str, Any]:
        stored = checkpoint.load(self.checkpoint_file, *STATE)
        checkpoint.check_same(self.checkpoint_file, stored["config"], self.determining)
        checkpoint.check_same(self.checkpoint_file, {"classes": stored["classes"]}, {"classes": self.data.classes})
        if self.world.is_main:
            print(f"{self.checkpoint_file}: resuming after iteration {stored['iteration']} of {self.iterations}")
        return stored

    def train(self) -> dict[str, Any]:
        """Take the remaining steps, evaluate, write the results, and return the metrics."""
        for phase, end in enumerate(self.ends):
            self._start_phase(phase)
            if self.stored and phase <= self.stored["phase"]:
                if phase < self.stored["phase"]:
                    continue
                self._restore(self.stored)
                self._evaluate_if_due()
            self._train_until(end)
        return self._finish()

    def close(self) -> None:
        """Release the workers, the process group, the log files and the lock of the folder."""
        self.batches = iter(())  # ends the workers even if a traceback still refers to this object
        # DistributedDataParallel must not hold the last reference to the process group. Otherwise the destructor of the
        # group would join the group's threads while it holds the interpreter lock, and these threads may be waiting for
        # the same lock.
        self.parallel = self.model
        if self.log is not None:
            self.log.close()
        self.lock.close()

    def _start_phase(self, phase: int) -> None:
        """Begin a phase. The model may copy and freeze weights at the start of a phase.

        The optimizer, the weight average and the parallel wrapper depend on which weights are trained, so they are
        created again for each phase.
        """
        config = self.config
        torch.manual_seed(seed_of(config.seed, phase))
        self.model.start_phase(phase)
        self.model.zero_grad()
        self.phase = phase
        self.optimizer = make_optimizer(
            self.model,
            config.optimizer,
            config.lr,
            config.weight_decay,
            config.momentum,
            config.backbone_lr,
            self.model.slower,
        )
        self.average = WeightAverage(self.model, config.ema) if config.ema is not None else None
        self.parallel = self.model
        if self.world.size > 1:
            # An image may have no objects or no masks, so the parameters that contribute to the loss may differ between
            # processes. DDP must therefore look for unused parameters for every model.
            self.parallel = DistributedDataParallel(self.model, find_unused_parameters=True)

    def _restore(self, stored: dict[str, Any]) -> None:
        checkpoint.load_weights(self.checkpoint_file, self.model, stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        if self.average is not None:
            checkpoint.load_weights(self.checkpoint_file, self.average.model, stored["average"])

    def _train_until(self, end: int) -> None:
        """Take the remaining steps of the phase, and log, save and evaluate at the intervals in the settings."""
        config = self.config
        begin = self.ends[self.phase - 1] if self.phase else 0
        self.model.train()
        self.clock.start()
        while self.iteration < end:
            self._step(next(self.batches), self.iteration - begin, end - begin)
            self.iteration += 1
            stop = self.world.largest(self.signals.number)
            last = self.iteration == self.iterations
            if self.iteration % config.log_every == 0 or last:
                self._log()
            if stop or last or self.iteration % config.checkpoint_every == 0 or self._evaluation_is_due():
                self._save()
            if stop:
                raise Interrupted(stop, self.iteration)
            self._evaluate_if_due()
        self.clock.stop()

    def _step(self, batch: Batch, step: int, steps: int) -> None:
        """Train on one batch. This is step number `step`, counted from 0, out of `steps` in this phase."""
        config, device = self.config, self.world.device
        torch.manual_seed(seed_of(config.seed, self.iteration, self.world.rank))
        set_lr(self.optimizer, lr_factor(config.schedule, step, steps, config.warmup, config.milestones))
        image_ids = batch.image_ids.tolist()
        batch = batch.to(device, channels_last=config.channels_last)
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
        losses = self.losses.pop_means()
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
        self.losses.read(self.world)  # raises an error if a loss is not finite, so that no damaged weights are saved
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
            checkpoint.save(self.checkpoint_file, state)
        self.clock.start()

    def _evaluation_is_due(self) -> bool:
        """Return whether the model must be evaluated after the current iteration."""
        done, every = self.iteration, self.config.eval_every
        return done == self.iterations or (every is not None and done > 0 and done % every == 0)

    def _evaluate_if_due(self) -> None:
        """Evaluate the model if an evaluation is due.

        A checkpoint is always saved first, so if an evaluation is interrupted, the resumed run repeats it.
        """
        if not self._evaluation_is_due():
            return
        logged = self.log is not None and any(x["iteration"] == self.iteration and "AP" in x for x in self.log.lines)
        if self.world.largest(logged):
            return
        self.clock.stop()
        config = self.config
        evaluator = evaluate(
            self._evaluated(),
            self.test_data,
            config.batch,
            config.min_size,
            config.max_size,
            self.world,
            config.workers,
            config.amp,
            config.channels_last,
            before_batch=self._stop_at_signal,
        )
        if self.log is not None:
            times = {"minutes": self.clock.training, "elapsed_minutes": self.clock.elapsed}
            self.log.write({"iteration": self.iteration, **times, **without_nan(evaluator.summarize())})
        self.model.train()
        self.clock.start()

    def _evaluated(self) -> BaseDetector:
        return self.model if self.average is None else self.average.model

    def _stop_at_signal(self) -> None:
        """Raise Interrupted in all processes if one of them received a signal. Call this only after a checkpoint."""
        if number := self.world.largest(self.signals.number):
            raise Interrupted(number, self.iteration)

    def _finish(self) -> dict[str, Any]:
        metrics = None
        if self.log is not None:
            config = self.config
            metrics = next(x for x in reversed(self.log.lines) if "AP" in x and x["iteration"] == self.iterations)
            detector = Detector(
                self._evaluated(),
                config.model,
                config.options,
                self.data.classes,
                config.min_size,
                config.max_size,
                config.data,
                config.train_annotations,
                config.test_annotations,
                self.data.pixel_range,
            )
            detector.save(self.folder / "model.pt")
            write_json(self.folder / "metrics.json", metrics)
            draw_examples(detector, self.test_data, self.folder / "predictions", EXAMPLES)
            plot_curves(self.log.lines, self.folder / "curves.png")
        return self.world.gather(metrics)[0]
