"""Tests that run the CUDA kernels on the CPU, with the emulation in cuda_emulation/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import cuda_emulation
import pytest
import torch
from cases import OPS, SELECTIONS, Op, Selection, grad_like
from cases.deform_attn import FUSED, PLAIN, DeformAttn
from cases.deform_conv import DEFORM_CONV2D as CONVOLUTION
from cases.deform_conv import Convolution
from cases.iou import OPS as BOX_PAIR_OPS
from cases.iou import BoxPairs
from cases.local_relation import LOCAL_RELATION as LOCAL
from cases.local_relation import Windows
from cases.regions import OPS as REGION_OPS
from cases.regions import Regions
from cases.relation_attention import RELATION_ATTENTION as RELATION
from cases.relation_attention import Relations
from conftest import (
    DTYPES,
    assert_matches,
    assert_matches_selection,
    assert_matches_twin,
    assert_same_selection,
    determinism,
)
from helpers.regions import assert_inverted_boxes_match_the_twin
from helpers.search_nms import search
from helpers.suppression import clustered

import relops
from relops import reference


@pytest.fixture(scope="module", autouse=True)
def cuda_kernels_on_the_cpu(assigned: dict) -> Iterator[None]:
    with cuda_emulation.instead_of_cpu_kernels():
        yield


SAMPLES = [pytest.param(op, sample, id=f"{op.name}-{name}") for op in OPS for name, sample in op.samples.items()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, sample", SAMPLES)
def test_outputs_and_gradients_match_the_reference(op: Op, sample, dtype: torch.dtype) -> None:
    """The emulation runs blocks and threads in a different order in every launch.

    Deterministic results must not change.
    """
    inputs = op.draw(sample, dtype=dtype)
    expected = op.run_twin(inputs)
    # All other ops use the same kernels whether they must be deterministic or not.
    for deterministic in (False, True) if op in (PLAIN, FUSED, CONVOLUTION) else (True,):
        with determinism(deterministic):
            actual = op.run(inputs)
            again = op.run(inputs) if deterministic and dtype == torch.float32 else actual
        for name, x in actual.items():
            assert_matches(x, expected[name], name, noise=op.noise)
            assert torch.equal(x, again[name]), name


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op, sample", [param for param in SAMPLES if param.values[0] in (PLAIN, FUSED)])
def test_16_bit_coordinates_match_the_reference(op: Op, sample, dtype: torch.dtype) -> None:
    """Test deformable attention only, because the kernels of all other ops get float32 coordinates."""
    assert_matches_twin(op, op.cast(op.draw(sample), dtype, dtype), dtype)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_empty_inputs_give_zeros(op: Op) -> None:
    for name, sample in op.empty.items():
        inputs = op.draw(sample)
        for key, actual in op.run(inputs).items():
            assert not actual.any(), (name, key)
            assert key == "output" or actual.shape == inputs[key].shape


# ---- Deformable attention ----


@pytest.mark.parametrize("needs_grad", [("value",), ("sampling_locations",), ("attention_weights",)])
def test_single_gradients_of_deformable_attention(needs_grad: tuple[str, ...]) -> None:
    inputs = PLAIN.draw(PLAIN.samples["typical"])
    expected = PLAIN.run(inputs)
    for name, actual in PLAIN.run(inputs, needs_grad=needs_grad).items():
        assert_matches(actual, expected[name].double(), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [40, 200, 260], ids=lambda D: f"D{D}")
def test_heads_may_be_wider_than_a_group_of_lanes(D: int, dtype: torch.dtype) -> None:
    case = DeformAttn(N=1, M=1, D=D, mask=True)
    for op, sample in ((PLAIN, case.plain), (FUSED, case.fused)):
        assert_matches_twin(op, op.draw(sample, dtype=dtype), dtype)


def test_patches_may_end_inside_a_level() -> None:
    """In an encoder, the queries are the pixels of the pyramid.

    A block processes a patch of 8 rows of a level, and all blocks together must process each query exactly once.
    """
    levels = ((17, 9), (8, 3), (3, 11), (1, 2))
    case = DeformAttn(levels=levels, N=2, Q=sum(h * w for h, w in levels), M=2, D=16, P=2)
    assert_matches_twin(PLAIN, PLAIN.draw(case.plain))


@pytest.mark.parametrize("starts", [None, "in order"])
def test_kernel_reads_the_levels_from_device_memory(starts: str | None) -> None:
    """If there are more levels than fit into the kernel parameters, the kernel reads their sizes from device memory."""
    case = DeformAttn(levels=((2, 3),) * 17, P=1, starts=starts)
    assert_matches_twin(PLAIN, PLAIN.draw(case.plain))


def test_levels_that_do_not_fit_give_nan() -> None:
    """The kernel checks the sizes of levels itself, because the host does not read device memory."""
    case = DeformAttn(levels=((2, 3),) * 17, P=1)
    inputs = PLAIN.draw(case.plain)
    for wrong in ([(2, 3)] * 16 + [(2, 4)], [(2, 3)] * 16 + [(-2, -3)], [(2**40, 2**40)] + [(0, 0)] * 16):
        arguments = PLAIN.raw(inputs | {"spatial_shapes": torch.tensor(wrong)})
        assert PLAIN.overload(*arguments.values()).isnan().all()


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
def test_nonfinite_samples_contribute_nothing(deterministic: bool) -> None:
    inputs = PLAIN.draw(PLAIN.samples["typical"])
    clean = inputs["sampling_locations"]
    for value in (float("nan"), float("inf"), -float("inf"), 1e30, -1e30):
        dirty = clean.clone()
        dirty[:, ::2, :, 0, 1, 1] = value
        away = clean.clone()
        away[:, ::2, :, 0, 1] = 9.0
        with determinism(deterministic):
            actual, expected = (PLAIN.run(inputs | {"sampling_locations": locations}) for locations in (dirty, away))
        for name, x in actual.items():
            if deterministic:
                assert torch.equal(x, expected[name]), (name, value)
            else:  # the order of atomic additions differs
                assert_matches(x, expected[name].double(), f"{name}, {value}")


# ---- Deformable convolution ----

# Each case exceeds a limit that the samples do not reach: the output channels of a tile, the input channels of a tile
# in the backward pass, or the pixels for which the samples of the gradient of the weight are computed at once.
LARGE_CONVOLUTIONS = {
    "outputs": Convolution(N=1, C=72, Co=144, H=5, W=14, kernel=(2, 2), padding=(0, 1)),
    "inputs": Convolution(N=1, C=272, Co=48, G=2, H=4, W=7, kernel=(1, 2), padding=(0, 0)),
    "pixels": Convolution(N=3, C=8, Co=8, H=15, W=31, kernel=(1, 1), padding=(0, 0)),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("case", LARGE_CONVOLUTIONS.values(), ids=LARGE_CONVOLUTIONS)
def test_convolutions_that_exceed_a_block_match_the_reference(
    case: Convolution, channels_last: bool, dtype: torch.dtype
) -> None:
    inputs = CONVOLUTION.draw(replace(case, channels_last=channels_last).deform_conv2d, dtype=dtype)
    expected = CONVOLUTION.run_twin(inputs)
    for deterministic in (False, True):
        with determinism(deterministic):
            for name, x in CONVOLUTION.run(inputs).items():
                assert_matches(x, expected[name], name, noise=CONVOLUTION.noise)


def test_deterministic_convolutions_may_have_many_samples() -> None:
    """The kernel sorts at most 2^18 samples of an image at once. Here, an image has more taps of output pixels."""
    case = Convolution(N=1, C=2, Co=2, H=50, W=50, kernel=(48, 48), padding=(4, 4), spread=9.0, mask=False)
    inputs = CONVOLUTION.draw(case.deform_conv2d, dtype=torch.float64)
    expected = CONVOLUTION.run_twin(inputs)
    with determinism(True):
        actual = CONVOLUTION.run(inputs, needs_grad=("input",))
    assert_matches(actual["input"], expected["input"])


# ---- Regions ----

# Each case exceeds a limit that the samples do not reach. "wide" has bins that are too large for a tile, "bins" has
# more bins and "boxes" more boxes than a block processes at once, "taps" has more taps than fit in shared memory, and
# "channels" has more channels than a block processes, in both passes.
LARGE_REGIONS = {
    "wide": Regions(N=1, C=2, H=3, W=800, K=4, spatial_scale=1.0),
    "bins": Regions(N=1, C=2, H=5, W=40, K=2, output_size=(2, 35), spatial_scale=0.5, sampling_ratio=1),
    "boxes": Regions(C=1, H=6, W=40, K=300, output_size=(1, 1), sampling_ratio=1, aligned=True),
    "taps": Regions(N=1, C=5, H=40, W=60, K=60, output_size=(3, 3), spatial_scale=1.0),
    "channels": Regions(N=1, C=200, H=5, W=10, K=3, spatial_scale=0.5, sampling_ratio=1),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("case", LARGE_REGIONS.values(), ids=LARGE_REGIONS)
@pytest.mark.parametrize("op", REGION_OPS, ids=lambda op: op.name)
def test_regions_that_exceed_a_block_match_the_reference(op: Op, case: Regions, channels_last: bool) -> None:
    case = replace(case, channels_last=channels_last)
    assert_matches_twin(op, op.draw(lambda generator: getattr(case, op.name)(generator)))


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("op", REGION_OPS, ids=lambda op: op.name)
def test_maps_whose_taps_may_exceed_shared_memory(op: Op, channels_last: bool) -> None:
    """For maps as wide as these, the taps of the largest possible region do not fit in shared memory."""
    case = Regions(N=1, C=2, K=3)
    inputs = op.draw(lambda generator: getattr(case, op.name)(generator))
    for name in op.features:
        x = torch.nn.functional.pad(inputs[name], (0, 6000))
        inputs[name] = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    assert_matches_twin(op, inputs)


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("op", REGION_OPS, ids=lambda op: op.name)
def test_invalid_regions_give_nan(op: Op, channels_last: bool) -> None:
    """If the batch index of a box is invalid, CUDA sets the output of the box to NaN and its gradients to zero.

    The CPU raises an error instead.
    """
    case = Regions(channels_last=channels_last)
    inputs = op.draw(lambda generator: getattr(case, op.name)(generator))
    boxes, outside = inputs["boxes"], torch.tensor([2.0, -1.0, float("nan"), -1.5])
    boxes[:4, 0] = outside
    boxes[4, 1:], boxes[5, 3] = float("nan"), float("inf")
    results = op.run(inputs)
    expected = op.run(inputs | {"boxes": boxes[6:]}, grad_output=grad_like(results["output"])[6:])
    assert results["output"][:4].isnan().all() and not results["output"][4:6].any()
    assert_matches(results["output"][6:], expected["output"].double())
    for name in op.differentiable:
        if name == "boxes":
            assert not results[name][:6].any()
            results[name] = results[name][6:]
        assert_matches(results[name], expected[name].double(), name)


def test_boxes_far_larger_than_the_map_give_finite_results() -> None:
    """The kernels take a bounded time, although the definition requires a huge number of samples."""
    for op in REGION_OPS:
        inputs = op.draw(op.samples["typical"])
        inputs["boxes"][:, 1:] = torch.tensor([-1e9, -1e30, 1e9, 1e30])
        inputs["boxes"][0, 1:] = torch.tensor([-3e38, -3e38, 3e38, 3e38])  # the length is infinite in float32
        inputs["boxes"][3:, 1:] *= -1
        assert all(x.isfinite().all() for x in op.run(inputs).values())


@pytest.mark.parametrize("sampling_ratio", [5, 100])
def test_inverted_boxes_far_larger_than_the_map(sampling_ratio: int) -> None:
    assert_inverted_boxes_match_the_twin(sampling_ratio, "cpu")


def test_boxes_of_prroi_pool_may_be_thinner_than_a_step_of_float32() -> None:
    """The kernels compute weights in float32, in which both ends of such a bin may be equal."""
    first = torch.tensor([0.3, 1.7, 100.3, 5.0])
    last = torch.nextafter(first, torch.tensor(200.0))
    x = torch.randn(1, 2, 8, 128, generator=torch.Generator().manual_seed(0))
    boxes = torch.stack([torch.zeros(4), first, torch.full((4,), 1.2), last, torch.full((4,), 6.1)], 1)
    results = []
    for module, dtype in ((relops, torch.float32), (reference, torch.float64)):
        features = x.to(dtype, copy=True).requires_grad_()
        output = module.prroi_pool(features, boxes.to(dtype), 7)
        output.backward(grad_like(output))
        results += [output.detach(), features.grad]
    assert_matches(results[0], results[2])
    assert_matches(results[1], results[3], "gradient")


# ---- Linear assignment ----


def assignment_problems(R: int, C: int, forbidden: float | None, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return costs with ties, num_rows and num_cols. The first problem uses all rows and columns."""
    generator = torch.Generator().manual_seed(R + C)
    cost = torch.randint(-20, 20, (3, R, C), generator=generator).to(dtype)
    if forbidden is not None:
        cost[torch.rand(cost.shape, generator=generator) < 0.6] = forbidden
    sizes = [torch.randint(1, size + 1, (3,), generator=generator) for size in (R, C)]
    sizes[0][0], sizes[1][0] = R, C
    return cost, *sizes


