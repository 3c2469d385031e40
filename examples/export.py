"""Export a detector with torch.export, save it, load it, and run it on batches of other sizes."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import relops  # registers the ops, so a process that loads the file must import it too

torch.manual_seed(0)
model = relops.models.deformable_detr(num_classes=3, backbone="resnet18", encoder_layers=1, decoder_layers=2).eval()
images, sizes = torch.randn(2, 3, 128, 160), torch.tensor([[128.0, 160.0], [96.0, 160.0]])

# The batch size is dynamic. The height and width are fixed to those of the example input.
batch = torch.export.Dim("batch", min=1, max=64)
program = torch.export.export(model, (images, sizes), dynamic_shapes=({0: batch}, {0: batch}))

with TemporaryDirectory() as folder:
    file = Path(folder) / "detector.pt2"
    torch.export.save(program, file)
    print(f"{file.stat().st_size / 1e6:.0f} MB written")
    loaded = torch.export.load(file).module()

for count in (1, 2, 5):
    images, sizes = torch.randn(count, 3, 128, 160), torch.tensor([[128.0, 160.0]]).repeat(count, 1)
    with torch.inference_mode():
        expected, actual = model(images, sizes), loaded(images, sizes)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.boxes, expected.boxes, rtol=1e-3, atol=1e-2)
    print(f"batch of {count}: boxes of shape {tuple(actual.boxes.shape)} and their scores match those of the model")
