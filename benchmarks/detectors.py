"""Benchmarks of whole detectors against torchvision's with the same weights: `python -m benchmarks.detectors`.

There are three pairs of detectors. The first runs a training iteration of a small Faster R-CNN on a feature pyramid
(four images of 320x240, with preprocessing and AdamW). The other two run detection in one image of 800x1066, with
fasterrcnn_resnet50_fpn and with maskrcnn_resnet50_fpn. Before a pair is timed, both detectors must return the same
losses for the same samples, or the same detections. Each round runs both detectors, in alternating order. A ratio is
the median of the ratios within the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

import relops
from benchmarks import harness
from relops.models import Targets

SMALL = {"backbone": "resnet18-gn-32", "channels": 64, "hidden": 256, "num_samples": 128}
SIZES = (16, 32, 64, 128, 256)
CLASSES = 3


def vision() -> object:
    try:
        from torchvision.models import detection
    except ImportError as error:
        raise SystemExit("benchmarks.detectors needs torchvision: pip install torchvision") from error
    return detection


class Body(nn.Module):
    """An adapter that turns the feature pyramid of relops into a backbone for torchvision's detectors.

    Both detectors therefore run the same convolutions.
    """

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = backbone.body, backbone.fpn, channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.fpn(self.body.stage_maps(x))
        return OrderedDict(zip(("0", "1", "2", "3", "pool"), maps))


def small_pair() -> tuple[nn.Module, nn.Module]:
    detection = vision()
    ours = relops.models.faster_rcnn_fpn(CLASSES, sizes=SIZES, **SMALL)
    theirs = detection.FasterRCNN(
        Body(relops.models.faster_rcnn_fpn(CLASSES, sizes=SIZES, **SMALL).backbone, SMALL["channels"]),
        rpn_anchor_generator=detection.rpn.AnchorGenerator(tuple((s,) for s in SIZES), ((0.5, 1.0, 2.0),) * 5),
        box_head=detection.faster_rcnn.TwoMLPHead(SMALL["channels"] * 49, SMALL["hidden"]),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(SMALL["hidden"], CLASSES + 1),
        box_batch_size_per_image=SMALL["num_samples"],
        min_size=240,
        max_size=320,
    )
    relops.models.load_torchvision(ours, theirs.state_dict())
    return ours, theirs


def diversify_detections(model: nn.Module) -> nn.Module:
    """Randomize weights so that the model returns a hundred detections of many classes, and set it to evaluation mode.

    In a newly initialized model, all detections have the same score.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cls_score" in name or "cls_logits" in name:
                parameter.normal_(0, 0.3)
            elif "bbox_pred" in name:
                parameter.normal_(0, 0.02)
            elif name.endswith("bn3.weight"):
                parameter.fill_(0.3)
    return model.eval()


