"""The object relation module."""

from __future__ import annotations

from torch import Tensor, nn

from relops._checks import check_choice, check_features, check_mask, check_shape
from relops.ops.relation_attention import GEOMETRIES, relation_attention


class ObjectRelation(nn.Module):
    """What all objects tell each, added to its feature (Hu et al., Relation Networks for Object Detection, 2018).

    To the feature of an object, M relation features are added side by side. Each is a weighted mean over the objects of
    their features, projected to C / M channels; weights come from appearance and from relative geometry
    (`relops.relation_attention`). What depends on a pair of boxes is computed inside the kernel: nothing of the size of
    all pairs is stored, and modules that see the same boxes have nothing to share.

    Args:
        channels: width C of the features; divisible by heads.
        heads: number M of relations.
        head_dim: width D of queries and keys.
        geometry: the distance of two boxes is divided by the size of the key's ("paper") or, as in the released code,
            of the query's ("official").

    The released parameters fit as they are, with geometry="official", those of its module i being:

        query_i_weight, query_i_bias                        query.weight [M*D,C], query.bias [M*D]
        key_i_weight, key_i_bias                            key.weight [M*D,C], key.bias [M*D]
        linear_out_i_weight.flatten(1), linear_out_i_bias   value.weight [C,C], value.bias [C]
        pair_pos_fc1_i_weight, pair_pos_fc1_i_bias          geometry.weight [M,64], geometry.bias [M]

    linear_out is a grouped 1x1 convolution [C,C,1,1] of M * C channels, the means of whole features. Rows of head m in
    it are rows of head m in value, for means of projected features are projected means; it is M times less work.

    Under Adam let query and key learn at a tenth of the rate: weights are exponentials of their products, and the first
    steps, as large as what they begin with, would let a few objects outweigh any geometry for good.

    Example, the paper's head: a module behind either layer, on the same boxes.
        >>> fc1, fc2 = torch.nn.Linear(256 * 7 * 7, 1024), torch.nn.Linear(1024, 1024)
        >>> relation1, relation2 = relops.nn.ObjectRelation(), relops.nn.ObjectRelation()
        >>> x = relation1(fc1(regions.flatten(1)), boxes).relu()  # regions [K,256,7,7], boxes [K,4]
        >>> x = relation2(fc2(x), boxes).relu()  # [K,1024]
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
        self.geometry = nn.Linear(64, heads)  # its weights go to the kernel; it is never called
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the released code, but that every pair begins with a positive geometric weight. There half of them
        begin at 0, behind a ReLU, and a head that does not see an object's duplicates can hardly learn to."""
        for linear in (self.query, self.key, self.value, self.geometry):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.geometry.bias, 0.1)

    def forward(self, features: Tensor, boxes: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            features: [N,K,C], or [K,C] of one image.
            boxes: [N,K,4], or [K,4]: x1, y1, x2, y2 in pixels of the image. Float32 beside 16-bit features, also under
                autocast: nothing rounds them.
            key_mask: [N,K] bool, or [K]; True: this object tells the others nothing. It is for padding, and for the
                ground truth that the released code appends to its proposals in training.

        Returns:
            [N,K,C], or [K,C]. Where all keys are masked, the feature itself.
        """
        self._check(features, boxes, key_mask)
        if features.dim() == 2:
            return self(features[None], boxes[None], None if key_mask is None else key_mask[None])[0]
        query, key, value = self.query(features), self.key(features), self.value(features)
        return features + self.relate(query, key, value, boxes, key_mask)

    def relate(self, query: Tensor, key: Tensor, value: Tensor, boxes: Tensor, key_mask: Tensor | None) -> Tensor:
        """What is added to the features, [N,K,C]: of their projections, [N,K,M*D] twice and [N,K,C]."""
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
