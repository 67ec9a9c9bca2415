"""Other forward kernels of window ∪ routed attention, beside the one that the library has.

They take its arguments, ``list_keys`` and MODE:
    INDEXED: routed keys are read in place, by index, under a mask.
    DESCRIPTORS: gathered ones through tensor descriptors, TMA on sm_90.
    SECOND_PASS: routed keys alone, joined with ``out`` and ``lse`` of a pass over the windows.
"""

import triton
import triton.language as tl

from colt5_vision.ops.attention_steps import (
    LN2,
    LOG2E,
    head_of,
    load_list_rows,
    load_rows,
    padded,
    softmax_step,
    store_rows,
)
from colt5_vision.ops.routed_window_attention.kernels import (
    SIZES,
    load_list_biases,
    load_queries,
    load_window_keys,
    query_span,
    window_span,
)

INDEXED = tl.constexpr(0)
DESCRIPTORS = tl.constexpr(1)
SECOND_PASS = tl.constexpr(2)


@triton.jit(do_not_specialize=SIZES)
def variant_kernel(
    q, k, v, out, lse, keys, biases, list_biases, list_window, list_k, list_v,
    query_rows, query_positions, starts,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch,
    out_head, out_token,
    scale2, heads, share, query_share, query_row, tokens, height, width, window_height,
    window_width, columns, windows, listed, rows, tiles, tiles_per_window, list_keys,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SUBSET: tl.constexpr,
    OWN_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, pair = pid % tiles, pid // tiles
    b, h = pair // heads, pair % heads
    window = tile // tiles_per_window
    start, count = query_span(
        window, b, starts, windows, height, width, window_height, window_width, columns, SUBSET
    )
    first_query = (tile % tiles_per_window) * BLOCK_M
    if first_query >= count:
        return

    # queries, and the lists of keys
    place = first_query + tl.arange(0, BLOCK_M)
    ok = place < count
    of_queries = (pair // query_share).to(tl.int64) * query_row + start
    row, position = load_queries(query_rows, query_positions, of_queries + place, ok, SUBSET)
    q = head_of(q, b, h, q_batch, q_head, ALIGN)
    query = load_rows(q, position, ok, q_token, HEAD_DIM, BLOCK_D, ALIGN)
    k = head_of(k, b, h, k_batch, k_head, ALIGN)
    v = head_of(v, b, h, v_batch, v_head, ALIGN)
    out = head_of(out, b, h, out_batch, out_head, ALIGN)
    lse += pair.to(tl.int64) * rows
    route = (pair // share).to(tl.int64)
    own, own_count = window_span(window, height, width, window_height, window_width, columns)
    own += route * tokens
    list_keys += route * padded(listed)
    list_biases += route * padded(listed)
    list_window += route * padded(listed)
    list_k += pair.to(tl.int64) * padded(listed) * HEAD_DIM
    list_v += pair.to(tl.int64) * padded(listed) * HEAD_DIM

    # keys of the window, or what another pass made of them
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if MODE == SECOND_PASS:
        m = tl.load(lse + row, mask=ok, other=float("inf")) * LOG2E
        total = tl.where(m == float("inf"), 0.0, 1.0)
        m = tl.where(m == float("inf"), float("-inf"), m)
        acc = load_rows(out, row, ok, out_token, HEAD_DIM, BLOCK_D, ALIGN).to(tl.float32)
    else:
        for first in range(0, own_count, BLOCK_N):
            key, bias = load_window_keys(first, own, own_count, keys, biases, OWN_BIAS, BLOCK_N)
            seen = bias != float("-inf")
            k_block = load_rows(k, key, seen, k_token, HEAD_DIM, BLOCK_D, ALIGN)
            v_block = load_rows(v, key, seen, v_token, HEAD_DIM, BLOCK_D, ALIGN)
            m, total, acc = softmax_step(query, k_block, v_block, bias, m, total, acc, scale2)

    # routed keys
    if MODE == DESCRIPTORS:
        shape = [padded(listed), HEAD_DIM]
        k_rows = tl.make_tensor_descriptor(list_k, shape, [HEAD_DIM, 1], [BLOCK_N, BLOCK_D])
        v_rows = tl.make_tensor_descriptor(list_v, shape, [HEAD_DIM, 1], [BLOCK_N, BLOCK_D])
    for first in range(0, listed, BLOCK_N):
        bias = load_list_biases(first, window, list_biases, list_window, BLOCK_N)
        if MODE == INDEXED:
            key = tl.load(list_keys + first + tl.arange(0, BLOCK_N))
            seen = bias != float("-inf")
            k_block = load_rows(k, key, seen, k_token, HEAD_DIM, BLOCK_D, ALIGN)
            v_block = load_rows(v, key, seen, v_token, HEAD_DIM, BLOCK_D, ALIGN)
        elif MODE == DESCRIPTORS:
            k_block = k_rows.load([first, 0])
            v_block = v_rows.load([first, 0])
        else:
            k_block = load_list_rows(list_k, first, HEAD_DIM, BLOCK_D, BLOCK_N)
            v_block = load_list_rows(list_v, first, HEAD_DIM, BLOCK_D, BLOCK_N)
        m, total, acc = softmax_step(query, k_block, v_block, bias, m, total, acc, scale2)

    # the rows
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    store_rows(out, acc, row, ok, out_token, HEAD_DIM, BLOCK_D, ALIGN)
    log_total = tl.where(some, (m + tl.log2(total)) * LN2, float("inf"))
    tl.store(lse + row, log_total, mask=ok)
