"""The page docs/performance.md and the summary for the README, generated from the records in benchmarks/results.

`python -m benchmarks.report` writes the page. This module contains the text between the tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness

PAGE = harness.ROOT / "docs" / "performance.md"
IMAGES = PAGE.parent / "images"

Record = dict[str, Any]


# ---- Static text ----

INTRODUCTION = """\
# Performance

This page compares every op of relops with the same computation in pure PyTorch. It also shows other implementations of
the same op, such as those of torchvision and SciPy. The last section compares whole detectors.
"""

NO_GPU = """\
**No GPU figures exist yet.** All figures on this page were measured on CPUs. The CUDA kernels have only been tested on
an emulation of CUDA, and have not been run on a GPU.
"""

OVERVIEW = """\
![Bar chart of the speed-up of eleven ops over PyTorch and other implementations](images/op_speedups.png)

The chart shows one or two rows of the tables below for each family of ops.
"""

METHOD = """\
## How the figures are measured

The command `python -m benchmarks.run` measures all ops and records the results in `benchmarks/results/`. The command
`python -m benchmarks.report` generates this page from the records.

- **Rows.** A row of a table is one measurement of an op, with one input, one dtype and one pass (forward, backward or
  both).
- **Baseline.** "PyTorch" is the pure-PyTorch version of the op, which is the function of the same name in
  `relops.reference`. The text above each table says how this version computes the op.
- **Verification.** Before a row is timed, every implementation runs in the dtype of the row, and its results are
  compared with those of the pure-PyTorch version in float64 on the same inputs. All outputs are compared and, for rows
  with a backward pass, all gradients. For ops that return indices, such as `nms`, the pure-PyTorch version
  runs in the dtype of the row instead of float64. If another implementation does not support the dtype or fails this
  check, it is missing from the row.
- **Rounds.** Every round draws new random inputs and runs all implementations on them, in rotating order. Rounds
  continue for ten seconds. A row has at least five rounds, or fewer if PyTorch takes many seconds. Times are medians
  over the rounds.
- **Ratios.** A ratio says how many times faster relops is. It is the median of the ratios within the rounds, so other
  load on the machine affects both sides alike.
- **Clock.** On the CPU, times are wall-clock times. The inputs may still be in the cache, as in a network, where the
  preceding layer has just written them. On CUDA, times come from CUDA events, and the L2 cache is overwritten before
  each call. Times include the allocation of the outputs, but not their deallocation. The time of a "backward" row does
  not include the forward pass.
- **Peak memory** is the peak memory of one call, including its outputs and gradients but not its inputs. On the CPU, it
  is the growth of the peak resident set, which includes the scratch memory of kernels. On CUDA, it is the peak that
  torch's allocator reports.

Figures are comparable only between runs on the same machine with the same number of threads and the same versions.
"""


class Machine(NamedTuple):
    """A machine on which results were recorded.

    Both fields name the generation of the processor, which the records do not contain.
    """

    short: str
    description: str


MACHINES = {
    "amd-epyc-avx512-2-cores": Machine("Zen 4", "two cores of an AMD EPYC processor (Zen 4, AVX-512)"),
    "intel-r-xeon-r-processor-amx-2-cores": Machine("Xeon", "two cores of an Intel Xeon processor (AVX-512 and AMX)"),
    "amd-epyc-avx2-2-cores": Machine("Zen 1", "two cores of an older AMD EPYC processor (Zen 1, AVX2)"),
}


@dataclass(frozen=True)
class Family:
    """Ops that share a table, and the text above it.

    Attributes:
        name: The heading.
        ops: The ops, as the records name them.
        text: The explanation of the inputs and of the PyTorch version.
        notes: Additional text for some machines, by the name of the machine's results folder.
    """

    name: str
    ops: tuple[str, ...]
    text: str
    notes: Mapping[str, str]


FAMILIES = (
    Family(
        "Deformable attention",
        ("ms_deform_attn", "ms_deform_attn_fused"),
        """\
Encoder rows have a pyramid with levels of 100x152, 50x76, 25x38 and 13x19 pixels, batch size N = 1, Q = S = 20,197
queries, M = 8 heads of width D = 32, and P = 4 points. Decoder rows have Q = 300 queries, and "decoder boxes" rows have
reference boxes instead of reference points. The sampling locations are uniform over the image, except in "local" rows,
in which they lie around the pixel of the query. "transformers encoder" rows run the whole encoder of Deformable DETR in
Hugging Face transformers, including its linear layers. relops replaces only the sampling.

