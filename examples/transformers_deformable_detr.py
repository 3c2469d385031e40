"""Replace the deformable attention of a Hugging Face transformers model with relops, and compare outputs and time."""

import time

import torch
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

import relops

torch.manual_seed(0)
# DeformableDetrForObjectDetection.from_pretrained(...) loads a trained model, which can be changed in the same way.
backbone = ResNetConfig(
    depths=[1, 1, 1, 1], hidden_sizes=[64, 128, 256, 512], out_features=["stage2", "stage3", "stage4"]
)
config = DeformableDetrConfig(
    backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, encoder_layers=3, decoder_layers=3
)
model = DeformableDetrForObjectDetection(config).eval()
images = torch.randn(1, 3, 480, 640)


def run() -> tuple[torch.Tensor, float]:
    """Return the predicted boxes and the seconds that they took."""
    with torch.inference_mode():
        start = time.perf_counter()
        return model(images).pred_boxes, time.perf_counter() - start


run()  # the first call allocates memory
before, seconds_before = run()

replaced = 0
for module in model.modules():
    if type(module).__name__ == "MultiScaleDeformableAttention":
        module.__class__ = relops.nn.MultiScaleDeformableAttention
        replaced += 1

run()
after, seconds_after = run()

torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
print(
    f"{replaced} layers replaced, equal boxes; transformers {seconds_before:.2f} s, with relops {seconds_after:.2f} s"
)
