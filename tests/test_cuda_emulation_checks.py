"""Tests that the CUDA emulation reports planted mistakes, and that the ops follow the rules that it checks.

cuda_emulation/checks.cu contains the planted mistakes. cuda_emulation.ignore_guard() plants a missing guard in any op.
"""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulation
import pytest
import torch
from cases import OPS, SELECTIONS, Op, Selection
from cases.deform_attn import PLAIN, DeformAttn
from cases.local_relation import LOCAL_RELATION as LOCAL
from cases.local_relation import Windows
from cases.relation_attention import RELATION_ATTENTION as RELATION
from cases.relation_attention import Relations
from conftest import assert_matches_twin, determinism

X = torch.zeros(4)
NO_DEVICE, TENSOR_DEVICE = 0, 1  # devices of the emulated machine
DEFAULT_STREAM = -1


@pytest.fixture(scope="module", autouse=True)
def cuda_kernels_on_the_cpu() -> Iterator[None]:
    with cuda_emulation.instead_of_cpu_kernels():
        yield


ops = torch.ops.cuda_emulation

# ---- Planted mistakes ----

ON_A_STREAM = ("launch", "memset", "copy", "synchronize", "is capturing", "sort")
ON_A_DEVICE = ("size of a sort", "function attribute", "device attribute")


@pytest.mark.parametrize("name", (*ON_A_STREAM, *ON_A_DEVICE))
def test_calls_need_the_guard_of_their_tensors(name: str) -> None:
    ops.call(X, name, TENSOR_DEVICE, TENSOR_DEVICE)
    with pytest.raises(RuntimeError, match="on device 0, but the tensors are on device 1"):
        ops.call(X, name, NO_DEVICE, TENSOR_DEVICE)
    if name in ON_A_STREAM:
        for stream in (NO_DEVICE, DEFAULT_STREAM):
            with pytest.raises(RuntimeError, match="not torch's current stream"):
                ops.call(X, name, TENSOR_DEVICE, stream)


def test_copies_and_synchronizations_cannot_be_captured() -> None:
    with cuda_emulation.capture():
        for name in ("copy", "synchronize"):
            with pytest.raises(RuntimeError, match="while a graph is captured"):
                ops.call(X, name, TENSOR_DEVICE, TENSOR_DEVICE)


def test_shared_memory_is_limited() -> None:
    """Without the attribute, static and dynamic shared memory together may have 48 KB."""
    ops.launch(X, [], 0, (48 << 10) - 1)
    ops.launch(X, [], 1023, 47 << 10)
    for static_bytes, dynamic_bytes in ((0, 48 << 10), (1023, (47 << 10) + 1)):
        with pytest.raises(RuntimeError, match="the limit is 49152"):
            ops.launch(X, [], static_bytes, dynamic_bytes)


@pytest.mark.parametrize("architecture, kilobytes", [("sm_75", 64), ("sm_80", 163), ("sm_86", 99), ("sm_90", 227)])
def test_attributes_are_limited_by_the_architecture(architecture: str, kilobytes: int) -> None:
    limit = kilobytes << 10
    with cuda_emulation.tensors_on(architecture):
        ops.launch(X, [limit], 2047, limit - 2048)
        with pytest.raises(RuntimeError, match=f"the limit is {limit}"):
            ops.launch(X, [limit], 2047, limit - 2047)
        with pytest.raises(RuntimeError, match=r"cudaFuncSetAttribute.* failed"):
            ops.launch(X, [limit + 1], 2047, 0)
        # Another host thread may set the attribute for its own launch at any time.
        with pytest.raises(RuntimeError, match="the attribute of the kernel is 50000"):
            ops.launch(X, [50000, limit], 2047, 50001)


def test_invalid_grids_are_reported() -> None:
    for blocks, threads in ((0, 32), (1, 0), (1, 1025)):
        with pytest.raises(RuntimeError, match=f"a launch of {blocks} x 1 blocks of {threads} threads"):
            ops.grid(X, blocks, threads, False)


