"""colt5_attention's names: its switches and arguments, its weights, its ViT, its top-k.

    from colt5_vision.compat import ...     # in place of: from colt5_attention import ...

``docs/migration.md`` says what is the same, what differs on purpose, and what is refused.
"""

from .convert import convert_colt5_attention_state_dict
from .coor_descent import coor_descent
from .relaxations import cumulative_softmax, gumbel_sinkhorn
from .router import CoordinateDescentRouter
from .topk import TopkReturn, topk
from .transformer_block import (
    ConditionalRoutedAttention,
    ConditionalRoutedAutoregressiveAttention,
    ConditionalRoutedCrossAttention,
    ConditionalRoutedFeedForward,
    ConditionalRoutedImageAttention,
    ConditionalRoutedTransformerBlock,
)
from .vit import ConditionalRoutedViT

__all__ = [
    "ConditionalRoutedAttention",
    "ConditionalRoutedAutoregressiveAttention",
    "ConditionalRoutedCrossAttention",
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedImageAttention",
    "ConditionalRoutedTransformerBlock",
    "ConditionalRoutedViT",
    "CoordinateDescentRouter",
    "TopkReturn",
    "convert_colt5_attention_state_dict",
    "coor_descent",
    "cumulative_softmax",
    "gumbel_sinkhorn",
    "topk",
]
