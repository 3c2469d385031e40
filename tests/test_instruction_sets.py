"""The CPU kernels for less than this machine has, by the tests that reach all of their lanes.

A process chooses its instruction set once, at import: each set has one process, which all of these tests share.
"""

from __future__ import annotations

import pytest
from conftest import run_python

from relops import _library

ISAS = ("baseline", "avx2", "avx512")
# Of each file what compares values, by an expression as for `pytest -k`.
CHOSEN = {
    "test_contract.py": "matches_twin or (local_relation and (deterministic or grad or layouts or expanded or empty))",
    "test_contract_selection.py": "equals_twin",
    "test_box_iou.py": "lane or ties or nan or finite or (many and dense)",
    "test_local_relation.py": "not (compile or export or memory or fake)",
    "test_ms_deform_attn.py": "matches_twin or leak or (finite and both)",
    "test_rank_embedding.py": "not compile",
    "test_relation_attention.py": "sizes or definition or leak or logarithm or huge",
}


@pytest.mark.parametrize("isa", ISAS)
def test_lower_instruction_sets(isa: str) -> None:
    here = _library.build_info()["cpu_isa"]
    if ISAS.index(isa) >= ISAS.index(here):
        pytest.skip(f"the tests in this process use {here}")
    chosen = " or ".join(f"({file} and ({expression}))" for file, expression in CHOSEN.items())
    done = run_python(
        f"""
import sys, pytest
from relops import _library
used = _library.build_info()["cpu_isa"]
assert used == {isa!r}, used
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not cuda and ({chosen})", *{list(CHOSEN)!r}]))
""",
        RELOPS_CPU_ISA=isa,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
