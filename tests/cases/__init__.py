"""Sample inputs of every op, for the contract tests.

There is one file per family of ops. test_contract.py tests the ops that a file lists in OPS, and
test_contract_selection.py those that it lists in SELECTIONS.
"""

from __future__ import annotations

from . import assignment, deform_attn, deform_conv, iou, local_relation, regions, relation_attention, suppression
from .base import INTEGERS, Bad, Inputs, Op, Sample, Selection, grad_like

__all__ = ["INTEGERS", "OPS", "SELECTIONS", "Bad", "Inputs", "Op", "Sample", "Selection", "grad_like"]

OPS = [*deform_attn.OPS, *deform_conv.OPS, *regions.OPS, *iou.OPS, *relation_attention.OPS, *local_relation.OPS]
SELECTIONS = [*suppression.SELECTIONS, *assignment.SELECTIONS]
