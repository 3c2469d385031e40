"""The command `python -m relops propose`."""

from __future__ import annotations

import argparse
from pathlib import Path

from relops.training._files import check_file
from relops.training._optional import require_all
from relops.training.cli.arguments import add_command, add_detector, add_loader, load, open_split
from relops.training.data import save_proposals
from relops.training.prediction import propose, proposing_model


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "propose", "write the proposals of a detector to a file, for training Fast R-CNN")
    add_detector(parser)
    add_loader(parser)
    parser.add_argument(
        "--split", choices=("train", "test"), required=True, help="split of the data set to process (required)"
    )
    parser.add_argument(
        "--train-annotations",
        metavar="FILE",
        help="annotation file of the training images of coco:DIR (default: the file that the run used or, if --data "
        "is given, the file whose name contains train)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file for the proposals (required)")
    parser.add_argument(
        "--count", type=int, default=1000, metavar="N", help="maximum number of proposals per image (default: 1000)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the proposals of a detector for all images of a split to a file."""
    require_all("pillow")
    detector = load(arguments)
    proposing_model(detector)  # raises an error for an unsuitable model before the data set is opened
    data = open_split(arguments, detector, arguments.split)
    check_file(arguments.output)
    proposals = propose(detector, data, arguments.count, arguments.batch, arguments.workers)
    own_ids = {annotation.image_id: annotation.own_id for annotation in data.annotations()}
    save_proposals(arguments.output, {own_ids[image_id]: boxes for image_id, boxes in proposals.items()})
    count = sum(map(len, proposals.values()))
    print(f"{arguments.output}: wrote {count} proposals for {len(proposals)} images")
    return 0
