"""The backward Triton kernels of window ∪ routed attention.

Gradients of queries go as the forward does. Keys are gathered from the side of their queries in two
steps: those that every query sees (prefix and routed keys) from all queries beyond their window, as
float32 sums of a slice of the queries each, and then all keys of the map from their own window and
the prefix queries, taking up the first sums on the way. Every gradient is stored once, without
atomics.
"""

import triton
import triton.language as tl

from ..attention_steps import (
    LOG2E,
    head_of,
    key_step,
    load_list_rows,
    load_rows,
    padded,
    query_step,
    store_rows,
)
from .kernels import (
    NO_WINDOW,
    SIZES,
    load_list_biases,
    load_queries,
    load_window_keys,
    query_span,
    window_span,
)


@triton.jit(do_not_specialize=SIZES)
def backward_query_kernel(
    q, k, v, out, grad, lse, delta, grad_q, keys, biases, list_biases, list_window, list_k, list_v,
    query_rows, query_positions, starts,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch,
    out_head, out_token,
    grad_batch, grad_head, grad_token, grad_q_batch, grad_q_head, grad_q_token,
    scale, scale2, heads, share, query_share, query_row, tokens, height, width, window_height,
    window_width, columns,
    windows, listed, rows, tiles, tiles_per_window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SUBSET: tl.constexpr,
    OWN_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of image queries, and delta = grad · out of their rows."""
    pid = tl.program_id(0)
    tile, pair = pid % tiles, pid // tiles
    b, h = pair // heads, pair % heads
    window = tile // tiles_per_window
    start, count = query_span(
        window, b, starts, windows, height, width, window_height, window_width, columns, SUBSET
    )  # fmt: skip
    first_query = (tile % tiles_per_window) * BLOCK_M
    if first_query >= count:
        return

    # queries, their gradients and sums
    place = first_query + tl.arange(0, BLOCK_M)
    ok = place < count
    of_queries = (pair // query_share).to(tl.int64) * query_row + start
    row, position = load_queries(query_rows, query_positions, of_queries + place, ok, SUBSET)
    query = load_rows(
        head_of(q, b, h, q_batch, q_head, ALIGN), position, ok, q_token, HEAD_DIM, BLOCK_D, ALIGN
    )
    grad = head_of(grad, b, h, grad_batch, grad_head, ALIGN)
    gradient = load_rows(grad, row, ok, grad_token, HEAD_DIM, BLOCK_D, ALIGN)
    out = head_of(out, b, h, out_batch, out_head, ALIGN)
    output = load_rows(out, row, ok, out_token, HEAD_DIM, BLOCK_D, ALIGN)
    at = pair.to(tl.int64) * rows + row
    inner = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta + at, inner, mask=ok)
    lse2 = tl.load(lse + at, mask=ok, other=float("inf")) * LOG2E

    # the lists of keys
    k = head_of(k, b, h, k_batch, k_head, ALIGN)
    v = head_of(v, b, h, v_batch, v_head, ALIGN)
    # heads of one route are neighbours, as are the routes of one sample
    route = (pair // share).to(tl.int64)
    own, own_count = window_span(window, height, width, window_height, window_width, columns)
    own += route * tokens
    list_biases += route * padded(listed)
    list_window += route * padded(listed)
    list_k += pair.to(tl.int64) * padded(listed) * HEAD_DIM
    list_v += pair.to(tl.int64) * padded(listed) * HEAD_DIM

    # keys of the window, a block at a time
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, own_count, BLOCK_N):
        key, bias = load_window_keys(first, own, own_count, keys, biases, OWN_BIAS, BLOCK_N)
        seen = bias != float("-inf")  # a weight of 0 would not stop a NaN: the others are not read
        k_block = load_rows(k, key, seen, k_token, HEAD_DIM, BLOCK_D, ALIGN)
        v_block = load_rows(v, key, seen, v_token, HEAD_DIM, BLOCK_D, ALIGN)
        acc = query_step(query, gradient, k_block, v_block, bias, lse2, inner, acc, scale2)

    # then those that every query sees
    for first in range(0, listed, BLOCK_N):
        bias = load_list_biases(first, window, list_biases, list_window, BLOCK_N)
        k_block = load_list_rows(list_k, first, HEAD_DIM, BLOCK_D, BLOCK_N)
        v_block = load_list_rows(list_v, first, HEAD_DIM, BLOCK_D, BLOCK_N)
        acc = query_step(query, gradient, k_block, v_block, bias, lse2, inner, acc, scale2)

    # the rows
    grad_q = head_of(grad_q, b, h, grad_q_batch, grad_q_head, ALIGN)
    store_rows(grad_q, acc * scale, position, ok, grad_q_token, HEAD_DIM, BLOCK_D, ALIGN)


@triton.jit(do_not_specialize=SIZES)
def backward_prefix_kernel(
    q, k, v, out, grad, lse, delta, part, key_mask,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch,
    out_head, out_token,
    grad_batch, grad_head, grad_token,
    scale, scale2, heads, tokens, prefix, rows, tiles, splits, per_split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of prefix queries, the keys split over programs: part (splits, B, heads, P, D); and
    their delta."""
    pid = tl.program_id(0)
    tile, split, pair = pid % tiles, (pid // tiles) % splits, pid // (tiles * splits)
    b, h = pair // heads, pair % heads

    # queries, their gradients and sums
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = row < prefix
    query = load_rows(
        head_of(q, b, h, q_batch, q_head, ALIGN), row, ok, q_token, HEAD_DIM, BLOCK_D, ALIGN
    )
    grad = head_of(grad, b, h, grad_batch, grad_head, ALIGN)
    gradient = load_rows(grad, row, ok, grad_token, HEAD_DIM, BLOCK_D, ALIGN)
    out = head_of(out, b, h, out_batch, out_head, ALIGN)
    output = load_rows(out, row, ok, out_token, HEAD_DIM, BLOCK_D, ALIGN)
    at = pair.to(tl.int64) * rows + row
    inner = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta + at, inner, mask=ok)  # every split the same
    lse2 = tl.load(lse + at, mask=ok, other=float("inf")) * LOG2E

    # keys, a block at a time
    k = head_of(k, b, h, k_batch, k_head, ALIGN)
    v = head_of(v, b, h, v_batch, v_head, ALIGN)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.minimum((split + 1) * per_split, prefix + tokens)
    for first in range(split * per_split, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        seen = key < end
        if HAS_MASK:
            seen &= (
                tl.load(key_mask + b.to(tl.int64) * (prefix + tokens) + key, mask=seen, other=0)
                != 0
            )
        k_block = load_rows(k, key, seen, k_token, HEAD_DIM, BLOCK_D, ALIGN)
        v_block = load_rows(v, key, seen, v_token, HEAD_DIM, BLOCK_D, ALIGN)
        bias = tl.where(seen, 0.0, float("-inf"))
        acc = query_step(query, gradient, k_block, v_block, bias, lse2, inner, acc, scale2)

    # write the part
    at = (split * (tl.num_programs(0) // (tiles * splits)) + pair).to(tl.int64) * prefix
    store_rows(
        part + at * HEAD_DIM, acc * scale, row, ok, HEAD_DIM // ALIGN, HEAD_DIM, BLOCK_D, ALIGN
    )


@triton.jit(do_not_specialize=SIZES)
def backward_list_kernel(
    q, k, v, grad, lse, delta, part_k, part_v, part_bias, list_keys, list_biases, list_window,
    query_indices, row_window,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch,
    grad_head, grad_token,
    scale, scale2, heads, share, tokens, prefix, listed, rows, tiles, splits, per_split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SUBSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of routed keys from image queries beyond their window, and of prefix keys from all
    queries.

    The queries are split over programs: part_* (splits, B, heads, P + K, ...) in float32.
    """
    pid = tl.program_id(0)
    tile, split, pair = pid % tiles, (pid // tiles) % splits, pid // (tiles * splits)
    b, h = pair // heads, pair % heads
    route = (pair // share).to(tl.int64)

    # keys
    entry = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = entry < listed
    at = route * padded(listed) + entry
    key = tl.load(list_keys + at, mask=inside, other=-1)
    bias = tl.load(list_biases + at, mask=inside, other=float("-inf"))
    of = tl.load(list_window + at, mask=inside, other=NO_WINDOW)
    k_block = load_rows(
        head_of(k, b, h, k_batch, k_head, ALIGN), key, key >= 0, k_token, HEAD_DIM, BLOCK_D, ALIGN
    )
    v_block = load_rows(
        head_of(v, b, h, v_batch, v_head, ALIGN), key, key >= 0, v_token, HEAD_DIM, BLOCK_D, ALIGN
    )

    # queries, a block at a time
    q = head_of(q, b, h, q_batch, q_head, ALIGN)
    grad = head_of(grad, b, h, grad_batch, grad_head, ALIGN)
    lse += pair.to(tl.int64) * rows
    delta += pair.to(tl.int64) * rows
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_N], tl.float32)
    end = tl.minimum((split + 1) * per_split, rows)
    for first in range(split * per_split, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        ok = row < end
        image = row >= prefix
        position = row
        if SUBSET:
            chosen = query_indices + b.to(tl.int64) * (rows - prefix) + row - prefix
            position = tl.where(
                image, prefix + tl.load(chosen, mask=ok & image, other=0).to(tl.int32), row
            )
        window = tl.load(row_window + position, mask=ok, other=NO_WINDOW)
        query = load_rows(q, position, ok, q_token, HEAD_DIM, BLOCK_D, ALIGN)
        gradient = load_rows(grad, row, ok, grad_token, HEAD_DIM, BLOCK_D, ALIGN)
        lse2 = tl.load(lse + row, mask=ok, other=float("inf")) * LOG2E
        inner = tl.load(delta + row, mask=ok, other=0.0)
        # prefix queries see routed keys where those stand in the map
        seen = (
            (key >= 0)[:, None]
            & (of[:, None] != window[None, :])
            & (image[None, :] | (of == NO_WINDOW)[:, None])
        )
        grad_k, grad_v, grad_bias = key_step(
            query,
            gradient,
            k_block,
            v_block,
            bias,
            seen,
            lse2,
            inner,
            grad_k,
            grad_v,
            grad_bias,
            scale2,
        )

    # write the part
    at = (split * (tl.num_programs(0) // (tiles * splits)) + pair).to(tl.int64) * listed
    store_rows(
        part_k + at * HEAD_DIM,
        grad_k * scale,
        entry,
        inside,
        HEAD_DIM // ALIGN,
        HEAD_DIM,
        BLOCK_D,
        ALIGN,
    )
    store_rows(
        part_v + at * HEAD_DIM, grad_v, entry, inside, HEAD_DIM // ALIGN, HEAD_DIM, BLOCK_D, ALIGN
    )
    tl.store(part_bias + at + entry, grad_bias, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def backward_window_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, grad_bias, part_k, part_v, part_bias, keys, biases,
    own_slot,
    query_rows, query_positions, starts,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch,
    grad_head, grad_token,
    grad_k_batch, grad_k_head, grad_k_token, grad_v_batch, grad_v_head, grad_v_token,
    scale, scale2, heads, share, query_share, query_row, tokens, height, width, window_height,
    window_width, columns,
    windows, listed, rows, prefix, tiles, tiles_per_window, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SUBSET: tl.constexpr,
    HAS_ROUTED: tl.constexpr,
    OWN_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the map's keys, and of the routed ones' biases (B, heads, K): all that is left,
    summed up."""
    pid = tl.program_id(0)
    tile, pair = pid % tiles, pid // tiles
    b, h = pair // heads, pair % heads
    window = tile // tiles_per_window
    own, own_count = window_span(window, height, width, window_height, window_width, columns)
    first_key = (tile % tiles_per_window) * BLOCK_N
    if first_key >= own_count:
        return

    # keys
    place = first_key + tl.arange(0, BLOCK_N)
    inside = place < own_count
    route = (pair // share).to(tl.int64)
    entry = route * tokens + own + place
    key = tl.load(keys + entry, mask=inside, other=-1)
    own_bias = tl.zeros([BLOCK_N], tl.float32)
    if OWN_BIAS:
        own_bias = tl.load(biases + entry, mask=inside, other=0.0)
    k_block = load_rows(
        head_of(k, b, h, k_batch, k_head, ALIGN), key, key >= 0, k_token, HEAD_DIM, BLOCK_D, ALIGN
    )
    v_block = load_rows(
        head_of(v, b, h, v_batch, v_head, ALIGN), key, key >= 0, v_token, HEAD_DIM, BLOCK_D, ALIGN
    )

    # the lists of queries
    q = head_of(q, b, h, q_batch, q_head, ALIGN)
    grad = head_of(grad, b, h, grad_batch, grad_head, ALIGN)
    lse += pair.to(tl.int64) * rows
    delta += pair.to(tl.int64) * rows
    query_rows += (pair // query_share).to(tl.int64) * query_row
    if SUBSET:
        query_positions += (pair // query_share).to(tl.int64) * query_row
    start, count = query_span(
        window, b, starts, windows, height, width, window_height, window_width, columns, SUBSET
    )  # fmt: skip
    own_end = tl.cdiv(count, BLOCK_M) * BLOCK_M

    sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_N], tl.float32)

    # the window's queries, then the prefix queries: those see a key without its weight
    for first in range(0, own_end + prefix, BLOCK_M):
        image = first < own_end
        at = tl.where(image, first, first - own_end) + tl.arange(0, BLOCK_M)
        ok = at < tl.where(image, count, prefix)
        of_window = at < tl.where(image, count, 0)
        row, position = load_queries(query_rows, query_positions, start + at, of_window, SUBSET)
        row, position = tl.where(image, row, at), tl.where(image, position, at)
        query = load_rows(q, position, ok, q_token, HEAD_DIM, BLOCK_D, ALIGN)
        gradient = load_rows(grad, row, ok, grad_token, HEAD_DIM, BLOCK_D, ALIGN)
        lse2 = tl.load(lse + row, mask=ok, other=float("inf")) * LOG2E
        inner = tl.load(delta + row, mask=ok, other=0.0)
        bias = tl.where(image, own_bias, 0.0)
        sum_k, sum_v, with_this = key_step(
            query,
            gradient,
            k_block,
            v_block,
            bias,
            ((key >= 0) & (bias != float("-inf")))[:, None],
            lse2,
            inner,
            sum_k,
            sum_v,
            sum_bias,
            scale2,
        )
        sum_bias = tl.where(image, with_this, sum_bias)

    # of a routed key, what came from beyond its window
    sum_k *= scale
    if HAS_ROUTED:
        slot = tl.load(own_slot + entry, mask=inside, other=-1)
        pairs = tl.num_programs(0) // tiles
        if not OWN_BIAS:
            sum_bias = tl.zeros([BLOCK_N], tl.float32)  # no weight was at work within the window
        for split in range(splits):
            part = (split * pairs + pair).to(tl.int64) * listed + prefix
            sum_k += load_rows(
                part_k + part * HEAD_DIM,
                slot,
                slot >= 0,
                HEAD_DIM // ALIGN,
                HEAD_DIM,
                BLOCK_D,
                ALIGN,
            )
            sum_v += load_rows(
                part_v + part * HEAD_DIM,
                slot,
                slot >= 0,
                HEAD_DIM // ALIGN,
                HEAD_DIM,
                BLOCK_D,
                ALIGN,
            )
            sum_bias += tl.load(part_bias + part + slot, mask=slot >= 0, other=0.0)
        tl.store(grad_bias + pair.to(tl.int64) * (listed - prefix) + slot, sum_bias, mask=slot >= 0)

    # the rows
    position = tl.where(key < 0, ~key, key)
    grad_k = head_of(grad_k, b, h, grad_k_batch, grad_k_head, ALIGN)
    grad_v = head_of(grad_v, b, h, grad_v_batch, grad_v_head, ALIGN)
    store_rows(grad_k, sum_k, position, inside, grad_k_token, HEAD_DIM, BLOCK_D, ALIGN)
    store_rows(grad_v, sum_v, position, inside, grad_v_token, HEAD_DIM, BLOCK_D, ALIGN)
