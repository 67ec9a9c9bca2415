"""The Triton kernels of attention of groups of queries to their own keys.

What a group reads, the prefix tokens, its keys and its pooled keys, :func:`gather_kernel` copies
once, one after the other. The query tiles of the group walk this *list* in one online softmax, with
no index and no mask of rows. Backward walks it from both sides: gradients of queries a tile of
queries at a time, those of the list a tile of keys at a time. :func:`sum_kernel` then adds up what
the lists hold of each token. Every gradient is stored once, without atomics.

Lists of G groups, S = P + M + C rounded up to PAD:
    list_k, list_v: (B, heads, G, S, D) their rows; zeros for one that must not be read.
    list_biases: (B, heads, G, S), what is added to their logits, in base 2; -inf for such a one.
    part_k, part_v, part_biases: the gradients of all these, in float32.
"""

import triton
import triton.language as tl

from ..attention_steps import (
    LN2,
    LOG2E,
    STRIDES,
    head_of,
    key_step,
    load_list_rows,
    load_rows,
    padded,
    query_step,
    softmax_step,
    store_rows,
)

# sizes that change with the image must not compile a kernel anew
SIZES = (
    *STRIDES,
    "heads",
    "share",
    "groups",
    "size",
    "tokens",
    "prefix",
    "num_keys",
    "listed",
    "tiles",
)


