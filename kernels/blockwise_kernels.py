"""The kernels of kernels/blockwise_attention.py, in Triton: softmax attention over blocks of queries and of keys.

`QUERIES` and `KEYS` are how many of them a program takes at a time, `TAIL` says that a block reaches behind the
sequence's end, `stream` and `word` are what dropout's hash begins with (`_stream`).
"""
# ruff: noqa: N803 - Triton's spelling of compile-time arguments

from kernels.short_attention import folded
from kernels.triton_parts import tl, triton


@triton.jit
def _program(boundaries, HEADS: tl.constexpr, BLOCKS: tl.constexpr):
    """(the sequence, its first token, how many it has, the head, the block) of this program."""
    number = tl.program_id(0) // BLOCKS
    sequence = number // HEADS
    first = tl.load(boundaries + sequence)
    return sequence, first, tl.load(boundaries + sequence + 1) - first, number % HEADS, tl.program_id(0) % BLOCKS


@triton.jit
def _rows(base, start, numbers, length, STRIDE: tl.constexpr, SIZE: tl.constexpr, TAIL: tl.constexpr):
    """Of the tokens from `start` on, [tokens, SIZE]; in a tail zeros behind the sequence's end."""
    places = base + start * STRIDE + numbers[:, None] * STRIDE + tl.arange(0, SIZE)[None, :]
    if TAIL:
        return tl.load(places, mask=(start + numbers < length)[:, None], other=0.0)
    return tl.load(places)


