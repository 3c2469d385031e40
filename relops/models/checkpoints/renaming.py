"""Renaming of the parameters of other implementations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

# Regular expressions and their replacements, in the order in which they are applied.
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


def renamed(state_dict: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Return the state_dict with every rule applied, in turn, to every name."""
    names = {}
    for name, value in state_dict.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        names[name] = value
    return names
