"""Annotations of the region ops and of the modules on them.

torch.jit.script compiles those that have them. It reads annotations as objects, so neither this file nor theirs import
annotations from __future__.
"""

from collections.abc import Sequence
from types import UnionType
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from torch import Tensor

Boxes = Tensor | list[Tensor]  # [K,5] of (batch index, x1, y1, x2, y2), or per image [Ki,4]

if TYPE_CHECKING:
    T = TypeVar("T")
    BroadcastingList2: TypeAlias = T | Sequence[T]
else:

    class BroadcastingList2:
        """`BroadcastingList2[int]` is one int for both, or two.

        torch.jit.script recognizes the annotation by its name. That of torch.jit.annotations evaluates to None, which
        signatures would show.
        """

        def __class_getitem__(cls, item: type) -> UnionType:
            return item | Sequence[item]
