"""Translation of the parameter names of other implementations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

# Pairs of a regular expression and its replacement, in the order in which they are applied.
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


def rename_parameters(state_dict: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Apply every rule, in order, to every name in the state_dict."""
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed
