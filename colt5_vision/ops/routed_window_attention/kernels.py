"""What the Triton kernels of window ∪ routed attention share, and the forward ones.

A query tile lies within one window. It walks the keys of that window and then those that every
query sees, the prefix tokens and the routed keys, in one online softmax; a routed key in the
query's own window is skipped the second time. Keys of a window are read in place, by index: nothing
is copied or padded. Those that every query sees are gathered once (:func:`gather_kernel`) and
padded, so that the long loop over them needs no index and no mask. Which they are stands in *lists*
of positions and biases, a few bytes a token, that :func:`list_kernel` and :func:`window_kernel`
write. Strides of q, k and v come in units of ALIGN elements, so that the compiler sees that rows
can be read 16 bytes at a time; by itself it looks for strides of 16, which heads of 40 have not.

Lists, one row for each sample and route:
    keys: (B * R, N) position in [0, P + N) as int32, or ``~position`` for one that must not be
        read. All tokens in window order: the windows one after the other, each in raster order.
    biases: (B * R, N), what is added to their logits, in base 2; there if log weights hold there.
    list_keys, list_biases: (B * R, S) the same of prefix tokens and routed keys, S their number
        rounded up to PAD. The bias of one that must not be read is -inf.
    list_window: (B * R, S) the window where they stand.
    list_k, list_v: (B, heads, S, D) their rows; zeros for one that must not be read.
"""

import triton
import triton.language as tl

from ..attention_steps import (
    LN2,
    LOG2E,
    STRIDES,
    head_of,
    load_list_rows,
    load_rows,
    padded,
    softmax_step,
    store_rows,
)

NO_WINDOW = tl.constexpr(-1)  # the "window" of a prefix token as a key
PREFIX_QUERY = tl.constexpr(-2)  # and as a query: equal to no key's

# sizes that change with the image must not compile a kernel anew
SIZES = (
    *STRIDES,
    "tokens",
    "height",
    "width",
    "window_height",
    "window_width",
    "columns",
    "windows",
    "prefix",
    "listed",
    "num_routed",
    "rows",
    "query_row",
    "tiles",
    "tiles_per_window",
    "splits",
    "per_split",
    "heads",
    "share",
    "query_share",
    "routes",
)