"PyTorch" uses `grid_sample` in eager mode, which was faster in these measurements than `torch.compile`. "relops
unfused" computes the fused op with `relops.ms_deform_attn` and PyTorch functions.
""",
        {},
    ),
    Family(
        "Deformable convolution",
        ("deform_conv2d",),
        """\
The input "1x256x50x76 to 256" means maps [N,C,H,W] of shape [1,256,50,76] and 256 output channels. Kernels are 3x3, and
the output maps are as high and wide as the input maps. Rows with "v1" have no mask, and "d2" means a dilation of 2.
Offsets have a standard deviation of 2 pixels. In rows "without offsets", all offsets are zero, so the result is that of
`torch.nn.functional.conv2d`, which is shown for comparison. These rows compute only the gradients of the input and the
weight.

"PyTorch" gathers the four pixels of every sample and multiplies the matrix of all samples by the weight. "torchvision
in float32" casts 16-bit tensors to float32, because torchvision does not support bfloat16.
""",
        {},
    ),
    Family(
        "Region ops",
        ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "prroi_pool", "multi_scale_roi_align"),
        """\
The input "headline 2x256x200x304 K=1000 7x7" means maps [N,C,H,W] of shape [2,256,200,304], K = 1000 boxes and 7x7 bins
per box. In headline rows, the map has stride 4, the sides of the boxes are 30 to 300 image pixels long, and each bin
has 2x2 samples. The other inputs are a mask head (100 boxes, 14x14 bins), the C4 map of a ResNet (stride 16, 512
boxes), the score maps of R-FCN (1029 channels at stride 16, 300 boxes), a map of stride 16 with 300 boxes, and the box
head of a feature pyramid (four levels of 256 channels, two images of 800x1216, 1000 boxes). "channels_last" rows have
maps in that memory format. In "adaptive" rows, the number of samples depends on the size of the box. "aligned" rows use
`aligned=True`, and "box gradients" rows also compute gradients with respect to the boxes.

"PyTorch" combines the pixels of each bin with `embedding_bag`, which was the fastest of the formulations that were
tried. "torchvision in float32" casts 16-bit features to float32, because torchvision does not support bfloat16 and
fails the verification in float16.
""",
        {
            "amd-epyc-avx512-2-cores": """\
The version of torchvision is 0.29.1. In headline rows, the gradient of the map takes 124 MB, and the backward pass
spends most of its time on the first access to this memory. The cost of this access varied by a factor of two to three
between runs on this machine.
"""
        },
    ),
    Family(
        "Suppression",
        ("nms", "batched_nms", "nms_padded", "soft_nms"),
        """\
K is the number of boxes, C is the number of classes, and the number after IoU is the threshold. "uniform" boxes are
spread over the image, so at least half of them are kept. "proposals" lie in clusters, like the output of a region
proposal network (see `benchmarks/proposals.py`). `nms_padded` processes 2 images with 2000 boxes each and keeps at most
1000 boxes per image, or 8 images with 5000 boxes each and keeps at most 300 per image.

"PyTorch" suppresses the boxes block by block with IoU matrices, except in `soft_nms`, which takes one step per kept
box. torchvision has no `soft_nms`. It has no suppression for a batch of images either, so "torchvision in a loop"
processes one image at a time.
""",
        {"amd-epyc-avx512-2-cores": "The version of torchvision is 0.29.1.\n"},
    ),
    Family(
        "IoU of all pairs",
        ("box_iou", "generalized_box_iou"),
        """\
The input 20000x100 means a set of 20,000 boxes and a set of 100 boxes. The input 2x300x300 means a batch of two pairs
of sets, with 300 boxes in each set. "PyTorch" computes all pairs with broadcasting. torchvision does not accept a
batch, so "torchvision in a loop" processes one pair of sets at a time.
""",
        {"amd-epyc-avx512-2-cores": "The version of torchvision is 0.29.1.\n"},
    ),
    Family(
        "Linear assignment",
        ("linear_sum_assignment",),
        """\
