"""Sample inputs of every op, a file per family: the one list that contract tests draw on.

An op that is added to a family's OPS gets all of test_contract.py, one that is added to its SELECTIONS all of
test_contract_selection.py.
"""

from __future__ import annotations

from . import assignment, deform_attn, iou, local_relation, regions, relation_attention, suppression
from .base import INTEGERS, Bad, Inputs, Op, Sample, Selection, grad_like

__all__ = ["INTEGERS", "OPS", "SELECTIONS", "Bad", "Inputs", "Op", "Sample", "Selection", "grad_like"]

OPS = [*deform_attn.OPS, *regions.OPS, *iou.OPS, *relation_attention.OPS, *local_relation.OPS]
SELECTIONS = [*suppression.SELECTIONS, *assignment.SELECTIONS]