# (200, 6) needs more than 32 threads. (8, 2100) has more columns than 512 threads process at once, and its search state
# does not fit in shared memory.
ASSIGNMENTS = [
    (R, C, forbidden, dtype)
    for R, C in [(1, 1), (1, 7), (7, 1), (5, 6), (20, 70), (70, 20), (40, 40), (200, 6), (8, 2100)]
    for forbidden in (None, float("inf"), float("nan"))
    for dtype in DTYPES
]


@pytest.fixture(scope="module")
def assigned() -> dict[tuple[tuple, bool], tuple[torch.Tensor, ...]]:
    """Compute the results of the CPU kernel before the CUDA kernels replace it."""
    return {
        (case, maximize): relops.linear_sum_assignment(*assignment_problems(*case), maximize)
        for case in ASSIGNMENTS
        for maximize in (False, True)
    }


@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("case", ASSIGNMENTS, ids=str)
def test_assignments_equal_those_of_the_cpu_kernel(case: tuple, maximize: bool, assigned: dict) -> None:
    """The kernels of both devices take the same steps, so they find the same pairs, not only the same total cost."""
    actual = relops.linear_sum_assignment(*assignment_problems(*case), maximize)
    assert all(torch.equal(*pair) for pair in zip(actual, assigned[case, maximize]))