def random_objects(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return boxes [count,4] with sides of 15 to 60 pixels, like the blood cells of the training runs, and labels."""
    size = 15 + 45 * torch.rand(count, 2)
    corner = torch.rand(count, 2) * (torch.tensor([width, height]) - size)
    return torch.cat([corner, corner + size], 1), torch.randint(CLASSES, (count,))


def training_steps(device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    torch.manual_seed(0)
    ours, theirs = (x.to(device).train() for x in small_pair())
    images = [torch.rand(3, 240, 320, device=device) for _ in range(4)]
    objects = [random_objects(13, 240, 320) for _ in images]
    boxes, labels = (torch.stack(x).to(device) for x in zip(*objects))
    targets = [{"boxes": b, "labels": x + 1} for b, x in zip(boxes, labels)]
    ours_optimizer, theirs_optimizer = (torch.optim.AdamW(m.parameters(), 1e-4) for m in (ours, theirs))

    def our_losses() -> dict[str, Tensor]:
        batch, sizes, _ = relops.models.batch_images(images, 240, 320)
        return ours(batch, sizes, Targets(boxes, labels))

    def step(losses: Callable[[], dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        sum(losses().values()).backward()
        optimizer.step()

    # Let the samplers select all candidates, so that the losses are not random.
    samplers = theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler
    before = [s.batch_size_per_image for s in samplers]
    for module, sampler in zip((ours.rpn, ours.roi_heads), samplers):
        module.num_samples = sampler.batch_size_per_image = 100000
    with torch.no_grad():
        found, expected = sum(our_losses().values()).item(), sum(theirs(images, targets).values()).item()
    if abs(found - expected) > 1e-3 * expected:
        raise harness.VerificationError(f"the losses differ: relops has {found}, torchvision has {expected}")
    for module, sampler, count in zip((ours.rpn, ours.roi_heads), samplers, before):
        module.num_samples = sampler.batch_size_per_image = count
    return lambda: step(our_losses, ours_optimizer), lambda: step(lambda: theirs(images, targets), theirs_optimizer)


def detections(name: str, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    torch.manual_seed(0)
    theirs = getattr(vision(), f"{name}_resnet50_fpn")(weights=None, weights_backbone=None)
    theirs = diversify_detections(theirs).to(device)
    ours = (relops.models.faster_rcnn_fpn if name == "fasterrcnn" else relops.models.mask_rcnn)(90)
    relops.models.load_torchvision(ours, theirs.state_dict())
    ours.to(device).eval()
    coarse = torch.rand(1, 3, 25, 33, device=device)
    image = nn.functional.interpolate(coarse, size=(480, 640), mode="bicubic")[0].clamp(0, 1)

    @torch.no_grad()
    def run_theirs() -> dict[str, Tensor]:
        return theirs([image])[0]

    def run_ours() -> dict[str, Tensor]:
        return relops.models.detect(ours, [image])[0]

    found, expected = run_ours(), run_theirs()
    same = len(found["labels"]) == len(expected["labels"]) > 50
    distance = (found["boxes"][None] - expected["boxes"][:, None]).abs().amax(2)
    distance += 1000 * (found["labels"][None] != expected["labels"][:, None] - 1)
    if not same or distance.amin(1).max() > 0.1:
        raise harness.VerificationError(f"{name}: the detections differ by up to {distance.amin(1).max():.3f} pixels")
    return run_ours, run_theirs


def measure(ours: Callable[[], object], theirs: Callable[[], object], device: str, rounds: int) -> dict[str, float]:
    times: list[tuple[float, float]] = []
    for i in range(rounds + 1):
        seconds = {}
        for run in (ours, theirs) if i % 2 else (theirs, ours):
            harness.synchronize(device)
            start = time.perf_counter()
            run()
            harness.synchronize(device)
            seconds[run] = time.perf_counter() - start
        if i > 0:  # the first round warms up
            times.append((seconds[ours], seconds[theirs]))
    return {
        "relops_ms": 1000 * statistics.median(a for a, _ in times),
        "torchvision_ms": 1000 * statistics.median(b for _, b in times),
        "ratio": statistics.median(b / a for a, b in times),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="the device to run on")
    parser.add_argument("--rounds", type=int, default=9, help="the number of rounds")
    options = parser.parse_args()
    rows = {
        "Faster R-CNN, ResNet-18-GN/2 FPN, 4 x 320x240, training iteration": lambda: training_steps(options.device),
        "fasterrcnn_resnet50_fpn, 1 x 1066x800, detection": lambda: detections("fasterrcnn", options.device),
        "maskrcnn_resnet50_fpn, 1 x 1066x800, detection": lambda: detections("maskrcnn", options.device),
    }
    results = {}
    print(f"{'':68}{'relops':>10}{'torchvision':>13}{'ratio':>8}")
    for name, make in rows.items():
        results[name] = measure(*make(), options.device, options.rounds)
        ours, theirs, ratio = (results[name][x] for x in ("relops_ms", "torchvision_ms", "ratio"))
        print(f"{name:68}{ours:>7.0f} ms{theirs:>10.0f} ms{ratio:>7.2f}x")
    import torchvision

    folder = harness.RESULTS / harness.machine_name(options.device) / "detectors"
    folder.mkdir(parents=True, exist_ok=True)
    record = harness.describe_run(options.device) | {"torchvision": torchvision.__version__, "rows": results}
    (folder / "speed.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