@triton.jit
def window_span(window, height, width, window_height, window_width, columns):
    """Start of a window in window order, and its number of tokens; works on one window or a block
    of them."""
    y, x = (window // columns) * window_height, (window % columns) * window_width
    rows = tl.minimum(window_height, height - y)
    return y * width + x * rows, rows * tl.minimum(window_width, width - x)


@triton.jit
def place_of(token, height, width, window_height, window_width, columns):
    """Window of a token, and the token's place in window order."""
    y, x = token // width, token % width
    window = y // window_height * columns + x // window_width
    start, _ = window_span(window, height, width, window_height, window_width, columns)
    wide = tl.minimum(window_width, width - x // window_width * window_width)
    return window, start + y % window_height * wide + x % window_width


@triton.jit
def query_span(
    window, b, starts, windows, height, width, window_height, window_width, columns,
    SUBSET: tl.constexpr
):  # fmt: skip
    """Start and number of a window's queries in the lists of queries."""
    if SUBSET:
        first = tl.load(starts + b * (windows + 1) + window)
        return first, tl.load(starts + b * (windows + 1) + window + 1) - first
    else:
        return window_span(window, height, width, window_height, window_width, columns)


@triton.jit
def load_queries(query_rows, query_positions, at, valid, SUBSET: tl.constexpr):
    """Row of out and position in q of the entries ``at`` of the lists of queries. Unsigned: their
    upper halves as int64 are zeros then, which no loop has to keep in registers."""
    row = tl.load(query_rows + at, mask=valid, other=0)
    if SUBSET:
        position = tl.load(query_positions + at, mask=valid, other=0)
        return row.to(tl.uint32), position.to(tl.uint32)
    else:  # the list of keys; one that must not be read may query
        row = tl.where(row < 0, ~row, row).to(tl.uint32)
        return row, row


@triton.jit
def load_window_keys(
    first, start, count, keys, biases, OWN_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of the keys of a window: position, bias in base 2, which is -inf for one that must
    not be read."""
    at = first + tl.arange(0, BLOCK)
    key = tl.load(keys + start + at, mask=at < count, other=-1)
    if OWN_BIAS:
        bias = tl.load(biases + start + at, mask=at < count, other=0.0)
        return key, tl.where(key >= 0, bias, float("-inf"))
    else:
        return key, tl.where(key >= 0, 0.0, float("-inf"))


@triton.jit
def load_list_biases(first, window, list_biases, list_window, BLOCK: tl.constexpr):
    """Biases of a block of the keys that every query sees; -inf for one in this window, which has
    been seen there."""
    at = first + tl.arange(0, BLOCK)
    bias = tl.load(list_biases + at)
    return tl.where(tl.load(list_window + at) == window, float("-inf"), bias)


@triton.jit(do_not_specialize=SIZES)
def list_kernel(
    routed, log_weights, key_mask, list_keys, list_biases, list_window, own_slot,
    tokens, height, width, window_height, window_width, columns, prefix, listed, num_routed, tiles,
    routes,
    HAS_WEIGHTS: tl.constexpr, HAS_MASK: tl.constexpr, MAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys that every query sees; with MAP the slot of each of them in window order, own_slot
    (B * R, N)."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    at = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)

    # which key, and where it stands
    slot = at - prefix
    image = (slot >= 0) & (slot < num_routed)
    token = tl.load(routed + row * num_routed + slot, mask=image, other=-1)
    token = tl.where(token < tokens, token, -1).to(
        tl.int32
    )  # out of range: an empty slot, nothing is read or written
    valid = tl.where(image, token >= 0, at < prefix)
    key = tl.where(image, prefix + tl.maximum(token, 0), at)
    window, place = place_of(
        tl.maximum(token, 0), height, width, window_height, window_width, columns
    )

    # what the window pass must know of it
    if MAP:
        tl.store(own_slot + row * tokens + place, slot, mask=image & valid)
    if HAS_MASK:
        mask = key_mask + (row // routes) * (prefix + tokens)
        valid &= tl.load(mask + key, mask=valid, other=0) != 0

    # its bias, and the entry; beyond the list there are keys that must not be read
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_WEIGHTS:
        bias = (
            tl.load(log_weights + row * num_routed + slot, mask=image, other=0.0).to(tl.float32)
            * LOG2E
        )
        valid &= bias != float("-inf")
    inside = at < padded(listed)
    entry = row * padded(listed) + at
    tl.store(list_keys + entry, tl.where(valid, key, ~key), mask=inside)
    tl.store(list_biases + entry, tl.where(valid, bias, float("-inf")), mask=inside)
    tl.store(list_window + entry, tl.where(image, window, NO_WINDOW), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def window_kernel(
    key_mask, keys, biases, list_biases, own_slot, row_window,
    tokens, height, width, window_height, window_width, columns, prefix, listed, tiles, routes,
    HAS_MASK: tl.constexpr, OWN_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All tokens in window order; and once the window of each position, row_window (P + N)."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    position = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    token = position - prefix
    image = (token >= 0) & (token < tokens)
    window, place = place_of(
        tl.maximum(token, 0), height, width, window_height, window_width, columns
    )
    key = position
    if HAS_MASK:
        mask = key_mask + (row // routes) * (prefix + tokens)
        key = tl.where(tl.load(mask + position, mask=image, other=0) != 0, position, ~position)
    entry = row * tokens + place
    tl.store(keys + entry, key, mask=image)
    if OWN_BIAS:
        slot = tl.load(own_slot + entry, mask=image, other=-1)
        of_slot = list_biases + row * padded(listed) + prefix + slot
        tl.store(biases + entry, tl.load(of_slot, mask=slot >= 0, other=0.0), mask=image)
    once = position < tl.where(pid < tiles, prefix + tokens, 0)
    tl.store(row_window + position, tl.where(image, window, PREFIX_QUERY), mask=once)


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(
    k, v, list_keys, list_k, list_v,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, share, listed, tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys and values that every query sees, one after the other; BLOCK divides PAD."""
    pid = tl.program_id(0)
    tile, pair = pid % tiles, pid // tiles
    b, h = pair // heads, pair % heads
    at = tile * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(list_keys + (pair // share).to(tl.int64) * padded(listed) + at)

    # rows there, and here
    k = head_of(k, b, h, k_batch, k_head, ALIGN)
    v = head_of(v, b, h, v_batch, v_head, ALIGN)
    k_block = load_rows(k, key, key >= 0, k_token, HEAD_DIM, BLOCK_D, ALIGN)
    v_block = load_rows(v, key, key >= 0, v_token, HEAD_DIM, BLOCK_D, ALIGN)
    first = pair.to(tl.int64) * padded(listed) * HEAD_DIM
    row: tl.constexpr = HEAD_DIM // ALIGN
    store_rows(list_k + first, k_block, at, at >= 0, row, HEAD_DIM, BLOCK_D, ALIGN)
    store_rows(list_v + first, v_block, at, at >= 0, row, HEAD_DIM, BLOCK_D, ALIGN)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, lse, keys, biases, list_biases, list_window, list_k, list_v,
    query_rows, query_positions, starts,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch,
    out_head, out_token,
    scale2, heads, share, query_share, query_row, tokens, height, width, window_height,
    window_width, columns, windows,
    listed, rows, tiles, tiles_per_window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, SUBSET: tl.constexpr,
    OWN_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Image queries, a tile of a window a program."""
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

    # queries
    place = first_query + tl.arange(0, BLOCK_M)
    ok = place < count
    of_queries = (pair // query_share).to(tl.int64) * query_row + start
    row, position = load_queries(query_rows, query_positions, of_queries + place, ok, SUBSET)
    query = load_rows(
        head_of(q, b, h, q_batch, q_head, ALIGN), position, ok, q_token, HEAD_DIM, BLOCK_D, ALIGN
    )

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
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, own_count, BLOCK_N):
        key, bias = load_window_keys(first, own, own_count, keys, biases, OWN_BIAS, BLOCK_N)
        seen = bias != float("-inf")  # a weight of 0 would not stop a NaN: the others are not read
        k_block = load_rows(k, key, seen, k_token, HEAD_DIM, BLOCK_D, ALIGN)
        v_block = load_rows(v, key, seen, v_token, HEAD_DIM, BLOCK_D, ALIGN)
        m, total, acc = softmax_step(query, k_block, v_block, bias, m, total, acc, scale2)

    # then those that every query sees
    for first in range(0, listed, BLOCK_N):
        bias = load_list_biases(first, window, list_biases, list_window, BLOCK_N)
        k_block = load_list_rows(list_k, first, HEAD_DIM, BLOCK_D, BLOCK_N)
        v_block = load_list_rows(list_v, first, HEAD_DIM, BLOCK_D, BLOCK_N)
        m, total, acc = softmax_step(query, k_block, v_block, bias, m, total, acc, scale2)

    # the rows
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    store_rows(
        head_of(out, b, h, out_batch, out_head, ALIGN),
        acc,
        row,
        ok,
        out_token,
        HEAD_DIM,
        BLOCK_D,
        ALIGN,
    )
    log_total = tl.where(
        some, (m + tl.log2(total)) * LN2, float("inf")
    )  # inf: a row without any key
    tl.store(lse + pair.to(tl.int64) * rows + row, log_total, mask=ok)


@triton.jit(do_not_specialize=SIZES)
def forward_prefix_kernel(
    q, k, v, part, part_lse, key_mask,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    scale2, heads, tokens, prefix, tiles, splits, per_split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Prefix queries to all keys, the keys split over programs: part (splits, B, heads, P, D) and
    its logsumexp."""
    pid = tl.program_id(0)
    tile, split, pair = pid % tiles, (pid // tiles) % splits, pid // (tiles * splits)
    b, h = pair // heads, pair % heads
    k = head_of(k, b, h, k_batch, k_head, ALIGN)
    v = head_of(v, b, h, v_batch, v_head, ALIGN)

    # queries
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = row < prefix
    query = load_rows(
        head_of(q, b, h, q_batch, q_head, ALIGN), row, ok, q_token, HEAD_DIM, BLOCK_D, ALIGN
    )

    # keys, a block at a time
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
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
        m, total, acc = softmax_step(query, k_block, v_block, bias, m, total, acc, scale2)

    # write the part
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    at = (split * (tl.num_programs(0) // (tiles * splits)) + pair).to(tl.int64) * prefix
    store_rows(part + at * HEAD_DIM, acc, row, ok, HEAD_DIM // ALIGN, HEAD_DIM, BLOCK_D, ALIGN)
    tl.store(
        part_lse + at + row, tl.where(some, (m + tl.log2(total)) * LN2, float("-inf")), mask=ok
    )