@triton.jit
def _biased_rows(base, bias, start, numbers, length, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    """`_rows` and the bias, rounded."""
    rows = _rows(base, start, numbers, length, STRIDE, SIZE, True)
    return (rows.to(tl.float32) + tl.load(bias + tl.arange(0, SIZE))[None, :]).to(rows.dtype)


@triton.jit
def _stream(first, head, seed, threshold, HEADS: tl.constexpr, LONGEST: tl.constexpr, DROPOUT: tl.constexpr):
    """What the numbers of a head's scores begin with, and the seed's second word; without dropout any two numbers."""
    begin, word = 0, threshold
    if DROPOUT:
        begin = (first * HEADS + head) * LONGEST + tl.load(seed)
        word = tl.load(seed + 1).to(tl.uint32, bitcast=True)
    return begin, word


@triton.jit
def _kept(stream, word, queries, keys, begin_query, begin_key, threshold, HEADS: tl.constexpr, LONGEST: tl.constexpr):
    """What dropout keeps of the scores of a block, one of `queries` and `keys` a column and the other a row.

    These count from the block's beginning, a multiple of 16: so the compiler knows their bits in each register.
    """
    begin = stream + begin_query * (HEADS * LONGEST) + begin_key
    numbers = begin + (queries & -9) * (HEADS * LONGEST) + (keys & -9)
    bits = folded(numbers.to(tl.uint32, bitcast=True), 0xED5AD4BB)
    bits = folded(bits ^ word, 0xAC4C1B51)
    bits = tl.where((queries & 8) != 0, folded(bits, 0xC2B2AE3D), bits)
    return (bits << ((keys & 8) * 2).to(tl.uint32)) >= (threshold.to(tl.uint32) << 16)


@triton.jit
def _more_context(
    start,
    greatest,
    total,
    kept_total,
    context,
    q,
    key,
    value,
    length,
    log2_scale,
    stream,
    word,
    begin_query,
    threshold,
    TAIL: tl.constexpr,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The forward pass's sums with a block of keys more; `TAIL`: it reaches behind the sequence's end."""
    numbers = tl.arange(0, KEYS)
    scores = tl.dot(q, tl.trans(_rows(key, start, numbers, length, STRIDE, SIZE, TAIL)))
    if TAIL:
        scores = tl.where((start + numbers < length)[None, :], scores, float("-inf"))
    before, greatest = greatest, tl.maximum(greatest, tl.max(scores, 1) * log2_scale)
    powers = tl.exp2(scores * log2_scale - greatest[:, None])
    shrunk = tl.exp2(before - greatest)
    total = total * shrunk + tl.sum(powers, 1)
    if DROPOUT:
        queries = tl.arange(0, QUERIES)[:, None]
        kept = _kept(stream, word, queries, numbers[None, :], begin_query, start, threshold, HEADS, LONGEST)
        powers = tl.where(kept, powers, 0.0)
        kept_total = kept_total * shrunk + tl.sum(powers, 1)
    v = _rows(value, start, numbers, length, STRIDE, SIZE, TAIL)
    context = tl.dot(powers.to(v.dtype), v, context * shrunk[:, None])
    return greatest, total, kept_total, context


@triton.jit(do_not_specialize=["threshold"])
def blockwise_forward(
    query,
    key,
    value,
    bias,
    boundaries,
    seed,
    out,
    log_sums,
    tokens,
    log2_scale,
    threshold,
    kept_scale,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    _, first, length, head, block = _program(boundaries, HEADS, BLOCKS)
    begin_query, queries = block * QUERIES, tl.arange(0, QUERIES)
    if begin_query >= length:
        return
    size = tl.arange(0, SIZE)
    begin = first.to(tl.int64) * STRIDE + head * SIZE
    q = _biased_rows(query + begin, bias + head * SIZE, begin_query, queries, length, STRIDE, SIZE)
    stream, word = _stream(first, head, seed, threshold, HEADS, LONGEST, DROPOUT)
    greatest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    kept_total = tl.zeros([QUERIES], tl.float32)
    context = tl.zeros([QUERIES, SIZE], tl.float32)
    full = length // KEYS * KEYS
    for start in range(0, full, KEYS):
        greatest, total, kept_total, context = _more_context(
            start, greatest, total, kept_total, context, q, key + begin, value + begin, length, log2_scale, stream,
            word, begin_query, threshold, False, STRIDE, HEADS, SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    if full < length:
        greatest, total, kept_total, context = _more_context(
            full, greatest, total, kept_total, context, q, key + begin, value + begin, length, log2_scale, stream,
            word, begin_query, threshold, True, STRIDE, HEADS, SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    queries += begin_query
    if not DROPOUT:
        kept_total = total
    context += kept_total[:, None] * tl.load(bias + (2 * HEADS + head) * SIZE + size)[None, :]
    context *= (kept_scale / total)[:, None]
    places = (first + queries[:, None]).to(tl.int64) * (HEADS * SIZE) + head * SIZE + size[None, :]
    tl.store(out + places, context.to(out.dtype.element_ty), mask=(queries < length)[:, None])
    sums = greatest + tl.log2(total)
    tl.store(log_sums + head * tokens + first + queries, sums, mask=queries < length)


@triton.jit
def _store_gradient(
    grad,
    tokens,
    grad_qkv,
    grad_bias,
    sequence,
    first,
    length,
    head,
    block,
    PART: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Of query, key or value; and the block's share of that of its bias: none of key's, which is 0."""
    size = tl.arange(0, SIZE)
    places = (first + tokens[:, None]).to(tl.int64) * (3 * HEADS * SIZE) + (PART * HEADS + head) * SIZE + size[None, :]
    tl.store(grad_qkv + places, grad.to(grad_qkv.dtype.element_ty), mask=(tokens < length)[:, None])
    if PART != 1:
        share = tl.sum(tl.where((tokens < length)[:, None], grad, 0.0), 0)
        tl.store(grad_bias + (((sequence * SHARES + block) * 3 + PART) * HEADS + head) * SIZE + size, share)


@triton.jit
def _more_of_queries(
    start,
    grad_q,
    q,
    grad,
    sums,
    kept_rest,
    rest,
    key,
    value,
    length,
    log2_scale,
    stream,
    word,
    begin_query,
    threshold,
    TAIL: tl.constexpr,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    numbers = tl.arange(0, KEYS)
    k = _rows(key, start, numbers, length, STRIDE, SIZE, TAIL)
    powers = tl.exp2(tl.dot(q, tl.trans(k)) * log2_scale - sums[:, None])
    if TAIL:
        powers = tl.where((start + numbers < length)[None, :], powers, 0.0)
    grad_p = tl.dot(grad, tl.trans(_rows(value, start, numbers, length, STRIDE, SIZE, TAIL))) + kept_rest[:, None]
    if DROPOUT:
        queries = tl.arange(0, QUERIES)[:, None]
        kept = _kept(stream, word, queries, numbers[None, :], begin_query, start, threshold, HEADS, LONGEST)
        grad_p = tl.where(kept, grad_p, rest[:, None])
    return tl.dot((powers * grad_p).to(k.dtype), k, grad_q)


@triton.jit
def _joined(sums, products):
    """Of each query the logarithm of its softmax's sum and rowsum(dO * O), as one number of 64 bits to load."""
    low = sums.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (products.to(tl.uint32, bitcast=True).to(tl.uint64) << 32 | low).to(tl.int64, bitcast=True)


@triton.jit
def _halves(both):
    low, high = both.to(tl.uint32), (both.to(tl.uint64, bitcast=True) >> 32).to(tl.uint32)
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def _more_of_keys(
    start,
    grad_k,
    grad_v,
    k,
    v,
    grad_out,
    biased,
    sums_products,
    length,
    log2_scale,
    stream,
    word,
    begin_key,
    threshold,
    TAIL: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    numbers = tl.arange(0, QUERIES)
    if TAIL:  # powers are 1 behind the end, and all that they are multiplied with is 0
        sums, product = _halves(tl.load(sums_products + start + numbers, mask=start + numbers < length, other=0))
    else:
        sums, product = _halves(tl.load(sums_products + start + numbers))
    q = _rows(biased, start, numbers, length, HEADS * SIZE, SIZE, TAIL)
    powers = tl.exp2(tl.dot(k, tl.trans(q)) * log2_scale - sums[None, :])
    grad = _rows(grad_out, start, numbers, length, HEADS * SIZE, SIZE, TAIL)
    grad_p = tl.dot(v, tl.trans(grad))
    dropped = powers
    if DROPOUT:
        keys = tl.arange(0, KEYS)[:, None]
        kept = _kept(stream, word, numbers[None, :], keys, start, begin_key, threshold, HEADS, LONGEST)
        dropped = tl.where(kept, powers, 0.0)
    grad_v = tl.dot(dropped.to(grad.dtype), grad, grad_v)
    grad_scores = dropped * grad_p - powers * product[None, :]
    return tl.dot(grad_scores.to(q.dtype), q, grad_k), grad_v


@triton.jit(do_not_specialize=["threshold"])
def blockwise_over_queries(
    grad_out,
    out,
    log_sums,
    query,
    key,
    value,
    bias,
    boundaries,
    seed,
    biased,
    sums_products,
    grad_qkv,
    grad_bias,
    tokens,
    scale,
    log2_scale,
    threshold,
    kept_scale,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The queries' gradients; `biased` queries, and `sums_products` for the kernel over keys."""
    sequence, first, length, head, block = _program(boundaries, HEADS, BLOCKS)
    begin_query, queries = block * QUERIES, tl.arange(0, QUERIES)
    if begin_query >= length:
        return
    size = tl.arange(0, SIZE)
    begin = first.to(tl.int64) * STRIDE + head * SIZE
    begin_out = first.to(tl.int64) * (HEADS * SIZE) + head * SIZE
    q = _biased_rows(query + begin, bias + head * SIZE, begin_query, queries, length, STRIDE, SIZE)
    stream, word = _stream(first, head, seed, threshold, HEADS, LONGEST, DROPOUT)
    grad = _rows(grad_out + begin_out, begin_query, queries, length, HEADS * SIZE, SIZE, True)
    given_out = _rows(out + begin_out, begin_query, queries, length, HEADS * SIZE, SIZE, True)
    product = tl.sum(grad.to(tl.float32) * given_out.to(tl.float32), 1)
    of_bias = tl.sum(grad.to(tl.float32) * tl.load(bias + (2 * HEADS + head) * SIZE + size)[None, :], 1)
    places = begin_query + queries
    inside = places < length
    tl.store(biased + begin_out + places[:, None] * (HEADS * SIZE) + size[None, :], q, mask=inside[:, None])
    sums = tl.load(log_sums + head * tokens + first + places, mask=inside, other=float("inf"))
    product /= kept_scale  # what is kept gets its factor at the end
    tl.store(sums_products + head * tokens + first + places, _joined(sums, product), mask=inside)
    rest, kept_rest = -product, of_bias - product
    grad_q = tl.zeros([QUERIES, SIZE], tl.float32)
    full = length // KEYS * KEYS
    for start in range(0, full, KEYS):
        grad_q = _more_of_queries(
            start, grad_q, q, grad, sums, kept_rest, rest, key + begin, value + begin, length, log2_scale, stream,
            word, begin_query, threshold, False, STRIDE, HEADS, SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    if full < length:
        grad_q = _more_of_queries(
            full, grad_q, q, grad, sums, kept_rest, rest, key + begin, value + begin, length, log2_scale, stream,
            word, begin_query, threshold, True, STRIDE, HEADS, SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    grad_q *= scale * kept_scale
    _store_gradient(grad_q, places, grad_qkv, grad_bias, sequence, first, length, head, block, 0, HEADS, SIZE, SHARES)


@triton.jit(do_not_specialize=["threshold"])
def blockwise_over_keys(
    grad_out,
    biased,
    sums_products,
    key,
    value,
    bias,
    boundaries,
    seed,
    grad_qkv,
    grad_bias,
    tokens,
    scale,
    log2_scale,
    threshold,
    kept_scale,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LONGEST: tl.constexpr,
    DROPOUT: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradients of keys and values; all scores are transposed, [KEYS, QUERIES]."""
    sequence, first, length, head, block = _program(boundaries, HEADS, BLOCKS)
    begin_key, keys = block * KEYS, tl.arange(0, KEYS)
    if begin_key >= length:
        return
    begin = first.to(tl.int64) * STRIDE + head * SIZE
    begin_out = first.to(tl.int64) * (HEADS * SIZE) + head * SIZE
    begin_row = head * tokens + first
    k = _rows(key + begin, begin_key, keys, length, STRIDE, SIZE, True)
    v = _biased_rows(value + begin, bias + (2 * HEADS + head) * SIZE, begin_key, keys, length, STRIDE, SIZE)
    stream, word = _stream(first, head, seed, threshold, HEADS, LONGEST, DROPOUT)
    grad_k = tl.zeros([KEYS, SIZE], tl.float32)
    grad_v = tl.zeros([KEYS, SIZE], tl.float32)
    full = length // QUERIES * QUERIES
    for start in range(0, full, QUERIES):
        grad_k, grad_v = _more_of_keys(
            start, grad_k, grad_v, k, v, grad_out + begin_out, biased + begin_out, sums_products + begin_row,
            length, log2_scale, stream, word, begin_key, threshold, False, HEADS, SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    if full < length:
        grad_k, grad_v = _more_of_keys(
            full, grad_k, grad_v, k, v, grad_out + begin_out, biased + begin_out, sums_products + begin_row,
            length, log2_scale, stream, word, begin_key, threshold, True, HEADS, SIZE, LONGEST, DROPOUT, QUERIES, KEYS,
        )  # fmt: skip
    keys += begin_key
    grad_v *= kept_scale
    grad_k *= scale * kept_scale
    _store_gradient(grad_v, keys, grad_qkv, grad_bias, sequence, first, length, head, block, 2, HEADS, SIZE, SHARES)
    _store_gradient(grad_k, keys, grad_qkv, grad_bias, sequence, first, length, head, block, 1, HEADS, SIZE, SHARES)
