"""Build a transformer layer for boxes with relops.relation_attention, and train it on a question about geometry."""

import torch
from torch import Tensor, nn

import relops

torch.manual_seed(0)


class BoxTransformerLayer(nn.Module):
    """A transformer layer whose attention depends on features and on the relative geometry of the boxes."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.geometry_weight = nn.Parameter(0.1 * torch.randn(heads, 64))  # for 64 sines and cosines of the geometry
        self.geometry_bias = nn.Parameter(torch.full((heads,), 0.1))  # positive, so that every pair has a gradient
        self.output = nn.Linear(channels, channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        """Return new features [N,K,C] from features x [N,K,C] and boxes [N,K,4] in pixels."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [N,K,M,D]
        gathered = relops.relation_attention(q, k, v, boxes, boxes, self.geometry_weight, self.geometry_bias)
        x = x + self.output(gathered.flatten(2))
        return x + self.mlp(self.norm2(x))


def examples(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes [N,K,4], marks [N,K,1], and for each box whether a marked box is near it [N,K]."""
    center, size = 200 * torch.rand(count, 20, 2), 20 + 20 * torch.rand(count, 20, 2)
    boxes = torch.cat([center - size / 2, center + size / 2], -1)
    marks = (torch.rand(count, 20, 1) < 0.2).float()
    near = torch.cdist(center, center) < 40
    return boxes, marks, (near & marks.bool().mT).any(-1)


embed, layer, head = nn.Linear(1, 64), BoxTransformerLayer(64, 8), nn.Linear(64, 1)
parameters = [*embed.parameters(), *layer.parameters(), *head.parameters()]
optimizer = torch.optim.AdamW(parameters, 3e-3)
for step in range(301):
    boxes, marks, target = examples(32)
    logits = head(layer(embed(marks), boxes))[..., 0]
    loss = nn.functional.binary_cross_entropy_with_logits(logits, target.float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        accuracy, always_no = ((logits > 0) == target).float().mean(), 1 - target.float().mean()
        print(f"step {step:3}  loss {loss.item():.3f}  accuracy {accuracy:.1%} (always no: {always_no:.1%})")
