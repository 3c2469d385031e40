"""What the commands say and leave behind where a path, a file, a package or a number is not what it must be."""

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
    lines_of,
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
    """Of a detector that makes proposals."""
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
    """Of a command: it ends with status 2 and one line, which is returned, before it computes anything."""

    def check(*arguments: str) -> str:
        for module, name in (
            (engine.Run, "_step"),
            (eval_command, "evaluate"),
            (predict_command, "detect"),
            (propose_command, "propose"),
        ):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it began to compute"))
        capsys.readouterr()
        assert main(list(arguments)) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"relops {arguments[0]}: ") and errors.count("\n") == 1, errors
        return errors

    return check


# ---- Outputs ----


@pytest.mark.parametrize("name", ["train", "eval", "predict", "propose"])
@pytest.mark.parametrize("kind", ["file or folder", "under a file", "no file system for it", "long", "null"])
def test_output_that_cannot_be_written(
    name: str, kind: str, run: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("x")
    output = {
        "file or folder": tmp_path / "file" if name in ("train", "predict") else tmp_path,
        "under a file": tmp_path / "file" / "output",
        "no file system for it": Path("/proc/output"),
        "long": tmp_path / ("x" * 300),
        "null": tmp_path / "x\0",
    }[kind]
    assert re.search(rf"{re.escape(str(output))}.*: output must be a", fails(*arguments_of(name, run, output)))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"] and (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to any folder")
