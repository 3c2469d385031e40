"""The object relation module."""

from __future__ import annotations

from torch import Tensor, nn

from relops._checks import check_choice, check_features, check_mask, check_shape
from relops.ops.relation_attention import GEOMETRIES, relation_attention


class ObjectRelation(nn.Module):
    """The object relation module (Relation Networks for Object Detection, https://arxiv.org/abs/1711.11575).

    The module computes M relation features of each object, concatenates them and adds them to the feature of the
    object. Each relation feature is a weighted mean of the features of all objects, projected to C / M channels. The
    weights depend on appearance and relative geometry (see `relops.relation_attention`). The kernel computes the
    geometric terms of each pair of boxes on the fly and stores nothing per pair. Several modules that process the same
    boxes therefore need no shared embedding of the pairs, unlike in the released code.

    The parameters of the released code can be used with `geometry="official"`. The parameters of module i of the
    released code have these names in relops::

        query_i_weight, query_i_bias                        query.weight [M*D,C], query.bias [M*D]
        key_i_weight, key_i_bias                            key.weight [M*D,C], key.bias [M*D]
        linear_out_i_weight.flatten(1), linear_out_i_bias   value.weight [C,C], value.bias [C]
        pair_pos_fc1_i_weight, pair_pos_fc1_i_bias          geometry.weight [M,64], geometry.bias [M]

    In the released code, the features are averaged first, and linear_out, a grouped 1x1 convolution with a weight
    [C,C,1,1], projects the M * C channels of the means. In relops, `value` projects the features before they are
    averaged. The results are equal, because the mean of projected features is the projected mean, but averaging takes M
    times less work. Head m uses the same rows of the weight in both layouts, so the weight of linear_out needs only to
    be flattened to become the weight of `value`.

    With Adam, train `query` and `key` with a tenth of the learning rate of the other parameters. The attention weights
    are exponentials of query-key products, and the first steps of Adam are as large as the initial parameters of these
    two layers. With the full learning rate, a few objects could permanently get the largest weights regardless of
    geometry.

    Args:
        channels: Width C of the features; must be divisible by `heads`.
        heads: Number M of relations.
        head_dim: Width D of the queries and keys of each relation.
        geometry: Normalization of the distance between two boxes. "paper" divides the distance by the size of the key's
            box, and "official" by the size of the query's box, as in the released code.

    Raises:
        ValueError: If `heads` does not divide `channels`, or `geometry` is unknown.

    Example:
        The detection head of the paper has one relation module after each of its two fully connected layers. Both
        modules process the same boxes:

        >>> import torch, relops
        >>> fc1, fc2 = torch.nn.Linear(16 * 7 * 7, 32), torch.nn.Linear(32, 32)
        >>> relation1 = relops.nn.ObjectRelation(channels=32, heads=4, head_dim=8)
        >>> relation2 = relops.nn.ObjectRelation(channels=32, heads=4, head_dim=8)
        >>> regions, corner = torch.randn(5, 16, 7, 7), 100 * torch.rand(5, 2)
        >>> boxes = torch.cat([corner, corner + 50], -1)
        >>> x = relation1(fc1(regions.flatten(1)), boxes).relu()
        >>> x = relation2(fc2(x), boxes).relu()
        >>> x.shape
        torch.Size([5, 32])
    """

    def __init__(self, channels: int = 1024, heads: int = 16, head_dim: int = 64, geometry: str = "paper") -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"relops.nn.ObjectRelation: channels must be divisible by heads, got {channels}, {heads}")
        check_choice("nn.ObjectRelation", "geometry", geometry, GEOMETRIES)
        self.channels, self.heads, self.head_dim, self.dialect = channels, heads, head_dim, geometry
        self.query = nn.Linear(channels, heads * head_dim)
        self.key = nn.Linear(channels, heads * head_dim)
        self.value = nn.Linear(channels, channels)
        self.geometry = nn.Linear(64, heads)  # the kernel uses its parameters; the layer is never called
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the parameters as the released code does, except that the bias of `geometry` is 0.1.

        With this bias, the geometric weight of every pair of objects is initially positive. In the released code, a
        ReLU initially sets the weights of half of the pairs to 0, and a head in which the duplicates of an object have
        no weight can hardly learn to attend to them.
        """
        for linear in (self.query, self.key, self.value, self.geometry):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.geometry.bias, 0.1)

    def forward(self, features: Tensor, boxes: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Add the relation features of each object to the feature of the object.

        Args:
            features: Features [N,K,C] of K objects of N images, or [K,C] for one image, of dtype float64, float32,
                float16 or bfloat16.
            boxes: Boxes [N,K,4] or [K,4] of the objects as x1, y1, x2, y2 in pixels of the image. With 16-bit features,
                use float32 boxes. Autocast does not round boxes to 16 bits.
            key_mask: Bool mask [N,K] or [K], True for objects to which no object attends. Use it for padding, and for
                ground-truth boxes that are appended to the proposals in training, as in the released code. If None, no
                object is masked.

        Returns:
            A tensor [N,K,C] or [K,C]. If all objects of an image are masked, the features of the image are returned
            unchanged.

        Gradients:
            Gradients flow to `features` and all parameters, and to `boxes` if they require them.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or device.
        """
        self._check(features, boxes, key_mask)
        if features.dim() == 2:
            return self(features[None], boxes[None], None if key_mask is None else key_mask[None])[0]
        query, key, value = self.query(features), self.key(features), self.value(features)
        return features + self.relate(query, key, value, boxes, key_mask)

    def relate(self, query: Tensor, key: Tensor, value: Tensor, boxes: Tensor, key_mask: Tensor | None) -> Tensor:
        """Compute the relation features [N,K,C] that `forward` adds to the features.

        Args:
            query: Projected features [N,K,M*D].
            key: Projected features [N,K,M*D].
            value: Projected features [N,K,C].
            boxes: Boxes [N,K,4] of the objects.
            key_mask: Bool mask [N,K], True for objects to which no object attends; or None.
        """
        query, key, value = (x.unflatten(-1, (self.heads, -1)) for x in (query, key, value))
        weight, bias = self.geometry.weight, self.geometry.bias
        relation = relation_attention(
            query, key, value, boxes, boxes, weight, bias, key_mask=key_mask, geometry=self.dialect
        )
        return relation.flatten(-2)

    def _check(self, features: Tensor, boxes: Tensor, key_mask: Tensor | None) -> None:
        name = "nn.ObjectRelation"
        check_features(name, "features", features)
        if features.dim() not in (2, 3) or features.shape[-1] != self.channels:
            raise ValueError(
                f"relops.{name}: features must be [N,K,C] or [K,C] with C = {self.channels}, got shape "
                f"{list(features.shape)}"
            )
        batch = "" if features.dim() == 2 else "N,"
        check_features(name, "boxes", boxes)
        check_shape(name, "boxes", boxes, f"[{batch}K,4]", *features.shape[:-1], 4)
        if key_mask is not None:
            check_mask(name, "key_mask", key_mask, f"[{batch}K]", *features.shape[:-1])

    def extra_repr(self) -> str:
        return f'channels={self.channels}, heads={self.heads}, head_dim={self.head_dim}, geometry="{self.dialect}"'
