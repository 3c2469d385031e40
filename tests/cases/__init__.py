"""The sample inputs of every op, in one file per family, on which all contract tests run.

An op in a family's OPS gets all tests of test_contract.py, and an op in its SELECTIONS all tests of
test_contract_selection.py.
"""

from __future__ import annotations

from . import assignment, deform_attn, iou, local_relation, regions, relation_attention, suppression
from .base import INTEGERS, Bad, Inputs, Op, Sample, Selection, grad_like

__all__ = ["INTEGERS", "OPS", "SELECTIONS", "Bad", "Inputs", "Op", "Sample", "Selection", "grad_like"]

OPS = [*deform_attn.OPS, *regions.OPS, *iou.OPS, *relation_attention.OPS, *local_relation.OPS]
SELECTIONS = [*suppression.SELECTIONS, *assignment.SELECTIONS]