The input 32x300x60 means 32 problems with 300 rows and 60 columns. The DETR inputs match 300 queries to 60 objects in
each of 32 images, with class, L1 and generalized IoU costs. In each problem of a padded input, only a random number of
columns is used, from 1 to 60 (or to 100). The costs of the square problems are uniform numbers, integers from 0 to 99
("ties"), distances between points, a matrix of low rank with noise, or the products i * j, which are the worst case for
shortest augmenting paths.

"PyTorch" assigns one row at a time, with a search for the shortest augmenting path. SciPy solves one problem at a time.
""",
        {"amd-epyc-avx512-2-cores": "The version of SciPy is 1.17.1.\n"},
    ),
    Family(
        "Relations between objects",
        ("relation_attention", "rank_embedding", "duplicate_removal"),
        """\
For `relation_attention`, the input is N sets of K boxes. Every box attends to all boxes of its set. There are M = 16
heads, whose queries and keys have width D = 64 and whose values have width Dv. In the padded batch, about 3 out of 10
keys are masked. The "official" row computes the relative geometry of the boxes as the released code of Relation
Networks does. `rank_embedding` maps each rank to a vector of width 128 or 1024. The `nn.DuplicateRemoval` rows run the
whole module on 300 objects and 80 classes, and the module compares the 100 best objects of each class. "PyTorch" runs
the same module with the PyTorch version of `relation_attention`. "all" rows process all objects, and "over 0.01" rows
only those with a score above 0.01. "relops.nms of each class" is greedy suppression with one call of `relops.nms`
per class. It needs much less arithmetic.

"PyTorch" computes `relation_attention` in three steps: the sines and cosines of the geometry, matrix products with the
geometry weight, and `scaled_dot_product_attention` with the result as its mask. This was the fastest of eight
formulations.
""",
        {
            "amd-epyc-avx512-2-cores": """\
`relation_attention` spends four fifths of its time on matrix products that run as fast as torch's large matrix
products, so these ratios are close to what the arithmetic allows. The ratios grow with the number of boxes. In a
separate measurement with 4000 boxes on the same machine and date, one forward and backward pass took 2.4 s and 130 MB
of memory, not counting the inputs. PyTorch took 27 s and 11 GB. `nn.DuplicateRemoval` and the AVX2 kernels became
faster after these measurements. The table for Zen 1 was measured with the faster versions.
""",
            "amd-epyc-avx2-2-cores": """\
The two cores multiply large matrices at 86 GFLOP/s. At this rate, the matrix products of the forward pass take 72 ms
for 1000 boxes.
""",
        },
    ),
    Family(
        "Local relation",
        ("local_relation",),
        """\
The input "2x256x56x56 G32 k7" means values [N,C,H,W] of shape [2,256,56,56], 32 channel groups and a window of 7x7
pixels, and "s2" means a stride of 2. The similarity is the squared difference unless the input names another one. The
float32 rows from 2x64x224x224 (the stem) to 2x800x7x7 are layers of LR-Net-50.

"PyTorch" copies all windows with `unfold`. "shifted maps" is a sum over k x k shifted copies of the maps, which was the
fastest pure-PyTorch formulation in these measurements.
""",
        {"amd-epyc-avx2-2-cores": "During these runs, the two cores multiplied large matrices at 69 to 72 GFLOP/s.\n"},
    ),
)

OP_NAMES = {"duplicate_removal": "nn.DuplicateRemoval"}
PEER_NAMES = {
    "scipy": "SciPy",
    "torchvision loop": "torchvision in a loop",
    "torchvision, in a loop": "torchvision in a loop",
}

DETECTORS = """\
## Detectors

A detector spends only a part of its time in these ops. The rest is spent in torch's convolutions, matrix products and
attention, which are the same on both sides of each comparison below.
"""

CELLS = {
    "faster_rcnn_fpn": "Faster R-CNN on a feature pyramid",
    "approximate": "Faster R-CNN, approximate joint training",
    "joint": "Faster R-CNN, non-approximate joint training",
    "alternating": "Faster R-CNN, alternating training",
    "fast_rcnn": "Fast R-CNN on the proposals of `approximate`",
    "mask_rcnn": "Mask R-CNN (boxes only, because the data has no masks)",
    "cascade_rcnn": "Cascade R-CNN",
    "r_fcn": "R-FCN",
    "hypernet": "HyperNet",
    "sparse_rcnn": "Sparse R-CNN",
    "sparse_rcnn_iou": "Sparse R-CNN with attention weighted by the overlap of proposals (`iou_attention`)",
    "deformable_detr": "Deformable DETR, two-stage",
    "lr_net": "Faster R-CNN on a half-width LR-Net-26",
    "relation_networks": "Relation Networks on a feature pyramid, with relation modules and learned duplicate removal",
    "unsuppressed": "Relation Networks as above, without suppression of proposals",
}

CELLS_TEXT = """\
### Training on photographs of blood cells

