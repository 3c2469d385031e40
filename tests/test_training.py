"""Tests of the training loop with a detector that trains in milliseconds, and of the commands with a real detector."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import environment, run_python
from torch import Tensor, nn

from relops import models
from relops.__main__ import main
from relops.models import Detections, Targets
from relops.models.backbones.deformable import DeformConv2dPack
from relops.nn import ModulatedDeformConv2d
from relops.training import checkpoint, engine
from relops.training.cli.train import SHAPES_DEFAULTS, add_parser, train_config
from relops.training.config import TrainConfig
from relops.training.data import open_data, shapes, with_proposals
from relops.training.data.images import read_image
from relops.training.detector import load_detector
from relops.training.engine import train
from relops.training.log import Log
from relops.training.optimization import WeightAverage, lr_factor, make_optimizer
from relops.training.signals import Interrupted, Signals

HERE = Path(__file__).parent


class Tiny(nn.Module):
    """A small detector that predicts which classes an image contains, and the mean of its boxes, from pooled features.

    Args:
        num_classes: the number of classes.
        dropout: the dropout probability.
        poisoned: the number of the training step whose loss is NaN, counted from 1; 0 means no step.
    """

    phases: tuple[tuple[str, float], ...] = (("", 1.0),)

    uses_proposals = uses_masks = False
    slower = ()

    def __init__(self, num_classes: int, *, dropout: float = 0.0, poisoned: int = 0) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 5, 8)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, num_classes + 4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.dropout, self.poisoned = dropout, poisoned

    def start_phase(self, phase: int) -> None:
        pass

    def forward(self, images: Tensor, sizes: Tensor, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        x = F.relu(self.norm(self.body(images))).mean((2, 3))
        boxes, logits = (
            self.head(F.dropout(x, self.dropout, self.training)).float().split([4, self.head.out_features - 4], 1)
        )
        if not self.training:
            labels = torch.arange(logits.shape[1]).expand(len(logits), -1)
            corners = torch.cat(boxes.view(-1, 2, 2).sort(1).values.unbind(1), -1) * 64
            return Detections(corners[:, None].expand(-1, logits.shape[1], -1), logits.sigmoid(), labels)
        self.steps += 1
        real = (targets.labels >= 0)[..., None]
        present = (F.one_hot(targets.labels.clamp(min=0), logits.shape[1]) * real).amax(1).float()
        mean = (targets.boxes * real).sum(1) / real.sum(1).clamp(min=1) / 64
        entropy = F.binary_cross_entropy_with_logits(logits, present)
        if self.steps == self.poisoned:
            entropy = entropy * math.nan
        return {"classes": entropy, "boxes": (boxes - mean).square().mean()}


class TwoPhases(Tiny):
    """A detector whose second phase begins with a changed head and trains only the head."""

    phases = (("all", 0.5), ("head", 0.5))

    @torch.no_grad()
    def start_phase(self, phase: int) -> None:
        if phase == 1:
            self.head.weight.mul_(-0.5)
            self.body.requires_grad_(False)
            self.norm.requires_grad_(False)


def register() -> None:
    models.DETECTORS.update(tiny=Tiny, two_phases=TwoPhases)


@pytest.fixture(autouse=True)
def tiny_detectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DETECTORS", dict(models.DETECTORS))
    register()


def make_config(output: Path, **settings: Any) -> TrainConfig:
    defaults = {
        "data": "shapes:20",
        "output": str(output),
        "model": "tiny",
        "iterations": 6,
        "batch": 4,
        "workers": 0,
        "optimizer": "adamw",
        "lr": 0.01,
        "warmup": 2,
        "min_size": 48,
        "max_size": 64,
        "log_every": 4,
        "device": "cpu",
    }
    return TrainConfig(**defaults | settings)


class Crash(Exception):
    pass


def crash_at(iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next run raise Crash at the given iteration, but only once."""
    step = engine.Run._step

    def step_or_crash(run: engine.Run, *arguments: Any) -> None:
        if run.iteration + 1 == iteration:
            monkeypatch.setattr(engine.Run, "_step", step)
            raise Crash
        step(run, *arguments)

    monkeypatch.setattr(engine.Run, "_step", step_or_crash)


