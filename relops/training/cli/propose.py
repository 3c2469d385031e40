"""python -m relops propose"""

from __future__ import annotations

import argparse
from pathlib import Path

from relops.training._files import check_file
from relops.training._optional import require_all
from relops.training.cli.arguments import add_detector, add_loader, load, open_split
from relops.training.data import save_proposals
from relops.training.prediction import propose, proposing_model


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser("propose", help="write a detector's proposals, to train Fast R-CNN on")
    add_detector(parser)
    add_loader(parser)
    parser.add_argument("--split", choices=("train", "test"), required=True)
    parser.add_argument("--train-annotations", metavar="FILE", help="to train on, of coco:DIR (that of the run)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--count", type=int, default=1000, help="of an image, at most (1000)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the proposals of a detector for all images of a split."""
    require_all("pillow")
    detector = load(arguments)
    proposing_model(detector)  # an error comes before the data are opened
    data = open_split(arguments, detector, arguments.split)
    check_file(arguments.output)
    proposals = propose(detector, data, arguments.count, arguments.batch, arguments.workers)
    own_ids = {annotation.image_id: annotation.own_id for annotation in data.annotations()}
    save_proposals(arguments.output, {own_ids[image_id]: boxes for image_id, boxes in proposals.items()})
    print(f"{sum(map(len, proposals.values()))} proposals of {len(proposals)} images in {arguments.output}")
    return 0
