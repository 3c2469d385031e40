"""Tests of the CPU kernels with every instruction set that is lower than the best one of the machine.

A process chooses its instruction set at import. The tests of an instruction set therefore run together in a separate
process.
"""

from __future__ import annotations

import pytest
from conftest import run_python

from relops import _library

ISAS = ("baseline", "avx2", "avx512", "amx")
# For each file, an expression for `pytest -k` that selects the tests that compare values.
SELECTED = {
    "test_contract.py": "matches_twin or (local_relation and (deterministic or grad or layouts or expanded or empty))",
    "test_contract_selection.py": "equals_twin",
    "test_box_iou.py": "lane or ties or nan or finite or (many and dense)",
    "test_deform_conv2d.py": "(float32 or bfloat16) and (large_maps or finite)",
    "test_local_relation.py": "not (compile or export or memory or fake)",
    "test_ms_deform_attn.py": "matches_twin or leak or (finite and both)",
    "test_rank_embedding.py": "not compile",
    "test_relation_attention.py": "sizes or definition or leak or invalid or huge",
}


@pytest.mark.parametrize("isa", ISAS)
def test_lower_instruction_sets(isa: str) -> None:
    current = _library.build_info()["cpu_isa"]
    if ISAS.index(isa) >= ISAS.index(current):
        pytest.skip(f"this process uses {current}, which is not higher than {isa}")
    selected = " or ".join(f"({file} and ({expression}))" for file, expression in SELECTED.items())
    process = run_python(
        f"""
import sys, pytest
from relops import _library
used = _library.build_info()["cpu_isa"]
assert used == {isa!r}, used
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not cuda and ({selected})", *{list(SELECTED)!r}]))
""",
        RELOPS_CPU_ISA=isa,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert " passed" in process.stdout
