"""Type annotations of the region ops and of their modules.

torch.jit.script compiles the functions that use these annotations and evaluates the annotations at run time. Therefore
neither this file nor the files that define those functions may import annotations from __future__.
"""

from collections.abc import Sequence
from types import UnionType
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from torch import Tensor

Boxes = Tensor | list[Tensor]  # [K,5] with rows (batch index, x1, y1, x2, y2), or one tensor [Ki,4] for each image

if TYPE_CHECKING:
    T = TypeVar("T")
    BroadcastingList2: TypeAlias = T | Sequence[T]
else:

    class BroadcastingList2:
        """An annotation for a pair of values: `BroadcastingList2[int]` is one int for both, or two ints.

        torch.jit.script recognizes this annotation by its name. torch.jit.annotations has a class of the same name, but
        its annotations evaluate to None, and signatures would then show None.
        """

        def __class_getitem__(cls, item: type) -> UnionType:
            return item | Sequence[item]
