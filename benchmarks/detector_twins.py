"""Benchmarks of detectors against the same detectors in pure PyTorch: `python -m benchmarks.detector_twins [--quick]`.

The twin of a detector is the same module with the same weights, but the usual PyTorch implementation replaces every
relops op that the module calls (`TWINS`):

- deformable attention: grid_sample
- RoI Align: bilinear samples that are gathered level by level
- suppression: IoU matrices of blocks of boxes
- relation attention: scaled_dot_product_attention, with the geometric bias stored in memory
- local relation: a sum of shifted maps, which is faster than unfolding
- linear assignment: SciPy on the CPU, one problem at a time

The detector and its twin share all other code, so a ratio compares whole detectors.

Each detector has two rows. The first is detection in one image. The second computes the losses of a batch of four
images with 13 objects each, and their gradients. DETR has only the second row, because its detection uses no op of
relops. Before a row is timed, both sides must return the same detections, or the same losses and gradients for the same
samples, and the twin must not run any op of relops. `harness.peak_bytes` then measures the peak memory of one pass of
each side, not counting the memory that was in use before. Each round runs both sides, in alternating order. A ratio is
the median of the ratios within the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import relops
from benchmarks import detectors, harness
from benchmarks.bench_linear_sum_assignment import scipy_loop
from benchmarks.bench_local_relation import shifted
from relops import reference
from relops.models import Detections, Targets
from relops.models.detectors.two_stage import TwoStageDetector

TWINS: dict[str, Callable[..., Any]] = {name: getattr(reference, name) for name in reference.__all__}
TWINS |= {"linear_sum_assignment": scipy_loop, "local_relation": shifted}

CLASSES = 80  # in the detection rows
DETECTION_SIZES = {"cpu": (480, 640), "cuda": (800, 1066)}  # height and width, smaller on the CPU to save time
TRAINING_SIZE, IMAGES, OBJECTS = (240, 320), 4, 13
QUICK_SIZE = (96, 128)
LOGIT_STD = 1.5  # standard deviation of the class logits in the detection rows of two-stage detectors

# The largest allowed differences between the two sides, several times the rounding error.
LOSS_BOUND, BOX_BOUND = 1e-3, 0.1  # relative to the loss; in pixels
# The fraction of detections that may have no counterpart, because rounding decides which of the lowest scores are kept.
UNMATCHED = 0.02


class Case(NamedTuple):
    """The options of one detector.

    Attributes:
        detection: The options of the model in the detection row, or None if the detector has no such row. The model has
            the published size, with a ResNet-50 or LR-Net-26 as its backbone.
        training: The options of the model in the training row. The model is about as large as the detectors that
            train_cells.sh trains on a CPU.
        gradient_bound: The largest allowed relative RMS difference between the gradients of the two sides.
    """

    detection: dict[str, Any] | None
    training: dict[str, Any]
    gradient_bound: float = 1e-2


_RESNET, _SMALL = {"backbone": "resnet50-frozen"}, {"backbone": "resnet18-gn-32", "channels": 64, "hidden": 256}
_SMALL_FPN = detectors.SMALL | {"sizes": detectors.SIZES}
_SMALL_DETR = _SMALL | {"queries": 60, "encoder_layers": 3, "decoder_layers": 3, "dropout": 0.0}
_TWO_STAGE = {"refine": True, "two_stage": True}
CASES = {
    "relation_networks_fpn": Case(_RESNET, _SMALL_FPN),
    "sparse_rcnn": Case(_RESNET, _SMALL | {"proposals": 64, "init": "grid"}),
    "deformable_detr": Case(_RESNET | _TWO_STAGE, _SMALL_DETR | _TWO_STAGE),
    "detr": Case(None, _SMALL_DETR | {"stride": 16}),
    "faster_rcnn": Case(
        {"backbone": "lr_net26", "hidden": 1024, "roi": "align"},
        {
            "backbone": "lr_net26-32",
            "channels": 128,
            "hidden": 256,
            "roi": "align",
            "dropout": 0.0,
            "stride": 8,
            "scales": (2, 5, 12),
            "min_size": 4,
        },
        gradient_bound=0.1,  # batch normalization amplifies rounding, but in float64 the error is 1e-15
    ),
    "faster_rcnn_fpn": Case(_RESNET, _SMALL_FPN),
}


# ---- The twin ----


@contextlib.contextmanager
def twins() -> Iterator[None]:
    """Make the modules of relops.models and relops.nn call the twins of the ops while the context is active."""
    replacements = {id(getattr(relops, name)): twin for name, twin in TWINS.items()}
    with contextlib.ExitStack() as stack:
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith(("relops.models.", "relops.nn.")):
                for name, value in list(vars(module).items()):
                    if id(value) in replacements:
                        stack.enter_context(mock.patch.object(module, name, replacements[id(value)]))
        yield


class Calls(TorchDispatchMode):
    """A dispatch mode that counts, by name, the relops ops that run while it is active, including backward ops."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "relops":
            self.counts[func.name().removeprefix("relops::")] += 1
        return func(*args, **(kwargs or {}))


