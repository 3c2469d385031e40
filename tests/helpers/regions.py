"""A common interface to the six region ops, and random boxes, for the tests that compare values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from cases import grad_like
from cases.regions import LEVELS, Regions
from conftest import assert_matches
from torch import Tensor

import relops
from relops import reference


@dataclass(frozen=True)
class Region:
    name: str
    box_gradient: bool = True
    position_sensitive: bool = False
    whole_pixels: bool = False  # bins are rounded to pixels
    options: tuple[dict[str, Any], ...] = ({},)  # the options to test

    @property
    def levels(self) -> int:
        return LEVELS if self.name == "multi_scale_roi_align" else 1

    def __call__(
        self, features: Sequence[Tensor], boxes: Tensor | Sequence[Tensor], case: Regions, module: ModuleType = relops
    ) -> Tensor:
        function = getattr(module, self.name)
        return function(features[0] if self.levels == 1 else features, boxes, **case.options(self.name))

    def features(self, case: Regions) -> list[Tensor]:
        channels = case.bin_channels if self.position_sensitive else case.C
        return [case.map(None, channels, level) for level in range(self.levels)]

    def run(
        self,
        features: Sequence[Tensor],
        boxes: Tensor,
        case: Regions,
        module: ModuleType = relops,
        grad_output: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the output, the gradients of the levels, and the gradient of the boxes if the op has one."""
        features = [x.detach().requires_grad_() for x in features]
        boxes = boxes.detach().requires_grad_(self.box_gradient)
        output = self(features, boxes, case, module)
        output.backward(grad_like(output) if grad_output is None else grad_output)
        results = {"output": output.detach()} | {f"input {level}": x.grad for level, x in enumerate(features)}
        # A level from which no box is pooled is not part of the twin's graph and has no gradient.
        results = {name: x for name, x in results.items() if x is not None}
        return results | ({"boxes": boxes.grad} if self.box_gradient else {})

    def run_twin(
        self, features: Sequence[Tensor], boxes: Tensor, case: Regions, grad_output: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the twin in float64, or in the dtype of the boxes if bins are rounded to pixels.

        A coordinate may be rounded to different pixels in different dtypes.
        """
        dtype = boxes.dtype if self.whole_pixels else torch.float64
        grad = None if grad_output is None else grad_output.to(dtype)
        results = self.run([x.to(dtype) for x in features], boxes.to(dtype), case, reference, grad)
        return {name: x.double() for name, x in results.items()}

    def assert_matches_twin(self, features: Sequence[Tensor], boxes: Tensor, case: Regions) -> None:
        actual = self.run(features, boxes, case)
        for name, expected in self.run_twin(features, boxes, case).items():
            assert_matches(actual[name], expected, f"{self.name} {name}")


SAMPLING = tuple({"sampling_ratio": ratio} for ratio in (2, -1, 3))
REGION_OPS = {
    region.name: region
    for region in (
        Region("roi_align", options=tuple(s | {"aligned": aligned} for s in SAMPLING for aligned in (False, True))),
        Region("roi_pool", box_gradient=False, whole_pixels=True),
        Region("ps_roi_align", position_sensitive=True, options=SAMPLING),
        Region("ps_roi_pool", box_gradient=False, position_sensitive=True, whole_pixels=True),
        Region("prroi_pool"),
        Region("multi_scale_roi_align", options=(*SAMPLING, {"aligned": True})),
    )
}


def box_dtype(features: torch.dtype) -> torch.dtype:
    return torch.promote_types(features, torch.float32)


def as_rows(*boxes: Sequence[float], image: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """Return boxes (x1, y1, x2, y2) of one image as a tensor [K,5]."""
    return torch.tensor([[image, *box] for box in boxes], dtype=dtype, device=device)


def random_boxes(case: Regions, inside: bool = False) -> Tensor:  # [K,5] float64
    """Return random boxes, which are inside the map or cross its border.

    Unless `inside` is true, one box in nine is tiny, one in nine is inverted and one in nine has no area. All
    coordinates are exact in float32, so that the ops get the same boxes in float32 and float64.
    """
    size = torch.tensor([case.W, case.H], dtype=torch.float64) / case.spatial_scale
    low, span = (0.1, 0.8) if inside else (-0.3, 1.6)
    corners = (low + span * torch.rand(case.K, 2, 2, dtype=torch.float64)).sort(1).values * size
    if not inside:
        corners[6::9, 1] = corners[6::9, 0] + torch.rand(2, dtype=torch.float64)
        corners[7::9] = corners[7::9].flip(1)
        corners[8::9, 1] = corners[8::9, 0]
    images = torch.randint(max(case.N, 1), (case.K, 1), dtype=torch.float64)
    return torch.cat([images, corners.flatten(1)], 1).float().double()


def assert_inverted_boxes_match_the_twin(sampling_ratio: int, device: str) -> None:
    generator = torch.Generator().manual_seed(sampling_ratio)
    x = torch.randn(1, 2, 20, 30, generator=generator, dtype=torch.float64).to(device)
    center, extent = torch.tensor([15.0, 10.0]), 10 ** (1 + 3 * torch.rand(40, 2, 2, generator=generator))
    corners = (center + torch.tensor([1, -1])[:, None] * extent).flatten(1)
    boxes = torch.cat([torch.zeros(40, 1), corners], 1).to(device, torch.float64)
    results = []
    for module in (relops, reference):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, boxes)]
        output = module.roi_align(*leaves, (2, 3), 1.0, sampling_ratio, True)
        output.backward(grad_like(output))
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