The detectors in the table were trained from scratch at 320x240 on a
[public data set](https://github.com/MahmudulAlam/Complete-Blood-Cell-Count-Dataset) with three classes, 300 training
images and 60 test images. The command `benchmarks/train_cells.sh DATA NAME` repeats the run `NAME`. The runs used two
cores of an AMD EPYC processor (Zen 1, AVX2) and torch 2.13.0+cpu on 2026-11-26. AP is COCO's average precision on the
test images. Logs and metrics are in `benchmarks/results/cells/`.
"""

CELLS_NOTES = """\
- `faster_rcnn_fpn` had both cores to itself. Its AP50 is 0.945 after 4.8 minutes. Its AP is 0.602 after 7.2 minutes,
  and its best AP is 0.615.
- `relation_networks` reaches an AP of 0.624 after 12 minutes, more than the best AP of `faster_rcnn_fpn`, and 0.641
  after 16 minutes. Its RPN suppresses proposals with an IoU above 0.7, as published. Its detections are not suppressed.
  If the proposals are not suppressed either (`unsuppressed`), AP is 0.621 after 17 minutes.
- Sparse R-CNN with the published attention (`sparse_rcnn`) has AP 0.587 and AP50 0.853 after 23.7 minutes. Even at the
  end of training, it often detects a platelet twice (platelets are the smallest cells). With `iou_attention`
  (`sparse_rcnn_iou`), the AP50 is 0.893 after 24 minutes.
- `hypernet`, `lr_net`, `relation_networks`, `unsuppressed` and `sparse_rcnn` also had both cores to themselves. The
  other runs shared the cores, so they took longer than they would have alone.
- The evaluations of these runs ignored one of the 908 objects in the test images, a red cell whose box has zero width
  and zero height. The command `python -m relops eval` now counts this object as missed.

![Photograph of blood cells with the boxes that Faster R-CNN found](images/blood_cells_faster_rcnn_fpn.jpg)

*A test image with the detections of the run `faster_rcnn_fpn`.*

![The same photograph with the boxes that Relation Networks found](images/blood_cells_relation_networks.jpg)

*The same image with the detections of the run `relation_networks`, which suppresses no detections.*

![The same photograph with the boxes that Sparse R-CNN found](images/blood_cells_sparse_rcnn_iou.jpg)

*The same image with the detections of the run `sparse_rcnn_iou`.*

![Training loss by iteration and average precision by minute](images/training_curves_relation_networks.png)

*Training losses and average precision of the run `relation_networks`.*
"""

SHAPES = {"faster_rcnn_fpn": "Faster R-CNN on a feature pyramid", "mask_rcnn": "Mask R-CNN"}

SHAPES_TEXT = """\
### Training on drawn shapes

The command `python -m relops train --data shapes` draws 1000 images of 160x128 pixels, which show objects of four
classes, and trains a detector on them. On the machine of the previous section, this takes 4.5 minutes, including
start-up and evaluation. With the option `--model mask_rcnn`, it takes 9 minutes.
"""

DCN = {"rotated": "rotated and stretched shapes", "cells": "blood cells"}

DCN_TEXT = """\
### Training with deformable convolutions

Each row of the table compares two Faster R-CNNs, whose backbones are `resnet18-gn-32` ("plain") and
`resnet18-gn-dcnv2-32` ("dcnv2"). The box head of the plain network is wider, so that it has 1,148,383 parameters and
the other 1,143,867. Both begin with the body of a plain network that was trained on drawn shapes, and train on the same
images for the same number of iterations. The data sets are the drawn shapes with `--data rotated-shapes:4000`, and the
photographs of blood cells. The command `benchmarks/train_dcn.sh DATA` repeats the runs. On 2026-12-01, each took 6 to 9
minutes on one core of an Intel Xeon processor (AVX-512) with torch 2.14.1+cu130, in pairs side by side. The AP is that
of the last evaluation.
"""

DCN_NOTES = """\
- On the rotated and stretched shapes, the AP of the dcnv2 network is higher with all three seeds. The mean AP is 0.709
  instead of 0.702. In earlier runs with 2000 images and 2000 iterations, it was 0.612, 0.592 and 0.587 instead of
  0.585, 0.580 and 0.591.
- On the blood cells, deformable convolutions do not help. The mean AP is 0.601 instead of 0.609. With two of the seeds,
  the difference is less than 0.001. In an earlier run with 600 iterations and seed 0, it was 0.521 instead of 0.555.
- The learning rate of the convolutions that compute offsets and masks is a tenth of that of other layers, which is the
  default. In earlier runs with the full learning rate, the dcnv2 network had a lower AP than the plain one.
"""

TORCHVISION_TEXT = """\
### Comparison with torchvision

The command `python -m benchmarks.detectors` times detectors of relops and torchvision with the same weights. Both
detectors must return the same losses or detections before they are timed. Each round runs both, in alternating order.
"""

TWINS = {
    "faster_rcnn": "Faster R-CNN on LR-Net-26",
    "relation_networks_fpn": "Relation Networks on a feature pyramid",
    "deformable_detr": "Deformable DETR, two-stage",
    "sparse_rcnn": "Sparse R-CNN",
    "faster_rcnn_fpn": "Faster R-CNN on a feature pyramid",
    "detr": "DETR (only its losses, because its inference uses no op of relops)",
}

TWINS_TEXT = """\
### Comparison with pure PyTorch

The command `python -m benchmarks.detector_twins` compares each detector with a copy of itself. In the copy, pure
PyTorch replaces every relops op, except that SciPy solves the assignment problems. Both must return the same
detections, or the same losses and gradients, before they are timed. Detection processes one image of 640x480 with
ResNet-50 or LR-Net-26 as the backbone. Training is one forward and backward pass of a small model on four images of
320x240. Peak memory is the peak during one pass, not counting the memory that was in use before.
"""


# ---- Formats ----


def three_digits(value: float) -> str:
    """Return the value with three significant digits, or without decimals if it is 100 or more."""
    if value <= 0:
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def format_ms(milliseconds: float) -> str:
    return f"{three_digits(milliseconds)} ms"


def format_ratio(ratio: float) -> str:
    return f"{three_digits(ratio)}x"


def format_bytes(count: int) -> str:
    if count >= 1000 * 2**20:
        return f"{three_digits(count / 2**30)} GiB"
    if count >= 2**20:
        return f"{three_digits(count / 2**20)} MiB"
    return f"{three_digits(count / 2**10)} KiB"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. A column whose name ends with ":" is aligned to the right."""
    names = [column.removesuffix(":") for column in columns]
    rules = ["---:" if column.endswith(":") else "---" for column in columns]
    lines = [f"| {' | '.join(cells)} |" for cells in (names, rules, *rows)]
    return "\n".join(lines) + "\n"


def op_name(op: str) -> str:
    return f"`{OP_NAMES.get(op, op)}`"


# ---- Ops ----


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def ops_records(results: Path) -> dict[str, dict[str, Record]]:
    """Return the records of the ops, grouped by results folder and op. The folders in MACHINES come first."""
    folders = {path.parent.name for path in results.glob("*/*.json")}
    order = [name for name in MACHINES if name in folders] + sorted(folders - MACHINES.keys())
    return {name: {path.stem: load(path) for path in sorted((results / name).glob("*.json"))} for name in order}


def machine_of(folder: str, run: Mapping[str, Any]) -> Machine:
    """Return the description of a machine, from MACHINES or, if it is not listed, from the data of a run on it."""
    machine = run["machine"]
    if "gpu" in machine:
        return Machine(machine["gpu"], f"an {machine['gpu']} with CUDA {run['versions']['cuda']}")
    fallback = Machine(folder, f"{machine['cores']} cores of {machine['cpu']} ({run['cpu_isa']})")
    return MACHINES.get(folder, fallback)


def commit_of(run: Mapping[str, Any]) -> str:
    """Return the abbreviated commit of a run, with a "+" if its working tree had changes."""
    return (run["commit"] or "unknown")[:10] + ("+" if run["dirty"] else "")


def measured(records: Mapping[str, Record]) -> str:
    """Return a sentence that says when and with which versions, threads and commits a table was measured."""
    runs = {op: list(record["runs"].values()) for op, record in records.items()}
    every = [run for op in runs for run in runs[op]]
    dates = sorted({run["date"][:10] for run in every})
    versions = sorted({run["versions"]["torch"] for run in every})
    threads = sorted({run["threads"] for run in every})
    commits = {op: ", ".join(sorted({commit_of(run) for run in runs[op]})) for op in runs}
    if len(set(commits.values())) == 1:
        at_commits = f"commit {next(iter(commits.values()))}"
    else:
        at_commits = "commits " + ", ".join(f"{commit} ({op_name(op)})" for op, commit in commits.items())
    return (
        f"Measured on {' and '.join(dates)} with torch {' and '.join(versions)} and"
        f" {' or '.join(map(str, threads))} threads at {at_commits}.\n"
    )


def peers_text(row: Mapping[str, Any]) -> str:
    """Return the times of the peers of a row and, in parentheses, how many times faster relops is."""
    return "; ".join(
        f"{PEER_NAMES.get(name, name)} {format_ms(row['ms'][name]['median'])} ({format_ratio(ratio)})"
        for name, ratio in row["peer_ratio"].items()
    )


def ops_table(records: Mapping[str, Record]) -> str:
    rows = [row for record in records.values() for row in record["rows"]]
    with_peers = any(row["peer_ratio"] for row in rows)
    columns = ["op", "input", "dtype", "pass", "relops:", "PyTorch:", "ratio:"]
    columns += ["other implementations (ratio)"] * with_peers + ["peak memory, relops:", "PyTorch:"]
    cells = [
        [
            op_name(row["op"]),
            row["shape"],
            row["dtype"],
            row["direction"],
            format_ms(row["ms"]["relops"]["median"]),
            format_ms(row["ms"]["pytorch"]["median"]),
            format_ratio(row["ratio"]),
            *[peers_text(row)] * with_peers,
            format_bytes(row["peak_bytes"]["relops"]),
            format_bytes(row["peak_bytes"]["pytorch"]),
        ]
        for row in rows
    ]
    return table(columns, cells)


def machine_sections(folder: str, records: Mapping[str, Record], explained: dict[str, str]) -> list[str]:
    """Return the section of one machine, with a subsection per family of ops.

    Only the first subsection of a family describes the inputs, and later ones refer to it. `explained` maps each family
    to the heading of its first subsection.
    """
    runs = [run for record in records.values() for run in record["runs"].values()]
    machine = machine_of(folder, runs[0])
    sections = [f"## Ops on {machine.description}\n"]
    described = {op for family in FAMILIES for op in family.ops}
    others = Family("Other ops", tuple(op for op in records if op not in described), "", {})
    for family in (*FAMILIES, others):
        present = {op: records[op] for op in family.ops if op in records}
        if not present:
            continue
        heading = f"{family.name}, {machine.short}"
        sections.append(f"### {heading}\n")
        if family.name in explained:
            sections.append(f'The section "{explained[family.name]}" describes the inputs and the implementations.\n')
        else:
            sections.append(family.text)
            explained[family.name] = heading
        sections += [family.notes.get(folder, ""), measured(present), ops_table(present)]
    return [text for text in sections if text]


# ---- Detectors ----


def training_table(folder: Path, names: Mapping[str, str], masks: bool = False) -> str:
    """Return a table of the training runs in a folder, in the order of `names`, from their metrics and logs."""
    columns = ["detector", "run", "iterations:", "minutes:", "AP:", "AP50:"]
    columns += ["AP of masks:", "AP50 of masks:"] if masks else ["best AP:"]
    rows = []
    for name, description in names.items():
        metrics = load(folder / name / "metrics.json")
        entries = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        row = [description, f"`{name}`", str(metrics["iteration"]), f"{metrics['minutes']:.1f}"]
        row += [f"{metrics[key]:.3f}" for key in ("AP", "AP50")]
        if masks:
            row += [f"{metrics[key]:.3f}" if key in metrics else "" for key in ("mask_AP", "mask_AP50")]
        else:
            best = max((entry for entry in entries if "AP" in entry), key=lambda entry: entry["AP"])
            row += [f"{best['AP']:.3f} after {best['minutes']:.1f} min"]
        rows.append(row)
    return table(columns, rows)


def dcn_table(folder: Path) -> str:
    """Return a table of the training runs of plain and dcnv2 networks in a folder, with a row per data set and seed."""
    rows = []
    for data, description in DCN.items():
        for path in sorted(folder.glob(f"{data}-plain-*.jsonl")):
            plain, dcnv2 = (
                json.loads(file.read_text().splitlines()[-1])
                for file in (path, path.with_name(path.name.replace("plain", "dcnv2")))
            )
            row = [description, path.stem.rpartition("-")[2], str(dcnv2["iteration"])]
            rows.append(row + [f"{run[key]:.3f}" for key in ("AP", "AP75") for run in (plain, dcnv2)])
    columns = ["data", "seed:", "iterations:", "AP, plain:", "dcnv2:", "AP75, plain:", "dcnv2:"]
    return table(columns, rows)


def run_text(folder: str, run: Mapping[str, Any], rounds: Iterable[int], torchvision: str | None = None) -> str:
    """Return a sentence that says how a table of whole detectors was measured."""
    versions = f"torch {run['versions']['torch']}" + (f", torchvision {torchvision}" if torchvision else "")
    counts = " or ".join(map(str, sorted(set(rounds))))
    return (
        f"Measured on {run['date'][:10]} on {machine_of(folder, run).description} with {versions} and"
        f" {run['threads']} threads\nat commit {commit_of(run)}. Times are medians of {counts} rounds.\n"
    )


def torchvision_section(folder: str, record: Record) -> list[str]:
    rows = record["rows"]
    cells = [
        [name, format_ms(row["relops_ms"]), format_ms(row["torchvision_ms"]), format_ratio(row["ratio"])]
        for name, row in rows.items()
    ]
    measured_with = run_text(folder, record, (row["rounds"] for row in rows.values()), record["torchvision"])
    return [measured_with, table(["detector", "relops:", "torchvision:", "ratio:"], cells)]


def twins_section(folder: str, record: Record) -> list[str]:
    rows = {(row["op"], row["direction"]): row for row in record["rows"]}
    cells = []
    for name, description in TWINS.items():
        cells.append([description])
        for direction in (harness.FORWARD, harness.FORWARD_BACKWARD):
            row = rows.get((name, direction))
            if row is None:
                cells[-1] += [""] * 4
                continue
            cells[-1] += [format_ms(row["ms"][side]) for side in ("relops", "pytorch")] + [format_ratio(row["ratio"])]
            cells[-1].append(" / ".join(format_bytes(row["peak_bytes"][side]) for side in ("relops", "pytorch")))
    columns = ["detector"]
    for task in ("detection", "training"):
        columns += [f"{task}, relops:", "PyTorch:", "ratio:", "peak memory, relops / PyTorch:"]
    run = record["runs"][max(record["runs"])]
    return [run_text(folder, run, (row["rounds"] for row in record["rows"])), table(columns, cells)]


def detector_sections(results: Path) -> list[str]:
    sections = [DETECTORS, CELLS_TEXT, training_table(results / "cells", CELLS), CELLS_NOTES]
    sections += [SHAPES_TEXT, training_table(results / "shapes", SHAPES, masks=True)]
    sections += [DCN_TEXT, dcn_table(results / "dcn"), DCN_NOTES]
    for file, text, section in (
        ("speed.json", TORCHVISION_TEXT, torchvision_section),
        ("twins.json", TWINS_TEXT, twins_section),
    ):
        sections.append(text)
        for path in sorted(results.glob(f"*/detectors/{file}")):
            sections += section(path.parent.parent.name, load(path))
    return sections


# ---- The page ----


def page(results: Path = harness.RESULTS) -> str:
    """Return the Markdown text of docs/performance.md."""
    records = ops_records(results)
    rows = (row for ops in records.values() for record in ops.values() for row in record["rows"])
    sections = [INTRODUCTION]
    if all(row["device"] == "cpu" for row in rows):
        sections.append(NO_GPU)
    sections += [OVERVIEW, METHOD]
    explained: dict[str, str] = {}
    for folder, ops in records.items():
        sections += machine_sections(folder, ops, explained)
    return "\n".join(sections + detector_sections(results))


# ---- The summary for the README ----


class Selected(NamedTuple):
    """A row of the summary: the fields that identify its record, and a description of its input."""

    op: str
    shape: str
    direction: str
    description: str
    machine: str = "amd-epyc-avx512-2-cores"


SUMMARY = (
    Selected(
        "ms_deform_attn",
        "encoder 100x152..13x19 Q=S M8 D32 P4",
        harness.FORWARD,
        "encoder with 4 levels, 20,197 queries",
    ),
    Selected(
        "ms_deform_attn_fused",
        "encoder 100x152..13x19 Q=S M8 D32 P4",
        harness.FORWARD_BACKWARD,
        "encoder with 4 levels, 20,197 queries",
    ),
    Selected(
        "roi_align", "headline 2x256x200x304 K=1000 7x7", harness.FORWARD, "2 x 256 x 200 x 304, 1000 boxes, 7 x 7"
    ),
    Selected(
        "multi_scale_roi_align",
        "box head 2x256x200x304..25x38 K=1000 7x7",
        harness.FORWARD_BACKWARD,
        "pyramid of 4 levels, 1000 boxes, 7 x 7",
    ),
    Selected(
        "deform_conv2d",
        "1x256x50x76 to 256 v2",
        harness.FORWARD_BACKWARD,
        "1 x 256 x 50 x 76, 3 x 3 kernel",
        "intel-r-xeon-r-processor-amx-2-cores",
    ),
    Selected("nms", "proposals K=12000 IoU 0.7", harness.FORWARD, "12,000 proposals"),
    Selected("generalized_box_iou", "anchors 20000x100", harness.FORWARD_BACKWARD, "20,000 x 100 boxes"),
    Selected("linear_sum_assignment", "DETR 32x300x60", harness.FORWARD, "32 images, 300 queries, 60 objects"),
    Selected("relation_attention", "self N1 K1000 M16 D64 Dv64", harness.FORWARD_BACKWARD, "1000 boxes, 16 heads"),
    Selected("rank_embedding", "paper, 80 classes 80x100, 128 wide", harness.FORWARD, "80 x 100 ranks, 128 wide"),
    Selected(
        "local_relation",
        "2x256x56x56 G32 k7",
        harness.FORWARD_BACKWARD,
        "2 x 256 x 56 x 56, 7 x 7 window",
        "amd-epyc-avx2-2-cores",
    ),
)
SUMMARY_DTYPE = "float32"
# The peers in the summary, which leaves out variants of relops and the PyTorch version under torch.compile.
SUMMARY_PEERS = ("torchvision", "scipy", "shifted maps")


def summary_rows(results: Path = harness.RESULTS) -> list[tuple[Selected, Record]]:
    """Return the rows of the summary with their records.

    Raises:
        KeyError: If a row is not recorded.
    """
    found = []
    for selected in SUMMARY:
        rows = {
            (row["shape"], row["dtype"], row["direction"]): row
            for row in load(results / selected.machine / f"{selected.op}.json")["rows"]
        }
        found.append((selected, rows[selected.shape, SUMMARY_DTYPE, selected.direction]))
    return found


def summary_peer(row: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the name of the peer that the summary shows, and how many times faster relops is."""
    for name in SUMMARY_PEERS:
        if name in row["peer_ratio"]:
            return PEER_NAMES.get(name, name), row["peer_ratio"][name]
    return None


def summary(results: Path = harness.RESULTS) -> str:
    """Return a Markdown table with representative rows, and a text about the machines."""
    cells, dates = [], {}
    for selected, row in summary_rows(results):
        peer = summary_peer(row)
        cells.append(
            [
                op_name(selected.op),
                selected.description,
                selected.direction,
                format_ms(row["ms"]["relops"]["median"]),
                format_ratio(row["ratio"]),
                "" if peer is None else f"{format_ratio(peer[1])} ({peer[0]})",
            ]
        )
        dates.setdefault((MACHINES[selected.machine].description, row["run"][:10]), []).append(op_name(selected.op))
    machine, date = next(iter(dates))
    text = f"All rows are {SUMMARY_DTYPE}. Most of them were measured on {machine} on {date}."
    for (machine, date), ops in list(dates.items())[1:]:
        text += f"\nThe rows of {' and '.join(ops)} were measured on {machine} on {date}."
    columns = ["op", "input", "pass", "relops:", "faster than PyTorch:", "faster than others:"]
    return table(columns, cells) + f"\n{text}\n"
