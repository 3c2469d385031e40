"""The command `python -m relops eval`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from relops.training._files import check_file, write_json
from relops.training._optional import require_all
from relops.training.cli.arguments import add_command, add_detector, add_loader, load, open_split
from relops.training.data import with_proposals
from relops.training.distributed import World
from relops.training.errors import UsageError
from relops.training.evaluation import evaluate
from relops.training.log import without_nan


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "eval", "compute the average precision of a trained detector")
    add_detector(parser)
    add_loader(parser)
    parser.add_argument(
        "--proposals",
        metavar="FILE",
        help="file with proposals for the test images; only fast_rcnn needs this file (default: none)",
    )
    parser.add_argument(
        "--voc", action="store_true", help="also compute the average precision of Pascal VOC (default: no)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON file for the metrics (default: the metrics are only printed)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate a detector, print the metrics, and write them to a file if one is given."""
    require_all("pillow", "faster-coco-eval")
    detector = load(arguments)
    data = open_split(arguments, detector, "test", with_masks=detector.model.uses_masks)
    if detector.model.uses_proposals:
        if arguments.proposals is None:
            raise UsageError(f"model {detector.name} needs proposals: --proposals must name a file")
        data = with_proposals(data, arguments.proposals)
    if arguments.output is not None:
        check_file(arguments.output)
    world = World(0, 1, detector.device)
    sizes = detector.min_size, detector.max_size
    evaluator = evaluate(detector.model, data, arguments.batch, *sizes, world, arguments.workers)
    metrics = evaluator.summarize()
    if arguments.voc:
        metrics |= {f"VOC {name}": value for name, value in evaluator.voc().items()}
    if arguments.output is not None:
        write_json(arguments.output, without_nan(metrics))
    for name, value in metrics.items():
        print(f"{name:32}{'no objects' if math.isnan(value) else f'{value:.4f}'}")
    return 0
