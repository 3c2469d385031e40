"""Tests of the messages and files that commands write if a path, a file, a package or a number is invalid."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import environment, run_python
from test_training import (
    HERE,
    Tiny,
    command_of,
    count_lines,
    log,
    make_config,
    start,
    state,
    tiny_detectors,  # noqa: F401
    wait_for_lines,
)

import relops
from relops.__main__ import main
from relops.training import checkpoint, engine, evaluation, prediction
from relops.training._files import LOCK, locked, written
from relops.training.cli import eval as eval_command
from relops.training.cli import predict as predict_command
from relops.training.cli import propose as propose_command
from relops.training.data import open_data, save_proposals, with_proposals
from relops.training.detector import Detector, build_model, load_detector
from relops.training.engine import train
from relops.training.errors import (
    LossError,
    MissingPackageError,
    OutputError,
    RelopsError,
    RunNotFoundError,
    UsageError,
    user_message,
)
from relops.training.plots import plot_curves
from relops.training.prediction import proposing_model

Image = pytest.importorskip("PIL.Image")
SMALL = ["--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a detector that generates proposals, and return the folder of the run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = "--data shapes:10 --min-size 64 --max-size 80 --backbone resnet18-gn --hidden 32 --channels 16 --batch 2"
    assert main(["train", *settings.split(), "--iterations", "1", "--output", str(folder), *SMALL]) == 0
    return folder


def arguments_of(name: str, run: Path, output: Path) -> list[str]:
    others = {
        "train": ["train", "--data", "shapes:10", "--model", "tiny", "--iterations", "1", *SMALL],
        "eval": ["eval", str(run), *SMALL],
        "predict": ["predict", str(run), *SMALL[:2]],
        "propose": ["propose", str(run), "--split", "test", *SMALL],
    }
    return [*others[name], "--output", str(output)]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that asserts that a command fails, and returns the command's error message.

    The command must exit with status 2 and print one line before it computes anything.
    """

    def check(*arguments: str) -> str:
        for module, name in (
            (engine.Run, "_step"),
            (eval_command, "evaluate"),
            (predict_command, "detect"),
            (propose_command, "propose"),
        ):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the command began to compute"))
        capsys.readouterr()
        assert main(list(arguments)) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"relops {arguments[0]}: ") and errors.count("\n") == 1, errors
        return errors

    return check


# ---- Outputs ----


@pytest.mark.parametrize("name", ["train", "eval", "predict", "propose"])
@pytest.mark.parametrize("kind", ["wrong kind", "inside a file", "unsuitable file system", "long", "null"])
def test_output_that_cannot_be_written_is_an_error(
    name: str, kind: str, run: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("x")
    output = {
        "wrong kind": tmp_path / "file" if name in ("train", "predict") else tmp_path,
        "inside a file": tmp_path / "file" / "output",
        "unsuitable file system": Path("/proc/output"),
        "long": tmp_path / ("x" * 300),
        "null": tmp_path / "x\0",
    }[kind]
    assert re.search(rf"{re.escape(str(output))}.*: output must be a", fails(*arguments_of(name, run, output)))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"] and (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write to any folder")
