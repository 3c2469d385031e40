"""The command `python -m relops models`."""

from __future__ import annotations

import argparse

from relops import models
from relops.training.cli.arguments import add_command
from relops.training.cli.descriptions import summary


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    add_command(commands, "models", "list the detectors").set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print the name and a short description of each detector."""
    for name, factory in models.DETECTORS.items():
        print(f"{name:24}{summary(factory)}")
    return 0
