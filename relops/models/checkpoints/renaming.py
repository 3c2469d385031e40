"""Names of parameters that others gave, as ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]  # patterns and what they become, one after the other


def renamed(state_dict: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """With every rule applied, in turn, to every name."""
    names = {}
    for name, value in state_dict.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        names[name] = value
    return names