def verify(name: str, run: Callable[[], Any], check: Callable[[Any, Any], float]) -> tuple[float, dict[str, int]]:
    """Return the difference that `check` computes between the two sides, and how often the detector ran each op.

    Raises:
        harness.VerificationError: If the difference is too large, if the detector ran no op of relops, or if its twin
            ran any.
    """
    with Calls() as ours:
        found = run()
    with twins(), Calls() as theirs:
        expected = run()
    if not ours.counts or theirs.counts:
        raise harness.VerificationError(
            f"{name}: the detector must run relops ops and its twin must run none; the detector ran {dict(ours.counts)}"
            f" and its twin ran {dict(theirs.counts)}"
        )
    try:
        return check(found, expected), dict(ours.counts)
    except harness.VerificationError as error:
        raise harness.VerificationError(f"{name}: {error}") from None


# ---- Rows ----


def diversify_outputs(model: nn.Module) -> nn.Module:
    """Randomize weights so that the outputs of the model differ from one another, and set the model to evaluation mode.

    In a newly initialized model, nearly all scores are equal, and deformable attention samples at the centers of
    pixels, where its gradients are discontinuous.
    """
    detectors.diversify_detections(model)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("weight") and ("class_embed" in name or "class_logits" in name):
                x.normal_(0, 0.1)
            elif name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                x.normal_(0, 0.05)
            elif name.endswith("weight") and ("bboxes_delta" in name or ("bbox_embed" in name and "layers.2" in name)):
                x.normal_(0, 0.02)  # the boxes move, but stay in the image
            elif name.endswith("bn3.weight"):  # a buffer if it is frozen; diversify_detections skips buffers
                x.fill_(0.3)
    return model