@pytest.mark.parametrize("name", ["train", "eval", "predict", "propose"])
def test_output_in_a_read_only_folder_is_an_error(
    name: str, run: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    tmp_path.chmod(0o500)
    for output in (tmp_path, tmp_path / "output") if name in ("train", "predict") else (tmp_path / "output",):
        assert re.search(rf"{re.escape(str(output))}.*Permission denied", fails(*arguments_of(name, run, output)))


@pytest.mark.parametrize("name", [*engine.FILES, *engine.FOLDERS])
def test_output_of_the_wrong_kind_is_an_error(name: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    if name in engine.FILES:
        (tmp_path / name).mkdir(parents=True)
    else:
        (tmp_path / name).write_text("x")
    assert f"{tmp_path / name}: must be a fi" in fails(*command_of(tmp_path)).replace("folder", "fi")


@pytest.mark.parametrize("name", ["last.pt", "metrics.json", "tensorboard", "predictions"])
def test_broken_link_in_the_output_folder_is_an_error(name: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / name).symlink_to(tmp_path / "nowhere" / "x")
    assert f"{tmp_path / name}: must be a fi" in fails(*command_of(tmp_path)).replace("folder", "fi")


def test_empty_output_is_an_error(fails: Callable[..., str]) -> None:
    assert "output must name a folder" in fails("train", "--data", "shapes:10", "--model", "tiny", "--output", "")


def test_missing_output_folders_are_created(run: Path, tmp_path: Path) -> None:
    for name in ("eval", "propose", "predict"):
        output = tmp_path / name / "a b" / "ä"
        assert main(arguments_of(name, run, output)) == 0
        assert output.exists() and not list(output.parent.glob("*.tmp"))
    assert json.loads((tmp_path / "eval" / "a b" / "ä").read_text()).keys() >= {"AP"}
    assert with_proposals(open_data("shapes:10", "test"), tmp_path / "propose" / "a b" / "ä")[0].proposals is not None


def test_output_may_be_a_link_or_a_device(run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target" / "file")
    for _ in range(2):
        assert main(arguments_of("eval", run, tmp_path / "link")) == 0
        assert (tmp_path / "link").is_symlink() and "AP" in json.loads((tmp_path / "target" / "file").read_text())
    assert main(arguments_of("eval", run, Path(os.devnull))) == 0
    assert not os.path.isfile(os.devnull)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full does not exist")
@pytest.mark.parametrize("name", ["eval", "propose"])
def test_full_disk_is_an_error(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments_of(name, run, Path("/dev/full"))) == 2
    assert (
        capsys.readouterr().err == f"relops {name}: /dev/full: the file cannot be written (No space left on device)\n"
    )


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """The error must name the file, although torch.save raises only a RuntimeError at the file size limit."""
    done = run_python(
        f"""
import resource, torch
from pathlib import Path
from relops.training import checkpoint
file = Path({str(tmp_path)!r}) / "last.pt"
checkpoint.save(file, {{"x": 1}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(file, {{"x": torch.zeros(1_000_000)}})
except OSError as error:
    print(error)
"""
    )
    assert done.stdout == f"{tmp_path / 'last.pt'}: the file cannot be written (File too large)\n", done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "last.pt"] and checkpoint.load(tmp_path / "last.pt") == {"x": 1}


def test_last_of_two_writers_replaces_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file contains everything that the last writer to finish wrote, and nothing else."""
    file = tmp_path / "file"
    with written(file) as first:
        first.write(b"first")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with written(file) as second:
            second.write(b"2")
        assert file.read_bytes() == b"2"
    assert file.read_bytes() == b"first" and list(tmp_path.iterdir()) == [file]


# ---- Inputs ----


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "No such file|no such file"),
        ("folder", "Is a directory|no such file"),
        ("empty", "not a checkpoint|save_proposals"),
        ("text", "not a checkpoint|save_proposals"),
        ("other", "must contain|must be tensors|save_proposals"),
        ("list", "must contain|save_proposals"),
        ("object", "not a checkpoint.*Linear|save_proposals"),
        ("long", "File name too long|no such file"),
    ],
)
def test_unsuitable_input_file_is_an_error(kind: str, message: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    file = tmp_path / ("x" * 300 if kind == "long" else "file")
    if kind == "folder":
        file.mkdir()
    elif kind in ("empty", "text"):
        file.write_text("" if kind == "empty" else "text\n")
    elif kind not in ("missing", "long"):
        content = {
            "other": {"conv1.weight": 1, "model": {}, "classes": []},
            "list": [1],
            "object": torch.nn.Linear(1, 1),
        }
        torch.save(content[kind], file)
    small = ["--data", "shapes:10", "--batch", "2", "--output", str(tmp_path / "run"), *SMALL]
    commands = [
        ["train", *small, "--backbone-weights", str(file)],
        ["train", *small, "--model", "fast_rcnn", "--proposals", str(file), "--test-proposals", str(file)],
        *(arguments_of(name, file, tmp_path / "output") for name in ("eval", "predict", "propose")),
    ]
    for arguments in commands:
        errors = fails(*arguments)
        assert str(file) in errors and re.search(message, errors), errors
    assert not (tmp_path / "run").exists() and not (tmp_path / "output").exists()


def test_newline_in_a_file_name_is_printed_as_a_space(tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "no run: must be the folder of a run" in fails(*arguments_of("eval", tmp_path / "no\nrun", tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "the weights in the file must fit the model .* Missing key"),
        ({"model": 3}, "the weights in the file must fit the model"),
        ({"classes": ["a"]}, "the weights in the file must fit the model .*size mismatch"),
        ({"options": {"width": 3}}, "options of model faster_rcnn_fpn: .*'width'"),
        ({"name": "nothing"}, "model must be one of .*, got 'nothing'"),
        ({"config": 3}, "must contain a dict, got int"),
        ({"config": {"model": "tiny"}}, ""),
    ],
)
def test_inconsistent_detector_file_is_an_error(
    change: dict[str, Any], message: str, run: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    stored = checkpoint.load(run / "model.pt") | change
    if not message:
        del stored["min_size"]
        message = "must contain .*, got a file without min_size"
    checkpoint.save(tmp_path / "model.pt", stored)
    assert re.search(message, fails(*arguments_of("eval", tmp_path, tmp_path / "x")))


# ---- Damage ----


def damaged(content: bytes) -> list[bytes]:
    """Return truncated copies of `content`, and copies with one flipped bit each.

    There is a copy for every bit that the checksums of a zip file do not cover, and for a random sample of other bits.
    """
    attributes = [match.start() + 38 for match in re.finditer(b"PK\x01\x02", content)]
    offsets = {*attributes, *range(len(content) - checkpoint.LENGTH - 100, len(content))}
    bits = {8 * offset + bit for offset in offsets for bit in range(8)}
    bits |= set(random.Random(0).sample(range(8 * len(content)), 2000))
    flipped = [content[: i // 8] + bytes([content[i // 8] ^ 1 << i % 8]) + content[i // 8 + 1 :] for i in sorted(bits)]
    return flipped + [content[:length] for length in range(0, len(content), 7)]


def test_every_flipped_bit_of_a_checkpoint_is_detected(tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    content = {
        "model": {"a": torch.arange(40.0), "b": torch.ones(3, dtype=torch.int64)},
        "iteration": 3,
        "classes": ["a"],
    }
    checkpoint.save(file, content)
    for name, value in checkpoint.load(file)["model"].items():
        assert torch.equal(value, content["model"][name])
    for wrong in damaged(file.read_bytes()):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: the file is (damaged|not a checkpoint)"):
            checkpoint.load(file)


def test_error_names_the_damaged_file_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_config(tmp_path))
    for name, arguments in (("last.pt", command_of(tmp_path)), ("model.pt", ["eval", str(tmp_path), *SMALL])):
        content = bytearray((tmp_path / name).read_bytes())
        content[content.index(b"ZZZZ")] ^= 1  # flips a bit of the padding, which torch.load ignores
        (tmp_path / name).write_bytes(content)
        assert main(arguments) == 2
        message = f"{tmp_path / name}: the file is damaged: its checksum does not match its content"
        assert capsys.readouterr().err == f"relops {arguments[0]}: {message}\n"


def test_checksum_of_a_checkpoint_is_optional(tmp_path: Path) -> None:
    """Files of earlier versions have no checksum, and load as well.

    `torch.load` reads files with a checksum, even if it maps them into memory.
    """
    content = {"x": torch.arange(1000.0)}
    torch.save(content, tmp_path / "before.pt")
    assert torch.equal(checkpoint.load(tmp_path / "before.pt")["x"], content["x"])
    checkpoint.save(tmp_path / "now.pt", content)
    for mapped in (False, True):
        assert torch.equal(torch.load(tmp_path / "now.pt", weights_only=True, mmap=mapped)["x"], content["x"])


def test_flipped_bits_of_proposals_are_detected_or_harmless(tmp_path: Path) -> None:
    file, data = tmp_path / "proposals", open_data("shapes:25", "test")
    given = {index: np.arange(4 * index + 4, dtype=np.float32).reshape(-1, 4) for index in range(5)}
    save_proposals(file, given)
    errors = 0
    annotations = data.annotations()
    data.annotations = lambda: annotations  # so that the images are not drawn again in each iteration
    for wrong in damaged(file.read_bytes()):
        file.write_bytes(wrong)
        try:
            read = with_proposals(data, file)._proposals
        except ValueError as error:
            assert str(error).startswith(f"{file}: ")
            errors += 1
        else:
            assert read.keys() == given.keys() and all(np.array_equal(read[i], given[i]) for i in given)
    assert errors > 2000


def test_damaged_lines_of_the_log_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_config(tmp_path, log_every=1))
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines()
    wrong = [
        b"{",
        b"3",
        b"[]",
        b'{"AP": 1}',
        b'{"iteration": "3"}',
        b'{"iteration": true}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"iteration": -1, "AP": 0.9}',
        b'{"iteration": 1, "loss": "x"}',
        b'{"iteration": 1, "loss": 1, "losses": [1]}',
        b'{"iteration": 1, "loss": 1, "losses": null}',
        b'{"iteration": 1, "loss": 1' + b"0" * 400 + b"}",
        b'{"iteration": 1, "AP": [0.5]}',
    ]
    wrong += [b'{"iteration": ' + b"9" * 5000 + b"}", b""]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([lines[0], *wrong, *lines[1:], b'{"iteration": 6, "A']))
    capsys.readouterr()
    train(make_config(tmp_path, log_every=1))
    assert (tmp_path / "log.jsonl").read_bytes().splitlines() == lines
    errors = capsys.readouterr().err.splitlines()
    begins = [f"{tmp_path / 'log.jsonl'}: line {number} is damaged and is skipped: " for number in range(2, 18)]
    assert [error.startswith(begin) for error, begin in zip(errors, begins, strict=True)] == [True] * 16, errors


def test_metrics_are_those_of_the_last_evaluation(tmp_path: Path) -> None:
    """Check a log to which two runs wrote. The line of the last evaluation is not the last line."""
    metrics = train(make_config(tmp_path, log_every=1))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, lines[0], lines[-2]]) + "\n")
    assert train(make_config(tmp_path, log_every=1)) == metrics
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_curves_of_a_log_without_times_can_be_plotted(tmp_path: Path) -> None:
    plot_curves([{"iteration": 1, "AP": 0.5}, {"iteration": 1, "minutes": 1, "AP": 0.5}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


# ---- Data ----


def test_training_data_without_classes_is_an_error(tmp_path: Path, fails: Callable[..., str]) -> None:
    for split in ("train", "test"):
        (tmp_path / "data" / split / "Annotations").mkdir(parents=True)
        (tmp_path / "data" / split / "Images").mkdir()
        (tmp_path / "data" / split / "Annotations" / "a.xml").write_text("<annotation/>")
        Image.new("RGB", (64, 48)).save(tmp_path / "data" / split / "Images" / "a.png")
    errors = fails("train", "--data", f"voc:{tmp_path / 'data'}", "--model", "tiny", "--output", str(tmp_path / "run"))
    assert "must have objects of at least one class, got none" in errors


def test_images_of_16_bits_share_one_pixel_range(run: Path, tmp_path: Path) -> None:
    """Use a detector that was trained on 8-bit images."""
    images = tmp_path / "images"
    images.mkdir()
    for name, brightest in (("a", 255), ("b", 4000)):
        pixels = np.full((48, 64), 200, np.uint16)
        pixels[0, 0] = brightest
        Image.fromarray(pixels).save(images / f"{name}.png")
    with pytest.warns(UserWarning, match=r"a\.png: pixels have more than 8 bits, so values from 0 to 4095 are scaled"):
        assert main(["predict", str(run), str(images), "--output", str(tmp_path / "drawn"), "--device", "cpu"]) == 0
    drawn = [np.array(Image.open(tmp_path / "drawn" / f"{name}.png.png").convert("RGB"))[300, 300] for name in "ab"]
    assert np.array_equal(*drawn) and drawn[0].max() == 12


def test_detector_that_does_not_generate_proposals_is_an_error() -> None:
    """Deformable DETR uses its method `propose` only internally, and Fast R-CNN reads its proposals from a file."""
    options = {"backbone": "resnet18-gn-16", "hidden": 32, "channels": 32, "queries": 5, "encoder_layers": 1}
    for name, others in (("deformable_detr", options), ("fast_rcnn", {"hidden": 8, "backbone": "resnet18-gn-16"})):
        detector = Detector(build_model(name, 2, others), name, others, ["a", "b"], 64, 64, "shapes:10")
        with pytest.raises(UsageError, match=f"model {name} does not generate proposals"):
            proposing_model(detector)


# ---- Two runs in one folder ----


def test_error_of_a_second_run_names_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start("pass", *command_of(tmp_path, "--workers", "1"))
    try:
        wait_for_lines(tmp_path / "log.jsonl", 3, first)
        for more in ([], ["--restart"]):
            assert main([*command_of(tmp_path), "--iterations", "3", *more]) == 2
            errors = capsys.readouterr().err
            assert errors.count("\n") == 1
            assert re.match(rf"relops train: {re.escape(str(tmp_path))}: another run .*process {first.pid} on ", errors)
        wait_for_lines(tmp_path / "log.jsonl", count_lines(tmp_path / "log.jsonl") + 3, first)
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
    stored = state(tmp_path)["iteration"]
    assert [line["iteration"] for line in log(tmp_path)] == list(range(1, stored + 1))


def test_killed_run_releases_the_folder(tmp_path: Path) -> None:
    killed = start("pass", *command_of(tmp_path, "--workers", "1", "--checkpoint-every", "1"))
    wait_for_lines(tmp_path / "log.jsonl", 3, killed)
    killed.kill()
    killed.wait()
    (tmp_path / "last.pt.123.tmp").write_text("a temporary file of a process that was killed")
    second = start("pass", *command_of(tmp_path))
    wait_for_lines(tmp_path / "log.jsonl", count_lines(tmp_path / "log.jsonl") + 1, second)
    assert f"process {second.pid} on " in (tmp_path / LOCK).read_text()
    second.send_signal(signal.SIGINT)
    errors = second.communicate(timeout=60)[1]
    assert second.returncode == 130, errors
    assert not list(tmp_path.glob("*.tmp"))
    killed.communicate()


def test_child_processes_do_not_inherit_the_lock(tmp_path: Path) -> None:
    """If a run is killed, its worker processes that load data continue to run for some seconds."""
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom relops.training._files import locked\n"
        "with locked(Path(sys.argv[1])):\n    child = os.fork()\n    if child:\n        print(child, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(ValueError, match=f"process {process.pid} on "), locked(tmp_path):
            pass
        process.kill()
        process.wait()
        os.kill(child, 0)  # raises an error if the child has ended
        with locked(tmp_path):
            assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_all_processes_of_a_second_run_stop_with_the_error(tmp_path: Path) -> None:
    first = start("pass", *command_of(tmp_path / "run"))
    wait_for_lines(tmp_path / "run" / "log.jsonl", 1, first)
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\nfrom test_training import *\nregister()\n"
        f"try:\n    train(make_config({str(tmp_path / 'run')!r}, threads=1, batch=2))\n"
        # Each process prints with a single write, so that the lines of the two processes cannot be mixed.
        "except ValueError as error:\n    print(f'{os.environ[\"RANK\"]}: {error}\\n', end='', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=100,
    )
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert re.search(rf"^{rank}: {tmp_path / 'run'}: another run .*process {first.pid} on ", done.stdout, re.M)


def test_file_system_without_locks_causes_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_lock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", failing_lock)
    folder = re.escape(str(tmp_path))
    with pytest.warns(UserWarning, match=rf"{folder}: the folder cannot be locked.*No locks available"):
        train(make_config(tmp_path))
    assert (tmp_path / "model.pt").exists()


# ---- Drawings ----


def test_drawings_among_the_input_images_are_an_error(run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    images, link = tmp_path / "images", tmp_path / "link"
    images.mkdir()
    link.symlink_to(images)
    picture = (run / "predictions" / "0.png").read_bytes()
    (images / "a.png").write_bytes(picture)
    for output in (images, link, images / ".." / "images"):
        assert "output must not be a folder of input images" in fails(
            "predict", str(run), str(images), "--output", str(output)
        )
    (images / "a.png.png").write_bytes(picture)
    files = [str(file) for file in sorted(images.iterdir())]
    for output in (images, link):
        assert "no input image is overwritten" in fails("predict", str(run), *files, "--output", str(output))
    assert sorted(file.name for file in images.iterdir()) == ["a.png", "a.png.png"]


def test_drawing_that_cannot_be_written_is_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the file of the drawing, and the incomplete file is removed."""

    def failing_save(_: Any, file: Any, *__: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pytest.importorskip("PIL.Image").Image, "save", failing_save)
    assert main(arguments_of("predict", run, tmp_path)) == 2
    drawing = tmp_path / "shapes[test][0].png"
    assert (
        capsys.readouterr().err == f"relops predict: {drawing}: the file cannot be written (No space left on device)\n"
    )
    assert not any(tmp_path.iterdir())


def test_drawings_may_be_next_to_images(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawings in a subfolder of the image folder are not read as images.

    The drawing of a single image may be next to the image.
    """
    picture = (run / "predictions" / "0.png").read_bytes()
    (tmp_path / os.fsdecode(b"a\xff.png")).write_bytes(picture)  # the name is not valid UTF-8
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))  # stricter than pytest's stdout
    for _ in range(2):
        assert main(["predict", str(run), str(tmp_path), "--output", str(tmp_path / "drawn"), "--device", "cpu"]) == 0
        assert len(os.listdir(tmp_path / "drawn")) == 2
        assert len(json.loads((tmp_path / "drawn" / "detections.json").read_text())) == 1
    (tmp_path / "b.png").write_bytes(picture)
    for _ in range(2):
        assert main(["predict", str(run), str(tmp_path / "b.png"), "--output", str(tmp_path), "--device", "cpu"]) == 0
    assert (tmp_path / "b.png").read_bytes() == picture and (tmp_path / "b.png.png").exists()


# ---- Packages ----


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("train", ["pillow", "faster-coco-eval", "matplotlib"]),
        ("eval", ["pillow", "faster-coco-eval"]),
        ("predict", ["pillow"]),
        ("propose", ["pillow"]),
    ],
)
def test_missing_packages_are_reported_first(
    name: str, needed: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    modules = {"pillow": "PIL.Image", "faster-coco-eval": "faster_coco_eval", "matplotlib": "matplotlib.figure"}
    for missing in (needed, needed[-1:]):
        with monkeypatch.context() as patch:
            for package in missing:
                patch.setitem(sys.modules, modules[package], None)
            errors = fails(*arguments_of(name, run, tmp_path / "output"))
        assert "pip install 'relops[train]'" in errors
        assert [package for package in modules if f"{package} (" in errors] == missing
    assert not (tmp_path / "output").exists()


def test_error_names_a_broken_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    (tmp_path / "faster_coco_eval.py").write_text("raise AttributeError('incompatible version')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "faster_coco_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert "faster-coco-eval (incompatible version)" in fails(*command_of(tmp_path / "run"))


# ---- Numbers and names ----

HUGE = "9" * 20


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--device cuda:99", "device must be visible to torch.*, got 'cuda:99'"),
        (f"--device cuda:{HUGE}", "device must be visible to torch"),
        ("--device gpu", "device must be cpu, cuda or cuda:N, got 'gpu'"),
        ("--device meta", "device must be cpu, cuda or cuda:N, got 'meta'"),
        ("--threads 0", "threads must be at least 1, got 0"),
        (f"--threads {HUGE}", f"threads must be at most 4096, got {HUGE}"),
        ("--batch 0", "batch must be at least 1, got 0"),
        (f"--batch {HUGE}", f"batch must be at most 2147483647, got {HUGE}"),
        ("--workers -1", "workers must be at least 0, got -1"),
        (f"--workers {HUGE}", "workers must be at most 4096"),
    ],
)
def test_invalid_arguments_of_all_commands_are_errors(
    option: str, message: str, run: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    for name in ("train", "eval", "propose"):
        assert re.search(message, fails(*arguments_of(name, run, tmp_path / "output"), *option.split()))
    if option.split()[0] in ("--device", "--threads"):
        assert re.search(message, fails(*arguments_of("predict", run, tmp_path / "output"), *option.split()))
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_missing_gpu_is_an_error(run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    for name in ("train", "eval", "predict", "propose"):
        assert "got 'cuda'" in fails(*arguments_of(name, run, tmp_path), "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("predict --threshold nan", "threshold must be at least 0, got nan"),
        ("predict --threshold 2", "threshold must be at most 1, got 2.0"),
        ("propose --count 0", "count must be at least 1, got 0"),
        (f"propose --count {HUGE}", "count must be at most"),
        (f"train --iterations {HUGE}", "iterations must be at most"),
        (f"train --warmup {HUGE}", "warmup must be at most"),
        (f"train --seed {HUGE}", "seed must be at most"),
        ("train --milestones 0.5 1.5", r"milestones must be in \[0,1\], got \(0.5, 1.5\)"),
        ("train --milestones nan", r"milestones must be in \[0,1\], got \(nan,\)"),
        ("train --lr inf", "lr must be finite, got inf"),
        ("train --weight-decay nan", "weight_decay must be at least 0, got nan"),
        ("train --channels 0", "channels must be at least 1, got 0"),
        ("train --model faster_rcnn_fpn --backbone vgg16", "backbone must have four stages"),
        ("train --model faster_rcnn_fpn --backbone resnet18-gn-0", "options of model faster_rcnn_fpn: "),
        ("train --model faster_rcnn_fpn --option sizes=(8,)", "sizes must have 5 entries, one per level"),
        ("train --model faster_rcnn_fpn --option num_samples=many", "num_samples must be int, got 'many'"),
        ("train --model faster_rcnn_fpn --option num_samples={[]:1}", "num_samples must be int"),
        (
            "train --model relation_networks --option proposal_nms=high",
            r"proposal_nms must be float \| None, got 'high'",
        ),
    ],
)
def test_invalid_arguments_are_errors(
    arguments: str, message: str, run: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    name, *others = arguments.split()
    assert re.search(message, fails(*arguments_of(name, run, tmp_path / "output"), *others))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("epochs", "message"), [("inf", "finite, got inf"), ("1e300", "at most"), ("1e-9", "at least 1")]
)
def test_invalid_epochs_are_errors(epochs: str, message: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    given = ["--data", "shapes:20", "--model", "tiny", "--output", str(tmp_path / "run"), *SMALL]
    assert re.search(rf"(epochs|iterations) must be {message}", fails("train", *given, "--epochs", epochs))


# ---- Errors that a user can fix ----


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (UsageError, ValueError),
        (OutputError, OSError),
        (RunNotFoundError, FileNotFoundError),
        (MissingPackageError, ImportError),
        (LossError, FloatingPointError),
    ],
)
def test_errors_of_relops_are_builtin_errors(kind: type[RelopsError], builtin: type[Exception]) -> None:
    """Errors can also be pickled, which is needed to send them from one process to another."""
    assert issubclass(kind, RelopsError) and issubclass(kind, builtin)
    error = pickle.loads(pickle.dumps(kind("a: b")))
    assert type(error) is kind and str(error) == user_message(error) == "a: b"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("not enough values to unpack"), None),
        (KeyError("relops.nms: "), None),
        (OSError("an error without a file"), None),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "[Errno 13] Permission denied: '/a'"),
        (ValueError("relops.nms: iou_threshold must be"), "relops.nms: iou_threshold must be"),
    ],
    ids=repr,
)
def test_only_errors_that_a_user_can_fix_have_a_message(error: Exception, message: str | None) -> None:
    assert user_message(error) == message


def test_message_of_an_error_of_a_worker() -> None:
    """The DataLoader prepends the traceback of the worker to the message."""

    class Broken(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> None:
            try:
                raise KeyError("cause")
            except KeyError as error:
                raise UsageError("a\nb: ValueError: c") from error

    with pytest.raises(UsageError, match="Original Traceback") as raised:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert user_message(raised.value) == "a\nb: ValueError: c"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_errors_of_ops_are_printed_in_one_line(
    workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Any other error of a model keeps its traceback."""

    def forward(*_: Any) -> None:
        relops.nms(torch.zeros(1, 4), torch.zeros(1), math.nan)

    monkeypatch.setattr(Tiny, "forward", forward)
    assert main([*command_of(tmp_path), "--workers", workers]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("relops train: relops.nms: iou_threshold must be ") and errors.count("\n") == 1

    monkeypatch.setattr(Tiny, "forward", lambda *_: [].index(0))
    with pytest.raises(ValueError, match="not in list"):
        main([*command_of(tmp_path), "--workers", workers])


# ---- Interrupts and closed pipes ----


def test_interrupt_ends_a_command_without_a_traceback(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(signal, "getsignal", signal.getsignal)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # SIGINT may be ignored in the background
    model = load_detector(run, torch.device("cpu")).model
    monkeypatch.setattr(type(model), "propose", interrupted)
    for module in (evaluation, prediction):
        monkeypatch.setattr(module, "predict", interrupted)
    try:
        for name in ("eval", "predict", "propose"):
            assert main(arguments_of(name, run, tmp_path / name)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "eval").exists() and not (tmp_path / "propose").exists()


@pytest.mark.parametrize("name", ["info", "eval", "train"])
def test_closed_pipe_ends_a_command_without_a_traceback(name: str, run: Path, tmp_path: Path) -> None:
    arguments = {"info": ["info"], "eval": ["eval", str(run), "--output", str(tmp_path / "x"), *SMALL]}
    read, write = os.pipe()
    os.close(read)
    program = f"from test_training import *; register(); sys.exit(main({arguments.get(name, command_of(tmp_path))!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=HERE,
        env=environment(),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
    )
    os.close(write)
    assert done.returncode == 128 + signal.SIGPIPE and "Traceback" not in done.stderr, done.stderr
    assert name != "eval" or "AP" in json.loads((tmp_path / "x").read_text())
