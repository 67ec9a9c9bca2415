"""The dense reference of window ∪ routed attention, called by position."""

from colt5_vision.ops.routed_window_attention.reference import routed_window_attention, window_of

__all__ = ["dense_attention", "window_of"]


def dense_attention(
    q,
    k,
    v,
    grid_size,
    window_size,
    routed=None,
    log_weights=None,
    key_mask=None,
    prefix=0,
    scale=None,
    own=True,
):
    return routed_window_attention(
        q,
        k,
        v,
        grid_size=grid_size,
        window_size=window_size,
        routed_indices=routed,
        log_weights=log_weights,
        key_mask=key_mask,
        num_prefix_tokens=prefix,
        scale=scale,
        weight_own_window=own,
    )