@pytest.mark.parametrize("name", ["train", "eval", "predict", "propose"])
def test_output_in_a_read_only_folder(name: str, run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    tmp_path.chmod(0o500)
    for output in (tmp_path, tmp_path / "output") if name in ("train", "predict") else (tmp_path / "output",):
        assert re.search(rf"{re.escape(str(output))}.*Permission denied", fails(*arguments_of(name, run, output)))


@pytest.mark.parametrize("name", [*engine.FILES, *engine.FOLDERS])
def test_what_a_run_cannot_replace(name: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    if name in engine.FILES:
        (tmp_path / name).mkdir(parents=True)
    else:
        (tmp_path / name).write_text("x")
    assert f"{tmp_path / name}: must be a fi" in fails(*command_of(tmp_path)).replace("folder", "fi")


@pytest.mark.parametrize("name", ["last.pt", "metrics.json", "tensorboard", "predictions"])
def test_links_to_nothing(name: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / name).symlink_to(tmp_path / "nowhere" / "x")
    assert f"{tmp_path / name}: must be a fi" in fails(*command_of(tmp_path)).replace("folder", "fi")


def test_output_without_a_name(fails: Callable[..., str]) -> None:
    assert "output must name a folder" in fails("train", "--data", "shapes:10", "--model", "tiny", "--output", "")


def test_folders_of_outputs_are_made(run: Path, tmp_path: Path) -> None:
    for name in ("eval", "propose", "predict"):
        output = tmp_path / name / "a b" / "ä"
        assert main(arguments_of(name, run, output)) == 0
        assert output.exists() and not list(output.parent.glob("*.tmp"))
    assert json.loads((tmp_path / "eval" / "a b" / "ä").read_text()).keys() >= {"AP"}
    assert with_proposals(open_data("shapes:10", "test"), tmp_path / "propose" / "a b" / "ä")[0].proposals is not None


def test_output_that_is_a_link_or_a_device(run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for _ in range(2):
        assert main(arguments_of("eval", run, tmp_path / "link")) == 0
        assert (tmp_path / "link").is_symlink() and "AP" in json.loads((tmp_path / "there" / "file").read_text())
    assert main(arguments_of("eval", run, Path(os.devnull))) == 0
    assert not os.path.isfile(os.devnull)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("name", ["eval", "propose"])
def test_full_disk(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments_of(name, run, Path("/dev/full"))) == 2
    assert (
        capsys.readouterr().err == f"relops {name}: /dev/full: the file cannot be written (No space left on device)\n"
    )


def test_checkpoint_on_a_full_disk(tmp_path: Path) -> None:
    """Where the limit is reached, torch.save raises an error of its own."""
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


def test_two_writers_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is that of the last one, whole."""
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
        ("missing", "No such file|got none"),
        ("folder", "Is a directory|got none"),
        ("empty", "no checkpoint|save_proposals"),
        ("text", "no checkpoint|save_proposals"),
        ("other", "must hold|save_proposals"),
        ("list", "must hold|save_proposals"),
        ("object", "no checkpoint.*Linear|save_proposals"),
        ("long", "File name too long|got none"),
    ],
)
def test_files_to_read(kind: str, message: str, tmp_path: Path, fails: Callable[..., str]) -> None:
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


def test_name_of_two_lines(tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "no run: must be a run's folder" in fails(*arguments_of("eval", tmp_path / "no\nrun", tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "its weights must be those of the model .* Missing key"),
        ({"model": 3}, "its weights must be those of the model"),
        ({"classes": ["a"]}, "its weights must be those of the model .*size mismatch"),
        ({"options": {"width": 3}}, "options of model faster_rcnn_fpn: .*'width'"),
        ({"name": "nothing"}, "model must be one of .*, got 'nothing'"),
        ({"config": 3}, "must hold a dict, got int"),
        ({"config": {"model": "tiny"}}, ""),
    ],
)
def test_detector_that_does_not_fit(
    change: dict[str, Any], message: str, run: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    stored = checkpoint.load(run / "model.pt") | change
    if not message:
        del stored["min_size"]
        message = "must hold .*, got a file without min_size"
    checkpoint.save(tmp_path / "model.pt", stored)
    assert re.search(message, fails(*arguments_of("eval", tmp_path, tmp_path / "x")))


# ---- Damage ----


def damaged(content: bytes) -> list[bytes]:
    """Each with one bit flipped, of those that a zip file's own checksums leave out and of others; and cut short."""
    attributes = [match.start() + 38 for match in re.finditer(b"PK\x01\x02", content)]
    places = {*attributes, *range(len(content) - checkpoint.LENGTH - 100, len(content))}
    bits = {8 * place + bit for place in places for bit in range(8)}
    bits |= set(random.Random(0).sample(range(8 * len(content)), 2000))
    flipped = [content[: i // 8] + bytes([content[i // 8] ^ 1 << i % 8]) + content[i // 8 + 1 :] for i in sorted(bits)]
    return flipped + [content[:length] for length in range(0, len(content), 7)]


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
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
        with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: is (damaged|no checkpoint)"):
            checkpoint.load(file)


def test_damaged_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_config(tmp_path))
    for name, arguments in (("last.pt", command_of(tmp_path)), ("model.pt", ["eval", str(tmp_path), *SMALL])):
        content = bytearray((tmp_path / name).read_bytes())
        content[content.index(b"ZZZZ")] ^= 1  # padding, on which nothing depends
        (tmp_path / name).write_bytes(content)
        assert main(arguments) == 2
        line = f"relops {arguments[0]}: {tmp_path / name}: is damaged: its checksum does not match its content\n"
        assert capsys.readouterr().err == line


def test_checkpoints_of_earlier_versions_and_other_readers(tmp_path: Path) -> None:
    """Files without a checksum are loaded; with it, torch.load reads them, also mapped to memory."""
    content = {"x": torch.arange(1000.0)}
    torch.save(content, tmp_path / "before.pt")
    assert torch.equal(checkpoint.load(tmp_path / "before.pt")["x"], content["x"])
    checkpoint.save(tmp_path / "now.pt", content)
    for mapped in (False, True):
        assert torch.equal(torch.load(tmp_path / "now.pt", weights_only=True, mmap=mapped)["x"], content["x"])


def test_flipped_bits_of_proposals_are_found_or_harmless(tmp_path: Path) -> None:
    file, data = tmp_path / "proposals", open_data("shapes:25", "test")
    given = {index: np.arange(4 * index + 4, dtype=np.float32).reshape(-1, 4) for index in range(5)}
    save_proposals(file, given)
    found = 0
    annotations = data.annotations()
    data.annotations = lambda: annotations  # drawing them takes a while
    for wrong in damaged(file.read_bytes()):
        file.write_bytes(wrong)
        try:
            read = with_proposals(data, file)._proposals
        except ValueError as error:
            assert str(error).startswith(f"{file}: ")
            found += 1
        else:
            assert read.keys() == given.keys() and all(np.array_equal(read[i], given[i]) for i in given)
    assert found > 2000


def test_damaged_lines_of_the_log_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    begins = [f"{tmp_path / 'log.jsonl'}: line {number} is damaged and left out: " for number in range(2, 18)]
    assert [error.startswith(begin) for error, begin in zip(errors, begins, strict=True)] == [True] * 16, errors


def test_metrics_are_those_of_the_last_evaluation(tmp_path: Path) -> None:
    """Whatever else is behind it in a log that two runs wrote."""
    metrics = train(make_config(tmp_path, log_every=1))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, lines[0], lines[-2]]) + "\n")
    assert train(make_config(tmp_path, log_every=1)) == metrics
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_curves_of_a_log_that_lacks_times(tmp_path: Path) -> None:
    plot_curves([{"iteration": 1, "AP": 0.5}, {"iteration": 1, "minutes": 1, "AP": 0.5}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


# ---- Data ----


def test_data_without_classes(tmp_path: Path, fails: Callable[..., str]) -> None:
    for split in ("train", "test"):
        (tmp_path / "data" / split / "Annotations").mkdir(parents=True)
        (tmp_path / "data" / split / "Images").mkdir()
        (tmp_path / "data" / split / "Annotations" / "a.xml").write_text("<annotation/>")
        Image.new("RGB", (64, 48)).save(tmp_path / "data" / split / "Images" / "a.png")
    errors = fails("train", "--data", f"voc:{tmp_path / 'data'}", "--model", "tiny", "--output", str(tmp_path / "run"))
    assert "must have objects of at least one class, got none" in errors


def test_images_of_16_bits_have_one_range(run: Path, tmp_path: Path) -> None:
    """Even if the detector was trained on images of 8 bits."""
    images = tmp_path / "images"
    images.mkdir()
    for name, brightest in (("a", 255), ("b", 4000)):
        pixels = np.full((48, 64), 200, np.uint16)
        pixels[0, 0] = brightest
        Image.fromarray(pixels).save(images / f"{name}.png")
    with pytest.warns(UserWarning, match=r"a\.png: pixels are not bytes; .* from 0 to 4095"):
        assert main(["predict", str(run), str(images), "--output", str(tmp_path / "drawn"), "--device", "cpu"]) == 0
    drawn = [np.array(Image.open(tmp_path / "drawn" / f"{name}.png.png").convert("RGB"))[300, 300] for name in "ab"]
    assert np.array_equal(*drawn) and drawn[0].max() == 12


def test_detectors_that_make_no_proposals() -> None:
    """Whatever else they have by this name."""
    options = {"backbone": "resnet18-gn-16", "hidden": 32, "channels": 32, "queries": 5, "encoder_layers": 1}
    for name, others in (("deformable_detr", options), ("fast_rcnn", {"hidden": 8, "backbone": "resnet18-gn-16"})):
        detector = Detector(build_model(name, 2, others), name, others, ["a", "b"], 64, 64, "shapes:10")
        with pytest.raises(UsageError, match=f"model {name} makes no proposals"):
            proposing_model(detector)


# ---- Two runs in one folder ----


def test_second_run_is_told_who_has_the_folder(
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
        wait_for_lines(tmp_path / "log.jsonl", lines_of(tmp_path / "log.jsonl") + 3, first)
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
    stored = state(tmp_path)["iteration"]
    assert [line["iteration"] for line in log(tmp_path)] == list(range(1, stored + 1))


def test_killed_run_does_not_keep_the_folder(tmp_path: Path) -> None:
    killed = start("pass", *command_of(tmp_path, "--workers", "1", "--checkpoint-every", "1"))
    wait_for_lines(tmp_path / "log.jsonl", 3, killed)
    killed.kill()
    killed.wait()
    (tmp_path / "last.pt.123.tmp").write_text("of a process that was killed while it wrote")
    second = start("pass", *command_of(tmp_path))
    wait_for_lines(tmp_path / "log.jsonl", lines_of(tmp_path / "log.jsonl") + 1, second)
    assert f"process {second.pid} on " in (tmp_path / LOCK).read_text()
    second.send_signal(signal.SIGINT)
    errors = second.communicate(timeout=60)[1]
    assert second.returncode == 130, errors
    assert not list(tmp_path.glob("*.tmp"))
    killed.communicate()


def test_lock_is_not_inherited(tmp_path: Path) -> None:
    """By processes that load data, which live for seconds after one that was killed."""
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
        os.kill(child, 0)  # raises where it has ended
        with locked(tmp_path):
            assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_all_processes_of_a_second_run_stop(tmp_path: Path) -> None:
    first = start("pass", *command_of(tmp_path / "run"))
    wait_for_lines(tmp_path / "run" / "log.jsonl", 1, first)
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\nfrom test_training import *\nregister()\n"
        f"try:\n    train(make_config({str(tmp_path / 'run')!r}, threads=1, batch=2))\n"
        "except ValueError as error:\n    print(f'{os.environ[\"RANK\"]}: {error}', flush=True)\n"
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


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with pytest.warns(UserWarning, match=rf"{re.escape(str(tmp_path))}: cannot be locked.*No locks available"):
        train(make_config(tmp_path))
    assert (tmp_path / "model.pt").exists()


# ---- Pictures ----


def test_drawings_are_no_images_of_the_next_time(run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    images, link = tmp_path / "images", tmp_path / "link"
    images.mkdir()
    link.symlink_to(images)
    picture = (run / "predictions" / "0.png").read_bytes()
    (images / "a.png").write_bytes(picture)
    for output in (images, link, images / ".." / "images"):
        assert "output must not be a folder of images" in fails(
            "predict", str(run), str(images), "--output", str(output)
        )
    (images / "a.png.png").write_bytes(picture)
    files = [str(file) for file in sorted(images.iterdir())]
    for output in (images, link):
        assert "no image is overwritten" in fails("predict", str(run), *files, "--output", str(output))
    assert sorted(file.name for file in images.iterdir()) == ["a.png", "a.png.png"]


def test_drawing_that_cannot_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, and no half of it is left."""

    def half(_: Any, file: Any, *__: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pytest.importorskip("PIL.Image").Image, "save", half)
    assert main(arguments_of("predict", run, tmp_path)) == 2
    drawing = tmp_path / "shapes[test][0].png"
    assert (
        capsys.readouterr().err == f"relops predict: {drawing}: the file cannot be written (No space left on device)\n"
    )
    assert not any(tmp_path.iterdir())


def test_drawings_beside_images(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder within that of the images they aren't read; a single file's drawing may lie beside it."""
    picture = (run / "predictions" / "0.png").read_bytes()
    (tmp_path / os.fsdecode(b"a\xff.png")).write_bytes(picture)  # a name that is no text
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))  # pytest's takes anything
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
def test_packages_are_looked_for_first(
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


def test_broken_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]) -> None:
    (tmp_path / "faster_coco_eval.py").write_text("raise AttributeError('of another version')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "faster_coco_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert "faster-coco-eval (of another version)" in fails(*command_of(tmp_path / "run"))


# ---- Numbers and names ----

HUGE = "9" * 20


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--device cuda:99", "device must be one that torch sees.*, got 'cuda:99'"),
        (f"--device cuda:{HUGE}", "device must be one that torch sees"),
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
def test_numbers_of_all_commands(
    option: str, message: str, run: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    for name in ("train", "eval", "propose"):
        assert re.search(message, fails(*arguments_of(name, run, tmp_path / "output"), *option.split()))
    if option.split()[0] in ("--device", "--threads"):
        assert re.search(message, fails(*arguments_of("predict", run, tmp_path / "output"), *option.split()))
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
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
def test_numbers(arguments: str, message: str, run: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    name, *others = arguments.split()
    assert re.search(message, fails(*arguments_of(name, run, tmp_path / "output"), *others))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("epochs", "message"), [("inf", "finite, got inf"), ("1e300", "at most"), ("1e-9", "at least 1")]
)
def test_epochs(epochs: str, message: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    given = ["--data", "shapes:20", "--model", "tiny", "--output", str(tmp_path / "run"), *SMALL]
    assert re.search(rf"(epochs|iterations) must be {message}", fails("train", *given, "--epochs", epochs))


# ---- Which errors are for the user ----


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
def test_errors_of_relops(kind: type[RelopsError], builtin: type[Exception]) -> None:
    """They are caught as the built-in ones, and processes send them to each other."""
    assert issubclass(kind, RelopsError) and issubclass(kind, builtin)
    error = pickle.loads(pickle.dumps(kind("a: b")))
    assert type(error) is kind and str(error) == user_message(error) == "a: b"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("not enough values to unpack"), None),
        (KeyError("relops.nms: "), None),
        (OSError("of no file"), None),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "[Errno 13] Permission denied: '/a'"),
        (ValueError("relops.nms: iou_threshold must be"), "relops.nms: iou_threshold must be"),
    ],
    ids=repr,
)
def test_errors_of_others(error: Exception, message: str | None) -> None:
    assert user_message(error) == message


def test_error_of_a_worker() -> None:
    """Its message is the last line of a traceback, or the last lines."""

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
def test_options_that_an_op_refuses(workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """They are named in one line; the model's own mistakes keep their traceback."""

    def forward(*_: Any) -> None:
        relops.nms(torch.zeros(1, 4), torch.zeros(1), math.nan)

    monkeypatch.setattr(Tiny, "forward", forward)
    assert main([*command_of(tmp_path), "--workers", workers]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("relops train: relops.nms: iou_threshold must be ") and errors.count("\n") == 1

    monkeypatch.setattr(Tiny, "forward", lambda *_: [].index(0))
    with pytest.raises(ValueError, match="not in list"):
        main([*command_of(tmp_path), "--workers", workers])


# ---- Ends ----


def test_interrupt_ends_quietly(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(signal, "getsignal", signal.getsignal)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
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
def test_closed_pipe_ends_quietly(name: str, run: Path, tmp_path: Path) -> None:
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
