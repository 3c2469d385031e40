"""Train a detector on your own images, and draw what it finds.

python examples/train_and_draw.py coco:DIR IMAGES    trains on a COCO data set, and draws what it finds in IMAGES
python examples/train_and_draw.py                    trains for a minute on images that relops draws itself
"""

import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

from relops import models
from relops.__main__ import main
from relops.training.data import open_data
from relops.training.detector import load_detector

if len(sys.argv) == 3:
    data, images = sys.argv[1:]
    run = "runs/own_data"  # choose another folder for another data set
    # This backbone is trained from scratch. ["--backbone-weights", FILE] would start from the weights of a classifier.
    options = ["--backbone", "resnet18-gn", "--min-size", "480", "--max-size", "800"]
    status = main(["train", "--data", data, "--output", run, *options])
    sys.exit(status or main(["predict", run, images, "--output", "drawn"]))

# This calls the command `python -m relops train` from Python. After a minute, the detector finds some of the shapes.
RUN = Path("runs/example")
if status := main(["train", "--data", "shapes:200", "--iterations", "200", "--output", str(RUN), "--workers", "0"]):
    sys.exit(status)

# load_detector loads the trained detector from the folder of the run.
detector = load_detector(RUN, torch.device("cpu"))
sample = open_data("shapes:200", "test")[0]
image = torch.from_numpy(sample.image).permute(2, 0, 1)  # [3,H,W], uint8
objects = models.detect(detector.model, [image / 255], detector.min_size, detector.max_size)[0]
keep = objects["scores"] > 0.3
names = [detector.classes[label] for label in objects["labels"][keep].tolist()]
drawn = draw_bounding_boxes(image, objects["boxes"][keep], names, colors="red")
to_pil_image(drawn).save("shapes.png")
print(f"found {names}, drawn in shapes.png; the run is in {RUN}")