def test_assignments_of_fractions_and_large_numbers() -> None:
    """Check costs whose sums are rounded or would overflow, in a single problem without sizes."""
    for scale in (1e-310, 1.0, 1e308):
        for R, C in ((12, 30), (30, 12)):
            cost = torch.randn(R, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
            cost[cost.abs() > 1.5 * scale] = float("inf")
            row_to_col, _ = relops.linear_sum_assignment(cost)
            expected, _ = reference.linear_sum_assignment(cost)
            assert torch.equal(row_to_col, expected)  # random real costs have only one optimal assignment


def test_assignments_with_sizes_out_of_range_give_no_pairs() -> None:
    cost, *_ = assignment_problems(9, 4, None, torch.float32)
    for value in (-1, 10, 2**40, -(2**63)):
        for which in ("num_rows", "num_cols"):
            sizes = {which: torch.tensor([4, value, 2])}
            actual = torch.ops.relops.linear_sum_assignment(cost, **sizes)
            expected = relops.linear_sum_assignment(cost[::2], **{which: [4, 2]})
            for x, y in zip(actual, expected):
                assert (x[1] == -1).all() and torch.equal(x[::2], y)


# ---- IoU ----

# These cases are larger than the samples: sums over either side are split into slices, and there are more tiles than
# blocks. In "rows of a thread", a thread computes several rows of the output.
MANY_PAIRS = {
    "columns": BoxPairs(A=3, B=700),
    "rows": BoxPairs(A=700, B=3),
    "rows and columns": BoxPairs(A=90, B=300),
    "rows of a thread": BoxPairs(A=1500, B=1500),
    "matrices": BoxPairs(N=2050, A=2, B=9),
}


@pytest.mark.parametrize("case", MANY_PAIRS.values(), ids=MANY_PAIRS)
@pytest.mark.parametrize("op", BOX_PAIR_OPS, ids=lambda op: op.name)
def test_many_pairs_match_the_reference(op: Op, case: BoxPairs) -> None:
    assert_matches_twin(op, op.draw(case.arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("op", BOX_PAIR_OPS, ids=lambda op: op.name)
def test_overlap_equals_plain_arithmetic(op: Op, dtype: torch.dtype) -> None:
    """The results are bit-identical to the twin's, even for boxes that are not finite, have no area or are inverted."""
    numbers = [-float("inf"), -2.0, 0.0, 0.3, 1.1, 1e30, float("nan")]
    boxes = torch.cartesian_prod(*[torch.tensor(numbers, dtype=dtype)] * 4)
    a, b = boxes[torch.randperm(len(boxes))][:300].split([100, 200])
    torch.testing.assert_close(op.function(a, b), op.reference(a, b), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("B", [50, 300])
@pytest.mark.parametrize("op", BOX_PAIR_OPS, ids=lambda op: op.name)
def test_overlap_of_ordinary_boxes_equals_plain_arithmetic(op: Op, B: int) -> None:
    """Test the division that handles no special cases, which needs boxes between certain limits."""
    for exponent in (-37, -36, -30, -24, -10, -6, -5):
        corners = torch.randint(2**24, (100 + B, 2, 2)).sort(1).values
        boxes = corners.flatten(1) * 2.0**exponent
        boxes[::3] = boxes[::3] % 2.0 ** (exponent + 3) + torch.tensor([0.0, 0.0, 1.0, 1.0]) * 2.0 ** (exponent + 3)
        a, b = boxes.split([100, B])
        torch.testing.assert_close(op.function(a, b), op.reference(a, b), rtol=0, atol=0)
        without_area = a * torch.tensor([1.0, 0.0, 1.0, 0.0])
        torch.testing.assert_close(op.function(without_area, b), op.reference(without_area, b), rtol=0, atol=0)
        torch.testing.assert_close(op.function(b, without_area), op.reference(b, without_area), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "row expanded", "column expanded"])
@pytest.mark.parametrize("op", BOX_PAIR_OPS, ids=lambda op: op.name)
def test_layouts_of_the_output_gradient_of_pairs(op: Op, layout: str) -> None:
    inputs = op.draw(BoxPairs(A=70, B=90).arguments)
    grad = grad_like(torch.empty(70, 90))
    grad = {
        "transposed": grad.T.contiguous().T,
        "expanded": grad[:1, 1:2].expand(70, 90),
        "row expanded": grad[:1].expand(70, 90),
        "column expanded": grad[:, :1].expand(70, 90),
    }[layout]
    actual = op.run(inputs, grad_output=grad)
    for name, x in op.run(op.cast(inputs, torch.float64, torch.float64), op.reference, grad.double()).items():
        assert_matches(actual[name], x, name)


# ---- Relations ----

# These cases are larger than the samples. They have several groups of 8 heads, several chunks of channels, or sizes
# that are exact multiples of a tile.
LARGE_RELATIONS = {
    "heads": Relations(N=1, M=17, K=18, mask="some"),
    "wide": Relations(N=1, Q=3, K=5, M=1, D=100, Dv=100),
    "wide features": Relations(N=1, Q=3, K=5, M=2, D=72, Dv=5),
    "wide values": Relations(N=1, Q=3, K=5, M=2, D=5, Dv=136),
    "whole tiles": Relations(N=1, Q=32, K=64, M=2),
    "one key more": Relations(N=1, Q=33, K=33, M=1, options=(("geometry", "official"),)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE_RELATIONS.values(), ids=LARGE_RELATIONS)
def test_relations_of_larger_sizes_match_the_reference(case: Relations, dtype: torch.dtype) -> None:
    assert_matches_twin(RELATION, RELATION.draw(case.relation_attention, dtype=dtype))


def test_relations_with_many_blocks_match_the_reference() -> None:
    """A block processes 32 queries instead of 16 if there are at least 256 blocks."""
    inputs = RELATION.draw(Relations(N=86, Q=33, K=2, M=1, D=4, Dv=4).relation_attention)
    expected = RELATION.run(RELATION.cast(inputs, torch.float64, torch.float64), RELATION.reference, needs_grad=())
    assert_matches(RELATION.run(inputs, needs_grad=())["output"], expected["output"], noise=RELATION.noise)


@pytest.mark.parametrize("offset", [0, 1])
def test_relations_in_tf32(offset: int) -> None:
    """Results in TF32 are close but not equal to those in float32, whether or not the rows are aligned."""
    inputs = RELATION.draw(Relations(N=1, Q=17, K=40, D=16 + offset, Dv=16).relation_attention)
    inputs["query"] = inputs["query"][..., offset:]
    inputs["key"] = inputs["key"][..., offset:]
    exact, allowed = (
        RELATION.overload(*(RELATION.raw(inputs) | {"allow_tf32": allow}).values())[0] for allow in (False, True)
    )
    error = (exact - allowed).norm() / exact.norm()
    assert 1e-5 < error < 1e-3


@pytest.mark.parametrize("M", [3, 9])
@pytest.mark.parametrize("needs_grad", RELATION.differentiable)
def test_single_gradients_of_relations(needs_grad: str, M: int) -> None:
    inputs = RELATION.draw(Relations(N=1, M=M, mask="some").relation_attention, dtype=torch.float64)
    expected = RELATION.run_twin(inputs)[needs_grad]
    assert_matches(RELATION.run(inputs, needs_grad=(needs_grad,))[needs_grad], expected, needs_grad)


def test_masked_keys_have_no_influence() -> None:
    """Masked keys may have any values, and whole tiles may be masked."""
    inputs = RELATION.draw(Relations(N=1, Q=5, K=100).relation_attention)
    masked = torch.zeros(1, 100, dtype=torch.bool)
    masked[:, 10:95] = True
    dirty = {name: inputs[name].clone() for name in ("key", "value", "key_boxes")}
    for x in dirty.values():
        x[masked] = float("nan")
    actual = RELATION.run(inputs | dirty | {"key_mask": masked})
    expected = RELATION.run(inputs | {name: inputs[name][:, ~masked[0]] for name in dirty})
    for name, x in actual.items():
        if name in dirty:
            assert not x[masked].any()
            x = x[:, ~masked[0]]
        assert_matches(x, expected[name].double(), name)


@pytest.mark.parametrize("box", [(0, 0, float("nan"), 9), (0, 0, float("inf"), 9), (5, 0, 4, 9), (0, 9, 9, 2)], ids=str)
def test_invalid_boxes_give_nan(box: tuple[float, ...]) -> None:
    """An invalid query box makes its row of the output NaN, and an invalid key box makes all rows of its image NaN."""
    inputs = RELATION.draw(Relations(N=2, Q=20, K=40).relation_attention)
    clean = RELATION.run(inputs)
    inputs["query_boxes"][0, 3] = torch.tensor(box)
    rows = RELATION.run(inputs)
    others = [i for i in range(20) if i != 3]
    for name in ("output", "query", "query_boxes"):
        assert rows[name][0, 3].isnan().all()
        assert torch.equal(rows[name][0, others], clean[name][0, others]) and torch.equal(rows[name][1], clean[name][1])
    inputs["key_boxes"][1, 7] = torch.tensor(box)
    image = RELATION.run(inputs)
    assert image["output"][1].isnan().all() and torch.equal(image["output"][0, others], clean["output"][0, others])


# ---- Local relation ----

# These cases are larger than the samples. "tiles" has several tiles in both directions and a narrow last tile. "chunks"
# has several chunks of channels, and such large windows that tiles of full height do not fit in shared memory. The taps
# of "direct" are not kept in shared memory.
LARGE_WINDOWS = {
    "tiles": Windows(N=1, C=9, G=2, H=69, W=67, k=3),
    "chunks": Windows(N=1, C=19, G=1, H=40, W=33, k=13, similarity="product", border="zero"),
    "packs": Windows(N=1, C=32, G=2, H=40, W=18, k=2, channels_last=True),
    "direct": Windows(N=1, C=13, G=1, H=37, W=39, k=3, stride=2, border="zero"),
    "too large for a tile": Windows(N=1, C=2, G=1, H=6, W=40, k=63, border="zero"),
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", LARGE_WINDOWS.values(), ids=LARGE_WINDOWS)
def test_windows_that_exceed_a_tile_match_the_reference(case: Windows, dtype: torch.dtype) -> None:
    assert_matches_twin(LOCAL, LOCAL.draw(case.local_relation, dtype=dtype))


@pytest.mark.parametrize("needs_grad", LOCAL.differentiable)
@pytest.mark.parametrize("stride", [1, 2])
def test_single_gradients_of_windows(needs_grad: str, stride: int) -> None:
    inputs = LOCAL.draw(Windows(C=20, G=2, stride=stride, border="zero").local_relation, dtype=torch.float64)
    actual, expected = LOCAL.run(inputs, needs_grad=(needs_grad,)), LOCAL.run(inputs)
    assert torch.equal(actual[needs_grad], expected[needs_grad])


# ---- Selections ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "op, sample",
    [pytest.param(op, sample, id=f"{op.name}-{name}") for op in SELECTIONS for name, sample in op.samples.items()],
)
def test_selections_match_the_reference(op: Selection, sample, dtype: torch.dtype) -> None:
    assert_matches_selection(op, op.draw(sample, dtype=dtype))


@pytest.mark.parametrize("op", SELECTIONS, ids=lambda op: op.name)
def test_selections_of_empty_inputs(op: Selection) -> None:
    for sample in op.empty.values():
        inputs = op.draw(sample)
        assert_same_selection(op.run(inputs), op.run_twin(inputs))


def test_small_suppression_problems() -> None:
    search(200, seed=1)


@pytest.mark.parametrize("K", [1, 63, 64, 65, 129, 1024, 1025])
def test_suppression_of_any_number_of_boxes(K: int) -> None:
    """Check numbers of boxes that are close to the sizes of tiles and blocks."""
    boxes, scores, _ = (x.float() for x in clustered([K], boxes_per_object=8, seed=K))
    scores = (100 * scores).floor() / 100
    assert torch.equal(relops.nms(boxes, scores, 0.4), reference.nms(boxes, scores, 0.4))


def test_suppression_of_more_boxes_than_a_block_processes_at_once() -> None:
    images = [clustered([6000], boxes_per_object=8, seed=seed)[:2] for seed in range(4)]
    boxes, scores = (torch.stack(x).float() for x in zip(*images))
    results = [op(boxes, scores, 0.4, max_output=5000) for op in (relops.nms_padded, reference.nms_padded)]
    assert_same_selection(*results)


def test_suppression_in_classes_of_very_different_sizes() -> None:
    boxes, scores, idxs = clustered([1, 63, 64, 65, 2, 128, 129, 1, 257, 1025], boxes_per_object=8)
    boxes, scores = boxes.float(), (500 * scores).floor().float()
    assert torch.equal(relops.batched_nms(boxes, scores, idxs, 0.4), reference.batched_nms(boxes, scores, idxs, 0.4))
    names = torch.randperm(5000) - 2500
    idxs = names[torch.randint(5000, (len(boxes),))]  # two boxes are rarely in the same class
    assert torch.equal(relops.batched_nms(boxes, scores, idxs, 0.4), reference.batched_nms(boxes, scores, idxs, 0.4))


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("K", [63, 64, 65, 257, 600])
def test_soft_nms_of_any_number_of_boxes(K: int, method: str) -> None:
    boxes, scores, idxs = clustered([K - K // 3, K // 3], boxes_per_object=10, seed=K)
    for classes in (None, idxs):
        by_index = []
        for op in (relops.soft_nms, reference.soft_nms):
            keep, decayed = op(boxes, scores, method, idxs=classes)
            by_index.append(torch.zeros_like(scores).scatter(0, keep, decayed))
        torch.testing.assert_close(*by_index, rtol=1e-12, atol=0)
