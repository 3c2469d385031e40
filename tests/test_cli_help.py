"""Tests that the command-line help agrees with the detectors, their options and the settings of a run."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest

from relops import models
from relops.__main__ import main, make_parser
from relops.models.backbones.build import BODIES
from relops.training.cli.descriptions import described_arguments, options_of
from relops.training.cli.train import MODEL_OPTIONS, SHAPES_DEFAULTS, _option
from relops.training.config import TrainConfig


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs a command and returns its output. The terminal is so wide that no text is wrapped."""
    monkeypatch.setenv("COLUMNS", "1000")

    def output(*arguments: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            main(list(arguments))
        return capsys.readouterr().out

    return output


def section(text: str, title: str) -> list[str]:
    """Return the lines of a section of the help."""
    return text.partition(f"\n{title}:\n")[2].partition("\n\n")[0].splitlines()


def defaults_of(name: str) -> dict[str, Any]:
    parameters = inspect.signature(models.DETECTORS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def summary_of(factory: Callable[..., object]) -> str:
    first, built = inspect.getdoc(factory).splitlines()[0].split(maxsplit=1)
    assert first == "Build"
    return built


def parsed_options(text: str) -> dict[str, Any]:
    """Parse assignments NAME=VALUE as `--option` does."""
    return dict(map(_option, text.split()))


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = make_parser()._actions
    return next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))


@pytest.mark.quick
def test_models_command_lists_every_detector(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = [tuple(line.split(maxsplit=1)) for line in capsys.readouterr().out.splitlines()]
    assert lines == [(name, summary_of(factory)) for name, factory in models.DETECTORS.items()]


@pytest.mark.quick
def test_train_help_lists_every_model_with_its_defaults(help_of: Callable[..., str]) -> None:
    lines = section(help_of("train", "--help"), "models, with their options and defaults")
    assert len(lines) == 2 * len(models.DETECTORS)
    for (name, factory), head, options in zip(models.DETECTORS.items(), lines[::2], lines[1::2], strict=True):
        assert head.split(maxsplit=1) == [name, summary_of(factory)]
        assert parsed_options(options) == defaults_of(name)


def test_train_help_lists_every_backbone(help_of: Callable[..., str]) -> None:
    assert section(help_of("train", "--help"), "backbones")[0].strip() == ", ".join(BODIES)


def test_train_help_lists_the_defaults_for_shapes(help_of: Callable[..., str]) -> None:
    lines = section(
        help_of("train", "--help"), "defaults for --data shapes and rotated-shapes, which replace those above"
    )
    settings = parsed_options(lines[0].partition("settings ")[2])
    options = parsed_options(lines[1].partition("options of models ")[2])
    assert settings | {"options": options} == SHAPES_DEFAULTS


@pytest.mark.parametrize("name", models.DETECTORS)
def test_train_help_describes_every_option_of_a_model(name: str, help_of: Callable[..., str]) -> None:
    text = help_of("train", "--model", name, "--help")
    assert help_of("train", "--help", f"--model={name}") == text
    entries = re.split(r"^  (?=\S)", "\n".join(section(text, f"options of {name}")), flags=re.MULTILINE)[1:]
    heads, descriptions = zip(*(entry.split(maxsplit=1) for entry in entries))
    assert parsed_options(" ".join(heads)) == defaults_of(name)
    assert all(len(description.strip()) > 5 for description in descriptions)


@pytest.mark.parametrize("arguments", [[], ["--model"], ["--model", "nothing"]])
def test_train_help_without_a_known_model_describes_no_options(
    arguments: list[str], help_of: Callable[..., str]
) -> None:
    assert "options of faster_rcnn_fpn:" not in help_of("train", "--help", *arguments)


def test_train_help_has_a_group_for_every_kind_of_setting(help_of: Callable[..., str]) -> None:
    text = help_of("train", "--help")
    for field in dataclasses.fields(TrainConfig):
        if field.name != "options":
            lines = section(text, field.metadata["group"])
            assert any(line.startswith(f"  --{field.name.replace('_', '-')}") for line in lines)
    for name in (*MODEL_OPTIONS, "option"):
        assert any(line.startswith(f"  --{name} ") for line in section(text, "model"))


@pytest.mark.parametrize("command", ["train", "eval", "predict", "propose"])
def test_every_argument_states_its_default(command: str) -> None:
    settings = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for action in commands()[command]._actions:
        if action.required and action.option_strings:
            assert action.help.endswith(" (required)")
        elif action.dest != "help":
            stated = re.fullmatch(r"\w.* \(default: (.+)\)", action.help)[1]
            default = settings.get(action.dest) if command == "train" else action.default
            if isinstance(default, bool):
                assert stated == ("yes" if default else "no")
            elif isinstance(default, tuple):
                assert stated == " ".join(map(str, default))
            elif default not in (None, "", []):
                assert stated == str(default)


def test_arguments_of_a_docstring_are_parsed() -> None:
    def factory(num_classes: int, *, first: int = 1, second: str = "x", third: float = 0.5, fourth: int = 4) -> None:
        """Build nothing.

        Args:
            num_classes: The number of classes.
            first, second: An entry for two options,
                which continues: on a second line.

                It also has a second paragraph.
            third (float): The `third` option.

        Raises:
            fourth: This is not an argument.
        """

    both = "An entry for two options, which continues: on a second line. It also has a second paragraph."
    expected = {"first": both, "second": both, "third": "The third option."}
    assert described_arguments(inspect.getdoc(factory)) == expected | {"num_classes": "The number of classes."}
    assert [tuple(option) for option in options_of(factory)] == [
        (name, default, expected.get(name, "")) for name, default in typing.cast(dict, factory.__kwdefaults__).items()
    ]
    assert described_arguments("No arguments.") == {}