def state(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "last.pt", *engine.STATE)


def log(folder: Path, times: bool = True) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    excluded = () if times else ("minutes", "elapsed_minutes", "images_per_second")
    return [{name: value for name, value in line.items() if name not in excluded} for line in lines]


def assert_same_run(actual: Path, expected: Path) -> None:
    """Assert that the files of two runs are bitwise identical except for times."""
    a, b = state(actual), state(expected)
    for name in ("model", "optimizer", "average", "phase", "iteration", "losses"):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
    assert log(actual, times=False) == log(expected, times=False)
    torch.testing.assert_close(
        checkpoint.load(actual / "model.pt")["model"], checkpoint.load(expected / "model.pt")["model"], rtol=0, atol=0
    )


# ---- A single run ----


@pytest.mark.quick
def test_training_reduces_the_loss_and_writes_all_files(tmp_path: Path) -> None:
    metrics = train(make_config(tmp_path, iterations=60, log_every=5, eval_every=40))
    lines = log(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert [line["iteration"] for line in lines if "loss" in line] == list(range(5, 61, 5))
    assert [line["iteration"] for line in lines if "AP" in line] == [40, 60]
    for line in lines:
        assert 0 < line["minutes"] <= line["elapsed_minutes"]
        if "loss" in line:
            assert line["loss"] == pytest.approx(sum(line["losses"].values())) and line["images_per_second"] > 0
    assert metrics == json.loads((tmp_path / "metrics.json").read_text()) == lines[-1]
    assert sorted(x.name for x in (tmp_path / "predictions").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    assert (tmp_path / "curves.png").stat().st_size > 1000

    detector = load_detector(tmp_path, torch.device("cpu"))
    assert detector.classes == open_data("shapes:20", "test").classes and not detector.model.training
    torch.testing.assert_close(detector.model.state_dict(), state(tmp_path)["model"], rtol=0, atol=0)


def test_log_has_the_mean_losses_since_the_previous_line(tmp_path: Path) -> None:
    train(make_config(tmp_path / "each", log_every=1))
    train(make_config(tmp_path / "few"))
    each = [line["losses"]["boxes"] for line in log(tmp_path / "each") if "loss" in line]
    few = [line["losses"]["boxes"] for line in log(tmp_path / "few") if "loss" in line]
    assert few == pytest.approx([np.mean(each[:4]), np.mean(each[4:])])


def test_log_lines_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    lines = [{"iteration": 3, "AP": None}, {"iteration": 4, "AP": 0.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 2, "A')
    Log(tmp_path, 3, 10).close()
    assert log(tmp_path) == lines[:1]


def test_restart_ignores_the_checkpoint(tmp_path: Path) -> None:
    train(make_config(tmp_path))
    train(make_config(tmp_path, lr=0.02), restart=True)
    train(make_config(tmp_path / "fresh", lr=0.02))
    assert_same_run(tmp_path, tmp_path / "fresh")


def test_bfloat16_and_channels_last_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = Tiny.forward

    def recording_forward(model: Tiny, images: Tensor, *others: Any) -> Any:
        seen.append(
            (model.training, torch.is_autocast_enabled("cpu"), images.is_contiguous(memory_format=torch.channels_last))
        )
        return forward(model, images, *others)

    monkeypatch.setattr(Tiny, "forward", recording_forward)
    train(make_config(tmp_path / "amp", amp=True, channels_last=True))
    assert set(seen[:-4]) == {(True, True, True), (False, True, True)}  # the last four calls are for the drawings
    monkeypatch.setattr(Tiny, "forward", forward)
    train(make_config(tmp_path / "full"))
    weights, full = (state(tmp_path / x)["model"]["head.weight"] for x in ("amp", "full"))
    assert weights.dtype == torch.float32
    assert not torch.equal(weights, full)
    torch.testing.assert_close(weights, full, rtol=0.1, atol=0.05)


# ---- Resuming ----


@pytest.mark.parametrize("settings", [{"ema": 0.5}, {"optimizer": "sgd", "workers": 1, "clip": 0.1}], ids=str)
def test_resumed_run_is_bitwise_identical(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"options": {"dropout": 0.5}, "checkpoint_every": 3, "eval_every": 3}
    train(make_config(tmp_path / "whole", **settings))
    crash_at(6, monkeypatch)
    with pytest.raises(Crash):
        train(make_config(tmp_path / "resumed", **settings))
    assert state(tmp_path / "resumed")["iteration"] == 3
    assert log(tmp_path / "resumed")[-1]["iteration"] == 4
    train(make_config(tmp_path / "resumed", **settings))
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    assert state(tmp_path / "whole")["model"]["steps"] == 6


def test_dropout_differs_between_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    forward = Tiny.forward

    def recording_forward(model: Tiny, *inputs: Any) -> Any:
        drawn.append(float(torch.rand(())))
        return forward(model, *inputs)

    monkeypatch.setattr(Tiny, "forward", recording_forward)
    train(make_config(tmp_path))
    assert len(set(drawn[:6])) == 6


# The run crashes in the first phase, directly after the last checkpoint of the first phase, or in the second phase.
@pytest.mark.parametrize("crash", [3, 4, 6])
def test_resumed_run_with_two_phases_is_bitwise_identical(
    crash: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": "two_phases", "checkpoint_every": 1, "log_every": 1, "ema": 0.5}
    crash_at(crash, monkeypatch)
    with pytest.raises(Crash):
        train(make_config(tmp_path / "resumed", **settings))
    before = state(tmp_path / "resumed")
    assert before["phase"] == (0 if crash <= 4 else 1)
    train(make_config(tmp_path / "resumed", **settings))
    train(make_config(tmp_path / "whole", **settings))
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")

    detector = load_detector(tmp_path / "whole" / "last.pt", torch.device("cpu"))
    torch.testing.assert_close(detector.model.state_dict(), state(tmp_path / "whole")["average"], rtol=0, atol=0)

    after = state(tmp_path / "whole")
    assert after["phase"] == 1
    assert len(after["optimizer"]["state"]) == 2  # the weight and the bias of the head
    assert all(x["step"] == 3 for x in after["optimizer"]["state"].values())
    changed = {name for name, value in after["model"].items() if not torch.equal(value, before["model"][name])}
    assert {"head.weight", "head.bias"} <= changed
    assert ("body.weight" in changed) == (crash == 3)  # only then is a step of the first phase left to run
    rates = [line["lr"] for line in log(tmp_path / "whole") if "loss" in line]
    assert rates[:3] == rates[3:] and rates[0] < rates[1]


def test_resuming_with_other_settings_is_an_error(tmp_path: Path) -> None:
    train(make_config(tmp_path))
    for name, value, old in (
        ("lr", 0.5, 0.01),
        ("iterations", 7, 6),
        ("options", {"dropout": 0.1}, {}),
        ("seed", 1, 0),
    ):
        with pytest.raises(ValueError, match=rf"last.pt: the run was started with {name} = {old}, got {value}"):
            train(make_config(tmp_path, **{name: value}))
    before = (tmp_path / "log.jsonl").read_text()
    train(make_config(tmp_path, workers=1, eval_every=2, log_every=1))
    assert (tmp_path / "log.jsonl").read_text() == before


def test_error_names_a_damaged_checkpoint(tmp_path: Path) -> None:
    train(make_config(tmp_path))
    whole = (tmp_path / "last.pt").read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + b"\x00" * (len(whole) - middle), b""):
        (tmp_path / "last.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.pt: the file is not a checkpoint or is damaged"):
            train(make_config(tmp_path))
    torch.save({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt: the file must contain .* without optimizer"):
        train(make_config(tmp_path))


def test_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.pt"
    checkpoint.save(file, {"x": 1})
    save = torch.save

    def failing_save(value: Any, stream: Any) -> None:
        save(value, stream)
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", failing_save)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(file, {"x": 2})
    assert checkpoint.load(file) == {"x": 1}


def test_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    settings = {"options": {"poisoned": 5}, "checkpoint_every": 4, "log_every": 10}
    with pytest.raises(FloatingPointError, match=r"'classes': nan.* in iteration 5 for images \[\d+, \d+, \d+, \d+\]"):
        train(make_config(tmp_path, **settings))
    stored = state(tmp_path)
    assert stored["iteration"] == 4 and stored["model"]["head.weight"].isfinite().all()


# ---- Signals ----


def start(program: str, *arguments: str) -> subprocess.Popen:
    """Start a process that runs the statement `program` and then `relops` with the detectors of this file."""
    program = f"import sys; from test_training import *; register(); {program}; sys.exit(main(sys.argv[1:]))"
    pipe, command = subprocess.PIPE, [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(
        command, cwd=HERE, stdout=pipe, stderr=pipe, text=True, env=environment(OMP_NUM_THREADS="1")
    )


def count_lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def wait_for_lines(file: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while count_lines(file) < count:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)


def command_of(folder: Path, *others: str) -> list[str]:
    """Return the arguments of a run that is too long to finish."""
    settings = "--data shapes:20 --model tiny --iterations 1000000 --batch 2 --min-size 32 --max-size 32 --log-every 1"
    return ["train", *settings.split(), "--output", str(folder), "--device", "cpu", *others]


def test_interrupted_run_resumes(tmp_path: Path) -> None:
    """The signal goes to all processes of the group, as Ctrl+C in a terminal does, and must not stop the worker."""
    last = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start("os.setpgid(0, 0)", *command_of(tmp_path, "--workers", "1"))
        wait_for_lines(tmp_path / "log.jsonl", last + 3, process)
        os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors
        stored = state(tmp_path)
        assert stored["iteration"] > last
        assert f"{number.name}: stopped after iteration {stored['iteration']} and saved a checkpoint" in errors
        assert [line["iteration"] for line in log(tmp_path)] == list(range(1, stored["iteration"] + 1))
        assert (f"resuming after iteration {last}" in output) == (last > 0)
        last = stored["iteration"]


def test_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exits, before = [], signal.getsignal(signal.SIGINT)  # SIGINT may be ignored if the tests run in the background
    monkeypatch.setattr(os, "_exit", exits.append)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM and not exits
        os.kill(os.getpid(), signal.SIGINT)
        assert exits == [130]
    assert signal.getsignal(signal.SIGINT) == before


def test_interrupted_evaluation_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, begun, before = Tiny.forward, [], signal.getsignal(signal.SIGTERM)

    def interrupted(model: Tiny, *inputs: Any) -> Any:
        if not model.training and not begun:
            begun.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(model, *inputs)

    monkeypatch.setattr(Tiny, "forward", interrupted)
    config = make_config(tmp_path, data="shapes:40", eval_every=3, log_every=3)
    with pytest.raises(Interrupted, match="SIGTERM: stopped after iteration 3"):
        train(config)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [line["iteration"] for line in log(tmp_path)] == [3]
    train(config)
    assert [("AP" in line, line["iteration"]) for line in log(tmp_path)] == [
        (False, 3),
        (True, 3),
        (False, 6),
        (True, 6),
    ]


# ---- Several processes ----


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    settings = {"batch": 2, "iterations": 8, "optimizer": "sgd", "lr": 0.1, "eval_every": 4, "data": "shapes:25"}
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\nfrom test_training import *\n"
        f"register()\ntrain(make_config({str(tmp_path / 'two')!r}, threads=1, **{settings!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train(make_config(tmp_path / "one", **settings | {"batch": 4}))
    two, one = state(tmp_path / "two"), state(tmp_path / "one")
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-5, atol=1e-6)
    for a, b in zip(log(tmp_path / "two", times=False), log(tmp_path / "one", times=False), strict=True):
        numbers = [{k: v for k, v in (x | x.pop("losses", {})).items() if v is not None} for x in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="the run was started with batch = 2, got 4"):
        train(make_config(tmp_path / "two", **settings | {"batch": 4}))
    with pytest.raises(ValueError, match="the run was started with processes = 2, got 1"):
        train(make_config(tmp_path / "two", **settings))


# ---- Optimization and settings ----


def test_learning_rate_schedules() -> None:
    cosine = [lr_factor("cosine", i, 10, 0, ()) for i in range(10)]
    assert cosine[0] == 1 and cosine[5] == pytest.approx(0.5) and all(np.diff(cosine) < 0)
    steps = [lr_factor("step", i, 10, 3, (0.5, 0.8)) for i in range(10)]
    assert steps == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_parameter_groups_of_the_optimizer() -> None:
    model = TwoPhases(3)
    model.norm.requires_grad_(False)
    groups = make_optimizer(model, "adamw", 0.1, 0.05, 0.9, 0.5).param_groups
    found = {(group["lr"], group["weight_decay"]): group["params"] for group in groups}
    expected = {
        (0.05, 0.05): model.body.weight,
        (0.05, 0.0): model.body.bias,
        (0.1, 0.05): model.head.weight,
        (0.1, 0.0): model.head.bias,
    }
    assert found.keys() == expected.keys() and all(
        found[key] == [p] and found[key][0] is p for key, p in expected.items()
    )
    with pytest.raises(ValueError, match="parameters that require a gradient, got none"):
        make_optimizer(model.requires_grad_(False), "sgd", 0.1, 0.0, 0.9, 1.0)


@pytest.mark.parametrize(
    ("kind", "version", "factor"), [("adamw", 1, 0.1), ("adamw", 2, 0.1), ("sgd", 1, 1), ("sgd", 2, 0.1)]
)
def test_learning_rate_of_offset_convolutions(kind: str, version: int, factor: float) -> None:
    layer = (DeformConv2dPack if version == 1 else ModulatedDeformConv2d)(2, 2, 3)
    groups = make_optimizer(layer, kind, 0.5, 0.0, 0.9, 1.0).param_groups
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    names = {name: rates[parameter] for name, parameter in layer.named_parameters()}
    slow = {"conv_offset.weight": 0.5 * factor, "conv_offset.bias": 0.5 * factor}
    assert names == {"weight": 0.5, "bias": 0.5} | slow


def test_weight_average() -> None:
    model = Tiny(2)
    average, expected = WeightAverage(model, 0.75), model.head.bias.detach().clone()
    for step in range(40):
        nn.init.uniform_(model.head.bias)
        model.steps += 1
        average.update(model, step)
        decay = min(0.75, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.head.bias.detach()
    torch.testing.assert_close(average.model.head.bias, expected)
    assert average.model.steps == 40 and not any(p.requires_grad for p in average.model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"epochs": 1.0}, "iterations and epochs must not both be given, got 6 and 1.0"),
        ({"ema": 1.0}, r"ema must be in \[0,1\), got 1.0"),
        ({"optimizer": "adam"}, "optimizer must be one of sgd, adamw, got 'adam'"),
        ({"max_size": 40}, "max_size must be at least 48, got 40"),
    ],
)
def test_invalid_settings_are_errors(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **settings)


# ---- Commands ----


def test_all_commands_work_on_one_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, small = str(tmp_path / "run"), ["--data", "shapes:10", "--device", "cpu", "--workers", "0"]
    training = [*small, "--min-size", "64", "--max-size", "80", "--backbone", "resnet18-gn", "--hidden", "32"]
    training += ["--iterations", "2", "--batch", "2", "--log-every", "1"]
    assert main(["train", *training, "--output", run, "--channels", "16", "--option", "num_samples=32"]) == 0
    options = {"backbone": "resnet18-gn", "channels": 16, "hidden": 32, "num_samples": 32}
    assert options.items() <= checkpoint.load(tmp_path / "run" / "model.pt")["options"].items()

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    capsys.readouterr()
    assert main(["eval", run, "--voc", "--output", str(tmp_path / "eval.json"), *small[2:]]) == 0
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    assert {name: value for name, value in evaluated.items() if name in metrics}.items() <= metrics.items()
    table = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(table["AP50"]) == pytest.approx(evaluated["AP50"], abs=1e-4)
    assert {"VOC mAP", "AP/ring"} <= table.keys()

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.jpg").write_bytes(b"not an image")
    (tmp_path / "run" / "predictions" / "0.png").rename(tmp_path / "images" / "whole.png")
    assert read_image(str(tmp_path / "images" / "whole.png")).shape == (4 * 128, 4 * 160, 3)
    predict = ["predict", run, str(tmp_path / "images"), "--output", str(tmp_path / "found"), "--device", "cpu"]
    assert main([*predict, "--threshold", "0.01"]) == 1
    assert "broken.jpg" in capsys.readouterr().err
    assert sorted(x.name for x in (tmp_path / "found").iterdir()) == ["detections.json", "whole.png.png"]
    found = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert list(found) == [str(tmp_path / "images" / "whole.png")]
    for detection in found[str(tmp_path / "images" / "whole.png")]:
        x1, y1, x2, y2 = detection["box"]
        assert detection["class"] in shapes.SHAPES and detection["score"] >= 0.01
        assert 0 <= x1 < x2 <= 640.1 and 0 <= y1 < y2 <= 512.1

    files = {split: str(tmp_path / f"{split}.npz") for split in ("train", "test")}
    for split, file in files.items():
        assert main(["propose", run, "--split", split, "--output", file, "--count", "20", *small[2:]]) == 0
        data = with_proposals(open_data("shapes:10", split), file)
        boxes = np.concatenate([data[i].proposals for i in range(len(data))])
        assert len(boxes) > 0 and all(len(data[i].proposals) <= 20 for i in range(len(data)))
        assert boxes.min() >= 0 and 80 < boxes[:, 2].max() <= 160.1  # the original images are 160 pixels wide
    fast = ["train", *training, "--model", "fast_rcnn", "--output", str(tmp_path / "fast")]
    assert main(fast) == 2
    assert "proposals" in capsys.readouterr().err
    assert main([*fast, "--proposals", files["train"], "--test-proposals", files["test"]]) == 0
    fast = ["eval", str(tmp_path / "fast"), *small[2:]]
    assert main([*fast, "--proposals", files["test"]]) == 0
    assert main(fast) == 2


def test_model_and_data_determine_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, `predict` draws the test images."""
    monkeypatch.chdir(tmp_path)
    common = ["--model", "tiny", "--data", "shapes:10", "--device", "cpu"]
    assert main(["train", *common, "--iterations", "1", "--batch", "2", "--workers", "0"]) == 0
    assert (tmp_path / "runs" / "tiny-shapes-10" / "model.pt").exists()
    assert main(["eval", *common, "--workers", "0"]) == 0
    assert main(["predict", *common, "--output", "drawn"]) == 0
    assert sorted(x.name for x in (tmp_path / "drawn").glob("*.png")) == ["shapes[test][0].png", "shapes[test][1].png"]


@pytest.mark.parametrize("name", [name for name in models.DETECTORS if name != "fast_rcnn"])
def test_every_loss_of_every_detector_is_positive_on_shapes(name: str, tmp_path: Path) -> None:
    """With the default settings for shapes, some anchors lie inside the images and match objects."""
    common = ["--model", name, "--data", "shapes:10", "--device", "cpu", "--workers", "0", "--output", str(tmp_path)]
    assert main(["train", *common, "--iterations", "1", "--batch", "4", "--log-every", "1"]) == 0
    losses = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["losses"]
    assert all(loss > 0 for loss in losses.values())


def test_predict_writes_masks(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    training = ["--model", "mask_rcnn", "--data", "shapes:10", "--iterations", "1", "--batch", "2", "--workers", "0"]
    training += ["--min-size", "64", "--max-size", "80", "--channels", "16", "--hidden", "32", "--device", "cpu"]
    assert main(["train", *training, "--output", run]) == 0
    assert "mask_AP" in json.loads((tmp_path / "run" / "metrics.json").read_text())
    picture, found = tmp_path / "run" / "predictions" / "0.png", tmp_path / "found"
    assert main(["predict", run, str(picture), "--output", str(found), "--threshold", "0", "--device", "cpu"]) == 0
    detections = json.loads((found / "detections.json").read_text())[str(picture)]
    assert detections and all(sum(x["segmentation"]["counts"]) == 640 * 512 for x in detections)


def write_coco(folder: Path, name: str, images: int, masks: int = 0) -> None:
    """Write 16-bit files of 12-bit images with one object each. The first `masks` objects have a mask."""
    pil = pytest.importorskip("PIL.Image")
    content: dict[str, Any] = {"images": [], "categories": [{"id": 1, "name": "cell"}], "annotations": []}
    (folder / "annotations").mkdir(exist_ok=True)
    for i in range(images):
        file = f"{name}-{i}.tif"
        pil.fromarray(np.full((48, 64), 4000 - i, np.uint16)).save(folder / file)
        content["images"].append({"id": i, "file_name": file, "width": 64, "height": 48})
        square = [[8, 8, 40, 8, 40, 40, 8, 40]] if i < masks else []
        item = {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [8, 8, 32, 32], "segmentation": square}
        content["annotations"].append(item)
    (folder / "annotations" / name).write_text(json.dumps(content))


@pytest.mark.filterwarnings("ignore:.*pixels have more than 8 bits")
def test_annotation_files_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file model.pt of a run stores the names of the annotation files and the pixel range."""
    write_coco(tmp_path, "latest.json", 4)
    write_coco(tmp_path, "default.json", 2)
    common = ["--data", f"coco:{tmp_path}", "--device", "cpu", "--workers", "0"]
    training = [*common, "--model", "tiny", "--output", str(tmp_path / "run"), "--iterations", "1", "--batch", "2"]
    training += ["--min-size", "48", "--max-size", "64"]
    assert main(["train", *training]) == 2
    assert re.search(r"'default\.json', 'latest\.json'.*--train-annotations$", capsys.readouterr().err, re.M)
    assert not (tmp_path / "run").exists()
    named = ["--train-annotations", "latest.json", "--test-annotations", "default.json"]
    assert main(["train", *training, *named]) == 0
    detector = load_detector(tmp_path / "run", torch.device("cpu"))
    assert (detector.train_annotations, detector.test_annotations) == ("latest.json", "default.json")
    assert detector.pixel_range == load_detector(tmp_path / "run" / "last.pt", torch.device("cpu")).pixel_range
    assert detector.pixel_range == (0, 4095)

    capsys.readouterr()
    run = [str(tmp_path / "run"), "--device", "cpu"]
    for more, expected in (([], "default"), (["--test-annotations", "latest.json"], "latest")):
        assert main(["predict", *run, *more, "--output", str(tmp_path / expected)]) == 0
        drawn = list((tmp_path / expected).glob("*.png"))
        assert drawn and all(file.name.startswith(expected) for file in drawn)
    assert main(["eval", *run, "--data", f"coco:{tmp_path}", "--workers", "0"]) == 2
    assert "--test-annotations" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*pixels have more than 8 bits")
@pytest.mark.parametrize(("masks", "warning"), [(2, "2 of 4 objects have no mask"), (0, "no object has a mask")])
def test_objects_without_masks_cause_a_warning(masks: int, warning: str, tmp_path: Path) -> None:
    write_coco(tmp_path, "train.json", 4, masks)
    write_coco(tmp_path, "val.json", 2, masks)
    training = ["--model", "mask_rcnn", "--data", f"coco:{tmp_path}", "--iterations", "2", "--batch", "2"]
    training += ["--min-size", "48", "--max-size", "64", "--channels", "16", "--hidden", "32", "--device", "cpu"]
    training += ["--option", "sizes=(16,32,64,128,256)", "--backbone", "resnet18-gn-16", "--log-every", "1"]
    with pytest.warns(UserWarning, match=warning):
        assert main(["train", *training, "--workers", "0", "--output", str(tmp_path / "run")]) == 0
    losses = [line["losses"] for line in log(tmp_path / "run") if "losses" in line]
    assert len(losses) == 2 and all(("masks" in x) == (masks > 0) for x in losses)
    assert masks == 0 or sum(x["masks"] for x in losses) > 0


def test_malformed_masks_are_found_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path, "train.json", 4, 4)
    write_coco(tmp_path, "val.json", 2, 2)
    file = tmp_path / "annotations" / "val.json"
    file.write_text(file.read_text().replace("40]]", "NaN]]"))
    training = ["--data", f"coco:{tmp_path}", "--device", "cpu", "--output", str(tmp_path / "run")]
    assert main(["train", "--model", "mask_rcnn", *training, "--iterations", "1"]) == 2
    assert "val.json-0.tif: a segmentation must have finite numbers as coordinates" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --model nothing", "model must be one of .*faster_rcnn_fpn.*, got 'nothing'"),
        ("train --model tiny --option width=3", "options of model tiny: .*'width'"),
        ("train --model tiny --option width", "--option must be NAME=VALUE, got 'width'"),
        ("train --model tiny --data nowhere", "data must be .*, got 'nowhere'"),
        ("train --model tiny --batch 0", "batch must be at least 1, got 0"),
        ("eval /nowhere/run", "/nowhere/run: must be the folder of a run"),
    ],
)
def test_errors_are_printed_in_one_line(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert re.match(f"relops {command.split()[0]}: {message}", errors)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("workers", ["0", "1"])
def test_error_names_a_broken_image(
    workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message is the same whether the main process or a worker reads the image."""
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    monkeypatch.setattr(shapes, "_draw", lambda *_: read_image(str(tmp_path / "broken.jpg")))
    assert main([*command_of(tmp_path / "run"), "--workers", workers]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"relops train: {tmp_path / 'broken.jpg'}: ") and errors.count("\n") == 1


def test_images_without_objects_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training runs, although AP is undefined without objects."""
    height, width = shapes.HEIGHT, shapes.WIDTH
    empty = np.zeros((height, width, 3), np.uint8), np.zeros(0, np.int64), np.zeros((0, height, width), bool)
    monkeypatch.setattr(shapes, "_draw", lambda *_: empty)
    run = tmp_path / "run"
    assert main([*command_of(run), "--iterations", "2", "--workers", "0"]) == 0
    assert f"{run}: no AP, because the test images have no objects\n" in capsys.readouterr().out
    assert json.loads((run / "metrics.json").read_text())["AP"] is None and (run / "curves.png").exists()
    assert main(["eval", str(run), "--voc", "--device", "cpu", "--workers", "0"]) == 0
    assert re.search(r"^VOC mAP +no objects$", capsys.readouterr().out, re.M)


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def bug(*_: Any) -> None:
        raise ValueError("an unexpected error")

    monkeypatch.setattr(shapes, "_draw", bug)
    with pytest.raises(ValueError, match="an unexpected error"):
        main([*command_of(tmp_path), "--workers", "0"])


def test_given_options_override_the_defaults_for_shapes() -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())

    def parse(*arguments: str) -> TrainConfig:
        return train_config(parser.parse_args(["train", *arguments]))

    config = parse("--channels", "7", "--option", "num_samples=3", "--lr", "0.5", "--milestones", "0.2", "0.4", "--amp")
    defaults = SHAPES_DEFAULTS["options"]
    known = {name: defaults[name] for name in ("backbone", "hidden", "sizes")}
    assert config.options == known | {"channels": 7, "num_samples": 3}
    assert (config.lr, config.milestones, config.amp) == (0.5, (0.2, 0.4), True)
    assert config.min_size == SHAPES_DEFAULTS["min_size"] and config.epochs == SHAPES_DEFAULTS["epochs"]
    assert config.output == os.path.join("runs", "faster_rcnn_fpn-shapes")
    assert parse("--iterations", "5").epochs is None
    assert parse("--max-size", "500").max_size == 500  # below the default of --min-size for other data sets
    rotated = parse("--data", "rotated-shapes:9", "--output", "run")
    assert dataclasses.replace(rotated, data="shapes") == parse("--output", "run")
    assert parse("--model", "tiny").options == {"dropout": defaults["dropout"]}
    assert parse("--data", "coco:/x/y", "--lr", "1") == TrainConfig(
        data="coco:/x/y", lr=1.0, output=os.path.join("runs", "faster_rcnn_fpn-coco-x-y")
    )


def test_import_of_relops_does_not_import_training() -> None:
    done = run_python(
        "import sys, relops\n"
        "heavy = {'PIL', 'matplotlib', 'tensorboard', 'faster_coco_eval'}\n"
        "print([m for m in sys.modules if m.startswith('relops.training') or m.split('.')[0] in heavy])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