def test_threads_that_wait_forever_are_reported() -> None:
    with pytest.raises(RuntimeError, match="32 threads of a block wait for one another forever"):
        ops.grid(X, 3, 64, True)
    ops.grid(X, 3, 64, False)


def test_uninitialized_memory_is_poisoned() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert ops.uninitialized(X.to(dtype)).isnan().all()
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert (ops.uninitialized(X.to(dtype)) >= torch.iinfo(dtype).max // 128 * 127).all()
    assert (ops.uninitialized_shared(X) < -1e8).all()


def test_fast_functions_have_the_errors_of_a_gpu() -> None:
    a, b = torch.randn(2, 3200, generator=torch.Generator().manual_seed(0))
    for function, exact in enumerate((a.double().sin(), a.double().cos())):
        assert 3e-7 < (ops.apply(a, b, function) - exact).abs().max() < 5e-7
    quotient = ops.apply(a, b, 2)
    units = (quotient.view(torch.int32) - (a / b).view(torch.int32)).abs()
    assert units.max() == 2 and (units < 2).any()


def test_atomic_additions_flush_subnormal_numbers() -> None:
    small, zero = torch.full((32,), 1e-39), torch.zeros(32)
    assert not ops.apply(small, zero, 3).any() and not ops.apply(zero, small, 3).any()
    assert (ops.apply(zero, 100 * small, 3) == 100 * small).all()


# ---- The ops ----


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("op", (*OPS, *SELECTIONS), ids=lambda op: op.name)
def test_an_op_without_one_of_its_guards_raises_an_error(op: Op | Selection, deterministic: bool) -> None:
    inputs = op.draw(op.samples["typical"])
    with determinism(deterministic):
        cuda_emulation.ignore_guard(-1)
        op.run(inputs)
        guards = cuda_emulation.ignore_guard(-1)
        assert guards > 0
        try:
            for index in range(guards):
                cuda_emulation.ignore_guard(index)
                with pytest.raises(RuntimeError, match="on device 0, but the tensors are on device 1"):
                    op.run(inputs)
        finally:
            cuda_emulation.ignore_guard(-1)


@pytest.mark.parametrize("op", (*OPS, *SELECTIONS), ids=lambda op: op.name)
def test_ops_can_be_captured_in_a_graph(op: Op | Selection) -> None:
    inputs = op.draw(op.samples["typical"])
    with cuda_emulation.capture():
        if isinstance(op, Selection) and op.synchronizes(inputs):
            with pytest.raises(RuntimeError, match="cannot be read while a CUDA graph is captured"):
                op.run(inputs)
        else:
            op.run(inputs)


def test_many_levels_can_be_captured_in_a_graph() -> None:
    """The kernel parameters have no room for so many levels, which are on the CPU."""
    inputs = PLAIN.draw(DeformAttn(levels=((2, 3),) * 17, P=1).plain)
    with cuda_emulation.capture():
        PLAIN.run(inputs)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_86", "sm_90"])
def test_shared_memory_suffices(architecture: str) -> None:
    """Test the ops whose kernels may use more than 48 KB, first with little and then with much shared memory.

    The emulation assumes that another host thread launches the same kernels with other sizes. The other tests use the
    limit of sm_80.
    """
    little, much = Windows().local_relation, Windows(N=1, C=12, G=1, H=20, W=33, k=9).local_relation
    with cuda_emulation.tensors_on(architecture):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for sample in (little, much):
                assert_matches_twin(LOCAL, LOCAL.draw(sample, dtype=dtype))
            assert_matches_twin(RELATION, RELATION.draw(RELATION.samples["typical"], dtype=dtype))
        if architecture != "sm_90":
            # A block processes 32 queries instead of 16 if there are at least 256 blocks.
            many = Relations(N=128, Q=17, K=2, M=1, D=4, Dv=4).relation_attention
            RELATION.run(RELATION.draw(many), needs_grad=())
