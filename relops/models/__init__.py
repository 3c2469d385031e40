"""Networks composed of the ops."""

from relops.models.lr_net import LRNet, lr_net26, lr_net50

__all__ = ["LRNet", "lr_net26", "lr_net50"]