@triton.jit
def load_queries(queries, first, size, tokens, prefix, BLOCK: tl.constexpr):
    """Positions in q of a block of a group's queries, and which of them there are."""
    place = first + tl.arange(0, BLOCK)
    token = tl.load(queries + place, mask=place < size, other=-1)
    ok = (token >= 0) & (token < tokens)  # out of range: an empty place
    return prefix + tl.where(ok, token, 0), ok


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(
    k, v, keys, log_weights, pooled_k, pooled_v, log_mass, key_mask, list_k, list_v, list_biases,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, share, groups, tokens, prefix, num_keys, listed, tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The list of a group, a block of it a program; BLOCK divides PAD."""
    pid = tl.program_id(0)
    tile, group, pair = pid % tiles, (pid // tiles) % groups, pid // (tiles * groups)
    b, h = pair // heads, pair % heads
    at = tile * BLOCK + tl.arange(0, BLOCK)

    # prefix tokens, then the keys of the group
    slot = at - prefix
    own = (slot >= 0) & (slot < num_keys)
    of_keys = ((pair // share).to(tl.int64) * groups + group) * num_keys + slot
    token = tl.load(keys + of_keys, mask=own, other=-1)
    key = tl.where(own, prefix + token, at)
    # out of range: an empty slot
    seen = tl.where(own, (token >= 0) & (token < tokens), at < prefix)
    if key_mask is not None:
        mask = key_mask + b.to(tl.int64) * (prefix + tokens)
        seen &= tl.load(mask + key, mask=seen, other=0) != 0
    bias = tl.zeros([BLOCK], tl.float32)
    if log_weights is not None:
        bias = tl.load(log_weights + of_keys, mask=own, other=0.0).to(tl.float32) * LOG2E
        seen &= bias != float("-inf")

    # their rows, and beyond the list keys that must not be read
    first = (pair.to(tl.int64) * groups + group) * padded(listed)
    list_k += first * HEAD_DIM
    list_v += first * HEAD_DIM
    row: tl.constexpr = HEAD_DIM // ALIGN
    pooled = listed - prefix - num_keys
    slot -= num_keys
    behind = (slot >= 0) & (slot < pooled)
    # a weight of 0 would not stop a NaN: what is switched off is not read
    k = head_of(k, b, h, k_batch, k_head, ALIGN)
    v = head_of(v, b, h, v_batch, v_head, ALIGN)
    k_block = load_rows(k, key, seen, k_token, HEAD_DIM, BLOCK_D, ALIGN)
    v_block = load_rows(v, key, seen, v_token, HEAD_DIM, BLOCK_D, ALIGN)
    store_rows(list_k, k_block, at, ~behind, row, HEAD_DIM, BLOCK_D, ALIGN)
    store_rows(list_v, v_block, at, ~behind, row, HEAD_DIM, BLOCK_D, ALIGN)

    # then its pooled keys
    if log_mass is not None:
        of_pooled = (pair.to(tl.int64) * groups + group) * pooled + slot
        mass = tl.load(log_mass + of_pooled, mask=behind, other=float("-inf"))
        mass = mass.to(tl.float32) * LOG2E
        there = mass != float("-inf")
        k_block = load_rows(pooled_k, of_pooled, there, row, HEAD_DIM, BLOCK_D, ALIGN)
        v_block = load_rows(pooled_v, of_pooled, there, row, HEAD_DIM, BLOCK_D, ALIGN)
        store_rows(list_k, k_block, at, behind, row, HEAD_DIM, BLOCK_D, ALIGN)
        store_rows(list_v, v_block, at, behind, row, HEAD_DIM, BLOCK_D, ALIGN)
        bias, seen = tl.where(there, mass, bias), seen | there
    tl.store(list_biases + first + at, tl.where(seen, bias, float("-inf")))


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, out, lse, queries, list_k, list_v, list_biases,
    q_batch, q_head, q_token, out_batch, out_head, out_token,
    scale2, heads, share, groups, size, tokens, prefix, listed, tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Queries of a group, a tile of them a program."""
    pid = tl.program_id(0)
    tile, group, pair = pid % tiles, (pid // tiles) % groups, pid // (tiles * groups)
    b, h = pair // heads, pair % heads

    # queries
    queries += ((pair // share).to(tl.int64) * groups + group) * size
    position, ok = load_queries(queries, tile * BLOCK_M, size, tokens, prefix, BLOCK_M)
    q = head_of(q, b, h, q_batch, q_head, ALIGN)
    query = load_rows(q, position, ok, q_token, HEAD_DIM, BLOCK_D, ALIGN)

    # the list, a block at a time
    first_entry = (pair.to(tl.int64) * groups + group) * padded(listed)
    list_k += first_entry * HEAD_DIM
    list_v += first_entry * HEAD_DIM
    list_biases += first_entry
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, listed, BLOCK_N):
        bias = tl.load(list_biases + first + tl.arange(0, BLOCK_N))
        k_block = load_list_rows(list_k, first, HEAD_DIM, BLOCK_D, BLOCK_N)
        v_block = load_list_rows(list_v, first, HEAD_DIM, BLOCK_D, BLOCK_N)
        m, total, acc = softmax_step(query, k_block, v_block, bias, m, total, acc, scale2)

    # the rows
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    out = head_of(out, b, h, out_batch, out_head, ALIGN)
    store_rows(out, acc, position, ok, out_token, HEAD_DIM, BLOCK_D, ALIGN)
    # inf: a row without any key
    log_total = tl.where(some, (m + tl.log2(total)) * LN2, float("inf"))
    tl.store(lse + pair.to(tl.int64) * (prefix + tokens) + position, log_total, mask=ok)


@triton.jit(do_not_specialize=SIZES)
def backward_query_kernel(
    q, out, grad, lse, delta, grad_q, queries, list_k, list_v, list_biases,
    q_batch, q_head, q_token, out_batch, out_head, out_token, grad_batch, grad_head, grad_token,
    grad_q_batch, grad_q_head, grad_q_token,
    scale, scale2, heads, share, groups, size, tokens, prefix, listed, tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of a group's queries, a tile of them a program, and delta = grad · out of their
    rows."""
    pid = tl.program_id(0)
    tile, group, pair = pid % tiles, (pid // tiles) % groups, pid // (tiles * groups)
    b, h = pair // heads, pair % heads

    # queries, their gradients and sums
    queries += ((pair // share).to(tl.int64) * groups + group) * size
    position, ok = load_queries(queries, tile * BLOCK_M, size, tokens, prefix, BLOCK_M)
    q = head_of(q, b, h, q_batch, q_head, ALIGN)
    query = load_rows(q, position, ok, q_token, HEAD_DIM, BLOCK_D, ALIGN)
    grad = head_of(grad, b, h, grad_batch, grad_head, ALIGN)
    gradient = load_rows(grad, position, ok, grad_token, HEAD_DIM, BLOCK_D, ALIGN)
    out = head_of(out, b, h, out_batch, out_head, ALIGN)
    output = load_rows(out, position, ok, out_token, HEAD_DIM, BLOCK_D, ALIGN)
    at = pair.to(tl.int64) * (prefix + tokens) + position
    inner = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta + at, inner, mask=ok)
    lse2 = tl.load(lse + at, mask=ok, other=float("inf")) * LOG2E

    # the list, a block at a time
    first_entry = (pair.to(tl.int64) * groups + group) * padded(listed)
    list_k += first_entry * HEAD_DIM
    list_v += first_entry * HEAD_DIM
    list_biases += first_entry
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, listed, BLOCK_N):
        bias = tl.load(list_biases + first + tl.arange(0, BLOCK_N))
        k_block = load_list_rows(list_k, first, HEAD_DIM, BLOCK_D, BLOCK_N)
        v_block = load_list_rows(list_v, first, HEAD_DIM, BLOCK_D, BLOCK_N)
        acc = query_step(query, gradient, k_block, v_block, bias, lse2, inner, acc, scale2)

    # the rows
    grad_q = head_of(grad_q, b, h, grad_q_batch, grad_q_head, ALIGN)
    store_rows(grad_q, acc * scale, position, ok, grad_q_token, HEAD_DIM, BLOCK_D, ALIGN)


@triton.jit(do_not_specialize=SIZES)
def backward_list_kernel(
    q, grad, lse, delta, part_k, part_v, part_biases, queries, list_k, list_v, list_biases,
    q_batch, q_head, q_token, grad_batch, grad_head, grad_token,
    scale, scale2, heads, share, groups, size, tokens, prefix, listed, tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of a group's list from the queries of the group, a tile of keys a program."""
    pid = tl.program_id(0)
    tile, group, pair = pid % tiles, (pid // tiles) % groups, pid // (tiles * groups)
    b, h = pair // heads, pair % heads

    # keys
    first_entry = (pair.to(tl.int64) * groups + group) * padded(listed)
    at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = tl.load(list_biases + first_entry + at)
    list_k += first_entry * HEAD_DIM
    list_v += first_entry * HEAD_DIM
    k_block = load_list_rows(list_k, tile * BLOCK_N, HEAD_DIM, BLOCK_D, BLOCK_N)
    v_block = load_list_rows(list_v, tile * BLOCK_N, HEAD_DIM, BLOCK_D, BLOCK_N)
    seen = (bias != float("-inf"))[:, None]

    # queries, a block at a time
    queries += ((pair // share).to(tl.int64) * groups + group) * size
    q = head_of(q, b, h, q_batch, q_head, ALIGN)
    grad = head_of(grad, b, h, grad_batch, grad_head, ALIGN)
    lse += pair.to(tl.int64) * (prefix + tokens)
    delta += pair.to(tl.int64) * (prefix + tokens)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, size, BLOCK_M):
        position, ok = load_queries(queries, first, size, tokens, prefix, BLOCK_M)
        query = load_rows(q, position, ok, q_token, HEAD_DIM, BLOCK_D, ALIGN)
        gradient = load_rows(grad, position, ok, grad_token, HEAD_DIM, BLOCK_D, ALIGN)
        lse2 = tl.load(lse + position, mask=ok, other=float("inf")) * LOG2E
        inner = tl.load(delta + position, mask=ok, other=0.0)
        grad_k, grad_v, grad_bias = key_step(
            query, gradient, k_block, v_block, bias, seen, lse2, inner, grad_k, grad_v, grad_bias,
            scale2,
        )  # fmt: skip

    # the part
    row: tl.constexpr = HEAD_DIM // ALIGN
    part_k += first_entry * HEAD_DIM
    part_v += first_entry * HEAD_DIM
    store_rows(part_k, grad_k * scale, at, at >= 0, row, HEAD_DIM, BLOCK_D, ALIGN)
    store_rows(part_v, grad_v, at, at >= 0, row, HEAD_DIM, BLOCK_D, ALIGN)
    tl.store(part_biases + first_entry + at, grad_bias)


@triton.jit(do_not_specialize=SIZES)
def sum_kernel(
    part_k, part_v, grad_k, grad_v, places, starts,
    grad_k_batch, grad_k_head, grad_k_token, grad_v_batch, grad_v_head, grad_v_token,
    heads, share, groups, tokens, prefix, num_keys, listed, tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a block of tokens what the lists hold of them.

    places: (B * R, G * M), those of all keys of a route, by token.
    starts: (B * R, N + 1), where those of each token start.
    """
    pid = tl.program_id(0)
    tile, pair = pid % tiles, pid // tiles
    b, h = pair // heads, pair % heads
    route = (pair // share).to(tl.int64)

    # tokens, and how often they are listed
    token = tile * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    starts += route * (tokens + 1)
    start = tl.load(starts + token, mask=inside, other=0)
    count = tl.load(starts + token + 1, mask=inside, other=0) - start
    places += route * groups * num_keys

    # what there is so far
    grad_k = head_of(grad_k, b, h, grad_k_batch, grad_k_head, ALIGN)
    grad_v = head_of(grad_v, b, h, grad_v_batch, grad_v_head, ALIGN)
    position = prefix + token
    sum_k = load_rows(grad_k, position, inside, grad_k_token, HEAD_DIM, BLOCK_D, ALIGN)
    sum_v = load_rows(grad_v, position, inside, grad_v_token, HEAD_DIM, BLOCK_D, ALIGN)
    sum_k, sum_v = sum_k.to(tl.float32), sum_v.to(tl.float32)

    # in the order of the groups
    row: tl.constexpr = HEAD_DIM // ALIGN
    for i in range(tl.max(count, 0)):
        there = i < count
        place = tl.load(places + start + i, mask=there, other=0)
        group, slot = place // num_keys, place % num_keys
        entry = (pair.to(tl.int64) * groups + group) * padded(listed) + prefix + slot
        sum_k += load_rows(part_k, entry, there, row, HEAD_DIM, BLOCK_D, ALIGN)
        sum_v += load_rows(part_v, entry, there, row, HEAD_DIM, BLOCK_D, ALIGN)

    # the rows
    store_rows(grad_k, sum_k, position, inside, grad_k_token, HEAD_DIM, BLOCK_D, ALIGN)
    store_rows(grad_v, sum_v, position, inside, grad_v_token, HEAD_DIM, BLOCK_D, ALIGN)
