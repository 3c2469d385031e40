"""Descriptions of the detectors and their options, from the signatures and docstrings of the factory functions."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from relops import models
from relops.models.backbones.build import BODIES, NORM_SUFFIXES

COLUMN = 24  # column at which descriptions begin, as in the help of argparse


class Option(NamedTuple):
    """An option of a detector."""

    name: str
    default: Any
    description: str


def summary(factory: Callable[..., object]) -> str:
    """Return what a factory function builds, according to the first line of its docstring."""
    return (inspect.getdoc(factory) or "").partition("\n")[0].removeprefix("Build ")


def options_of(factory: Callable[..., object]) -> list[Option]:
    """Return the options of a detector: all parameters of its factory function that have a default value."""
    descriptions = described_arguments(inspect.getdoc(factory) or "")
    return [
        Option(name, parameter.default, descriptions.get(name, ""))
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.default is not parameter.empty
    ]


def described_arguments(docstring: str) -> dict[str, str]:
    """Return the descriptions of the parameters in the Args section of a docstring in Google style.

    Args:
        docstring: the docstring as `inspect.getdoc` returns it.

    Returns:
        A dict that maps the name of each parameter to its description as one line of text. If an entry has several
        names, as in "height, width: ...", each name gets the same description.
    """
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    if section is None:
        return {}
    # The first line of each entry begins with its names. The other lines of the entry are indented further.
    entries = re.split(r"^(?=\S)", textwrap.dedent(section[1]), flags=re.MULTILINE)
    descriptions = {}
    for entry in entries:
        head = re.match(r"([\w*]+(?:, *[\w*]+)*)(?: *\([^)]*\))?: *", entry)
        if head is not None:
            text = " ".join(entry[head.end() :].replace("`", "").split())
            descriptions.update({name.strip(" *"): text for name in head[1].split(",")})
    return descriptions


def as_argument(value: Any) -> str:
    """Format a value in the form that `--option NAME=VALUE` accepts."""
    return value if isinstance(value, str) else repr(value).replace(" ", "")


def models_help(model: str | None, shapes_settings: Mapping[str, Any], shapes_options: Mapping[str, Any]) -> str:
    """Return the part of `train --help` that lists all models, the defaults of their options, and all backbones.

    Args:
        model: the name of a model whose options are also described, or None.
        shapes_settings: the settings that have different defaults for drawn data sets, with these defaults.
        shapes_options: the model options that have different defaults for drawn data sets, with these defaults.
    """
    defaults = {name: {o.name: o.default for o in options_of(factory)} for name, factory in models.DETECTORS.items()}
    backbones = (
        "The name of a ResNet, vgg16 or zf may be followed by a normalization: "
        f"-{', -'.join(NORM_SUFFIXES)}. For a ResNet, -dcn (deformable convolutions in the last stage) or -dcnv2 "
        "(modulated deformable convolutions in all stages except the first) may follow. The name of a ResNet or LR-Net "
        "may end with a width, which is 64 by default. Examples are resnet50-frozen, resnet18-gn-32, "
        "resnet101-frozen-dcn, resnet18-gn-dcnv2-32 and lr_net26-32."
    )
    sections = {
        "models, with their options and defaults": [
            (name, f"{summary(factory)}\n{_assignments(defaults[name])}") for name, factory in models.DETECTORS.items()
        ],
        "backbones": [(", ".join(BODIES), backbones)],
        "defaults for --data shapes and rotated-shapes, which replace those above": [
            ("settings", _assignments(shapes_settings)),
            (
                "options of models",
                f"{_assignments(shapes_options)}\nA model ignores the options that it does not have.",
            ),
        ],
    }
    if model in models.DETECTORS:
        sections[f"options of {model}"] = [
            (_assignments({option.name: option.default}), option.description)
            for option in options_of(models.DETECTORS[model])
        ]
    return "\n\n".join(f"{title}:\n{_entries(entries)}" for title, entries in sections.items())


def _assignments(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={as_argument(value)}" for name, value in values.items())


def _entries(entries: Iterable[tuple[str, str]]) -> str:
    """Format pairs of a heading and a text in two columns, keeping the line breaks of the text."""
    width = max(40, shutil.get_terminal_size().columns - 2)
    lines = []
    for head, text in entries:
        indent = " " * COLUMN
        wrapped = [
            line
            for paragraph in text.split("\n")
            for line in textwrap.wrap(
                paragraph,
                width,
                initial_indent=indent,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        ]
        if wrapped and len(head) + 3 <= COLUMN:
            wrapped[0] = f"  {head}".ljust(COLUMN) + wrapped[0].lstrip()
        else:
            wrapped.insert(0, f"  {head}")
        lines += wrapped
    return "\n".join(lines)
