"""Train a small LR-Net and its convolutional twin from scratch on the digits of scikit-learn.

In the twin, a 3x3 convolution replaces every local relation. The twin has fewer channels than the LR-Net, so both have
nearly the same number of parameters and multiply-adds. They see the same images in the same order and use the same
optimizer. The 1797 images of 8x8 pixels are enlarged by a factor of four and split into 1347 training and 450 test
images.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import relops

SIZE, BATCH, TEST = 32, 64, 450
BLOCKS, STEM = (1, 1), 32


def lr_net() -> nn.Module:
    return relops.models.LRNet(BLOCKS, (48, 96), 10, in_channels=1, stem_channels=STEM)


def twin() -> nn.Module:
    network = relops.models.LRNet(BLOCKS, (34, 48), 10, in_channels=1, stem_channels=STEM)
    for name, module in list(network.named_modules()):
        if isinstance(module, relops.nn.LocalRelation):
            conv = nn.Conv2d(module.channels, module.channels, 3, module.stride, 1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            network.set_submodule(name, conv)
    return network


def digits() -> tuple[Tensor, Tensor]:
    """Return the images [1797,1,32,32] and their labels [1797], shuffled."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("scikit-learn is missing: pip install -e '.[bench]'") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return images[order], torch.tensor(data.target)[order]


def multiply_adds(network: nn.Module) -> int:
    """Return the number of multiply-adds per image in the convolutions, the aggregation and the classifier."""

    def aggregation(query, key, value, prior, kernel_size, *settings, out_shape, **_):
        return 2 * kernel_size**2 * out_shape.numel()

    with FlopCounterMode(display=False, custom_mapping={torch.ops.relops.local_relation: aggregation}) as counter:
        network.eval()(torch.zeros(1, 1, SIZE, SIZE))
    return counter.get_total_flops() // 2


def train(make: Callable[[], nn.Module], epochs: int, seed: int) -> float:
    """Train a network and return its accuracy on the test images."""
    torch.manual_seed(seed)
    network = make()
    images, labels = digits()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    batches = (len(images) - TEST) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * batches)
    for epoch in range(epochs):
        network.train()
        order = TEST + torch.randperm(len(images) - TEST)
        for batch in order[: batches * BATCH].view(batches, BATCH):
            loss = F.cross_entropy(network(images[batch]), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"\r  seed {seed}, epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}", end="", flush=True)
    with torch.no_grad():
        correct = network.eval()(images[:TEST]).argmax(1) == labels[:TEST]
    return correct.double().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15, help="the number of epochs per run")
    parser.add_argument("--seeds", type=int, default=3, help="the number of seeds")
    options = parser.parse_args(argv)
    for name, make in (("LR-Net", lr_net), ("convolutional twin", twin)):
        network = make()
        parameters = sum(p.numel() for p in network.parameters())
        print(f"{name}: {parameters:,} parameters, {multiply_adds(network) / 1e6:.2f} M multiply-adds per image")
        begin = time.perf_counter()
        accuracies = [train(make, options.epochs, seed) for seed in range(options.seeds)]
        minutes = (time.perf_counter() - begin) / 60 / options.seeds
        per_seed = ", ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
        print(
            f"\r  test accuracy {100 * statistics.mean(accuracies):.2f} % (seeds: {per_seed}), {minutes:.1f} min each"
        )


if __name__ == "__main__":
    main()
