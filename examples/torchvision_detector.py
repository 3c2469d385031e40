"""Replace the operators of a torchvision detector with those of relops, and compare detections and time."""

import time

import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn, roi_heads, rpn

import relops

torch.manual_seed(0)
# weights="DEFAULT" loads a trained model. Random weights need no download, and detection takes the same time.
model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, box_score_thresh=0.0).eval()
images = [torch.rand(3, 480, 640)]


def run() -> tuple[dict[str, torch.Tensor], float]:
    """Return the detections in the first image and the seconds that they took."""
    with torch.inference_mode():
        start = time.perf_counter()
        return model(images)[0], time.perf_counter() - start


run()  # the first call allocates memory
before, seconds_before = run()

pool = model.roi_heads.box_roi_pool  # relops.nn.MultiScaleRoIAlign takes the arguments of torchvision's module
model.roi_heads.box_roi_pool = relops.nn.MultiScaleRoIAlign(pool.featmap_names, pool.output_size, pool.sampling_ratio)
rpn.box_ops.batched_nms = roi_heads.box_ops.batched_nms = relops.batched_nms  # both stages look it up here

run()
after, seconds_after = run()

for name in ("boxes", "scores"):
    torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-3)
print(f"{len(after['boxes'])} equal detections; torchvision {seconds_before:.2f} s, with relops {seconds_after:.2f} s")