def smooth_images(count: int, size: tuple[int, int], device: str) -> list[Tensor]:
    """Return images [3,H,W] of random blobs that are about 20 pixels wide."""
    coarse = torch.rand(count, 3, size[0] // 20, size[1] // 20)
    images = nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return list(images.to(device))


def detection(
    name: str, options: dict[str, Any], size: tuple[int, int], device: str
) -> tuple[Callable[[], Detections], tuple[int, ...]]:
    """Return a function that runs detection, and the shape of the batch of images."""
    torch.manual_seed(0)
    model = diversify_outputs(relops.models.build(name, CLASSES, **options)).to(device)
    images, sizes, _ = relops.models.batch_images(smooth_images(1, size, device), min(size), max(size))
    # Compute the running statistics from the images, because with the initial ones the maps would be nearly zero.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.backbone.train()(images)
    model.eval()
    # Scale the class logits to about their spread after training, so that each class has boxes to suppress.
    if isinstance(model, TwoStageDetector):
        classifier, logits = model.roi_heads.box_predictor.cls_score, []
        with torch.no_grad(), classifier.register_forward_hook(lambda module, inputs, output: logits.append(output)):
            model(images, sizes)
            classifier.weight *= LOGIT_STD / logits[0].std()

    @torch.no_grad()
    def run() -> Detections:
        return model(images, sizes)

    return run, tuple(images.shape)


def training(
    name: str, options: dict[str, Any], size: tuple[int, int], device: str
) -> tuple[Callable[[], tuple[dict[str, Tensor], Sequence[Tensor]]], tuple[int, ...]]:
    """Return a function that computes losses and gradients of the same samples in every call, and the batch shape."""
    torch.manual_seed(0)
    model = diversify_outputs(relops.models.build(name, detectors.CLASSES, **options)).to(device).train()
    images, sizes, _ = relops.models.batch_images(smooth_images(IMAGES, size, device), min(size), max(size))
    objects = [detectors.random_objects(OBJECTS, *size) for _ in range(IMAGES)]
    targets = Targets(*(torch.stack(x).to(device) for x in zip(*objects)))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        torch.manual_seed(0)
        losses = model(images, sizes, targets)
        return {k: x.detach() for k, x in losses.items()}, torch.autograd.grad(sum(losses.values()), parameters)

    return run, tuple(images.shape)


def distance_of_detections(found: Detections, expected: Detections) -> float:
    """Return the largest difference in pixels between a detection and its counterpart with the same label."""
    ours, theirs = (x.labels[0] >= 0 for x in (found, expected))
    if not 20 <= ours.sum() == theirs.sum():
        raise harness.VerificationError(f"relops returns {ours.sum()} detections, but the twin returns {theirs.sum()}")
    distance = (found.boxes[0, ours] - expected.boxes[0, theirs, None]).abs().amax(-1)
    distance += 1000 * (found.labels[0, ours] != expected.labels[0, theirs, None])
    nearest = distance.amin(1)
    matched = nearest <= BOX_BOUND
    if matched.float().mean() < 1 - UNMATCHED:
        raise harness.VerificationError(f"{(~matched).sum()} of {len(matched)} detections differ")
    return nearest[matched].max().item()


def distance_of_gradients(
    bound: float, found: tuple[dict, Sequence[Tensor]], expected: tuple[dict, Sequence[Tensor]]
) -> float:
    """Return the relative RMS difference over all gradients.

    Raises:
        harness.VerificationError: If the losses differ, or if the difference exceeds `bound`.
    """
    for loss, value in expected[0].items():
        if not (found[0][loss] - value).abs() <= LOSS_BOUND * value.abs():
            raise harness.VerificationError(f"loss {loss} is {found[0][loss]:.6g}, but {value:.6g} in the twin")
    gradients = ([torch.cat([x.flatten() for x in side[1]])] for side in (found, expected))
    error = harness.relative_rms_error(*gradients)
    if not error <= bound:
        raise harness.VerificationError(
            f"the relative RMS error of the gradients is {error:.3g}, which exceeds the bound {bound}"
        )
    return error


# ---- Measurement ----


def measure(name: str, direction: str, device: str, rounds: int, quick: bool) -> dict[str, Any]:
    """Measure one row and return it in the form that `harness.Record` stores."""
    case = CASES[name]
    options = case.training if quick or direction == harness.FORWARD_BACKWARD else case.detection
    if direction == harness.FORWARD:
        run, shape = detection(name, options, QUICK_SIZE if quick else DETECTION_SIZES[device], device)
        check = distance_of_detections
    else:
        run, shape = training(name, options, QUICK_SIZE if quick else TRAINING_SIZE, device)
        check = functools.partial(distance_of_gradients, case.gradient_bound)
    error, calls = verify(f"{name}, {direction}", run, check)

    sides = {"relops": contextlib.nullcontext, "pytorch": twins}
    peaks, times = {}, {side: [] for side in sides}
    for side, context in sides.items():
        with context():
            peaks[side] = harness.peak_bytes(run, device)
    for i in range(rounds):
        for side in reversed(sides) if i % 2 else sides:
            with sides[side]():
                harness.synchronize(device)
                times[side].append(harness.time_once(run, device, cold=False))
    return {
        "op": name,
        "shape": "x".join(map(str, shape)),
        "dtype": "float32",
        "device": device,
        "direction": direction,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "rounds": rounds,
        "ms": {side: 1e3 * statistics.median(x) for side, x in times.items()},
        "ratio": statistics.median(b / a for a, b in zip(times["relops"], times["pytorch"])),
        "peak_bytes": peaks,
        "error": error,
        "calls": calls,
        "options": options,
    }


HEADER = (
    f"{'detector':22} {'images':13} {'pass':7} {'relops':>10} {'PyTorch':>10} {'ratio':>7} {'peak, relops':>13}"
    f" {'PyTorch':>8} {'ratio':>7} {'error':>8}"
)


def line(row: dict[str, Any]) -> str:
    ours, theirs = row["peak_bytes"]["relops"], row["peak_bytes"]["pytorch"]
    return (
        f"{row['op']:22} {row['shape']:13} {harness.SHORT_DIRECTIONS[row['direction']]:7}"
        f" {harness.format_ms(row['ms']['relops']):>7} ms {harness.format_ms(row['ms']['pytorch']):>7} ms"
        f" {harness.format_ratio(row['ratio']):>7} {harness.format_bytes(ours):>13} {harness.format_bytes(theirs):>8}"
        f" {harness.format_ratio(theirs / max(ours, 1)):>7} {row['error']:>8.1e}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.detector_twins", description=__doc__.splitlines()[0].split(":")[0]
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="the device to run on",
    )
    parser.add_argument("--only", choices=list(CASES), help="run only this detector")
    parser.add_argument("--rounds", type=int, default=5, help="the number of rounds")
    parser.add_argument("--quick", action="store_true", help="run small models for one round, and record nothing")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("scipy") is None:
        parser.error("the twins need scipy to solve assignment problems: pip install scipy")
    record = None
    if not options.quick:
        record = harness.Record(
            harness.RESULTS, options.device, "detectors/twins", harness.describe_run(options.device)
        )
    failed = False
    print(HEADER, "-" * len(HEADER), sep="\n")
    for name in [options.only] if options.only else CASES:
        for direction in (harness.FORWARD, harness.FORWARD_BACKWARD):
            if direction == harness.FORWARD and CASES[name].detection is None:
                continue
            try:
                row = measure(name, direction, options.device, 1 if options.quick else options.rounds, options.quick)
            except harness.VerificationError as error:  # a failed row must not stop the run
                failed = True
                print(f"FAILED: {error}", file=sys.stderr)
                continue
            finally:
                harness.release_memory(options.device)
            print(line(row), flush=True)
            if record is not None:
                record.add(row)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
