"""The backward pass of kernels/short_attention.py for Hopper's tensor cores, in Gluon, where layouts are said by hand.

A product that goes on by itself reads shared memory until it is waited for. The wait names what it reads: else the
compiler would take that memory for free from the product's start, and give it to what comes between.

Triton's compiler puts P' and dS through shared memory twice, since dV and dK want them transposed, and keeps all scores
of a head in registers: one program on a multiprocessor. Here queries are taken in two halves, P' and dS are stored
once, and the products read them from there in either direction: two programs fit. The gradients leave through the
inputs' shared memory, which nobody reads any more.
"""
# ruff: noqa: N803, N806 - Triton's spelling of compile-time values

from kernels.build import KernelsUnavailable

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

    _barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before Triton 3.7
except (ImportError, AttributeError) as error:  # Gluon's names move between Triton's versions
    raise KernelsUnavailable(f"this Triton's Gluon is another ({error})") from error

WARPS = 4
_HALF = gl.constexpr(64)  # queries that are taken at a time


@gluon.jit
def _folded(bits, BY: gl.constexpr):
    product = bits.to(gl.uint64) * BY
    return (product >> 32).to(gl.uint32) ^ product.to(gl.uint32)


@gluon.jit
def _kept(first, head, queries, keys, seed, threshold, HEADS: gl.constexpr, LONGEST: gl.constexpr):
    """As kernels/short_attention.py's, of these queries [Q, 1] and keys [1, K]."""
    numbers = ((first + (queries & 0x77)) * HEADS + head) * LONGEST + (keys & 0x77)
    bits = _folded((numbers + gl.load(seed)).to(gl.uint32, bitcast=True), 0xED5AD4BB)
    bits = _folded(bits ^ gl.load(seed + 1).to(gl.uint32, bitcast=True), 0xAC4C1B51)
    bits = gl.where((queries & 8) != 0, _folded(bits, 0xC2B2AE3D), bits)
    return (bits << ((keys & 8) * 2).to(gl.uint32)) >= (threshold.to(gl.uint32) << 16)


@gluon.jit
def _places(first, head, STRIDE: gl.constexpr, SIZE: gl.constexpr, LONGEST: gl.constexpr, ROWS: gl.constexpr):
    tokens = first.to(gl.int64) + gl.arange(0, LONGEST, gl.SliceLayout(1, ROWS))
    return tokens[:, None] * STRIDE + head * SIZE + gl.arange(0, SIZE, gl.SliceLayout(0, ROWS))[None, :]


@gluon.jit
def _with_bias(numbers, bias, head, PART: gl.constexpr, HEADS: gl.constexpr, SIZE: gl.constexpr, ROWS: gl.constexpr):
    added = gl.load(bias + (PART * HEADS + head) * SIZE + gl.arange(0, SIZE, gl.SliceLayout(0, ROWS)))
    return (numbers.to(gl.float32) + added[None, :]).to(numbers.dtype)


@gluon.jit
def _store_gradient(
    buffer,
    grad_qkv,
    grad_bias,
    boundaries,
    sequence,
    head,
    PART: gl.constexpr,
    HEADS: gl.constexpr,
    SIZE: gl.constexpr,
    LONGEST: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Of query, key or value, which lies in shared memory; and the sequence's share of that of its bias: a sum of what
    was rounded, where Triton's kernel sums fp32."""
    first = gl.load(boundaries + sequence, volatile=True)  # again, so that no addresses stay in registers till here
    length = gl.load(boundaries + sequence + 1, volatile=True) - first
    rounded = buffer.load(ROWS)
    inside = (gl.arange(0, LONGEST, gl.SliceLayout(1, ROWS)) < length)[:, None]
    places = _places(first, head, 3 * HEADS * SIZE, SIZE, LONGEST, ROWS) + PART * HEADS * SIZE
    gl.store(grad_qkv + places, rounded, mask=inside)
    share = grad_bias + ((sequence * 3 + PART) * HEADS + head) * SIZE + gl.arange(0, SIZE, gl.SliceLayout(0, ROWS))
    gl.store(share, gl.sum(rounded.to(gl.float32), 0))


@gluon.jit(do_not_specialize=["threshold"])
def attention_backward(
    grad_out,
    query,
    key,
    value,
    bias,
    boundaries,
    seed,
    grad_qkv,
    grad_bias,
    scale,
    log2_scale,
    threshold,
    kept_scale,
    STRIDE: gl.constexpr,
    HEADS: gl.constexpr,
    SIZE: gl.constexpr,
    LONGEST: gl.constexpr,
    DROPOUT: gl.constexpr,
):
    """Arguments as those of kernels/short_attention.py's kernel; SIZE is 64, and there are 4 warps."""
    sequence = gl.program_id(0) // HEADS
    head = gl.program_id(0) % HEADS
    first = gl.load(boundaries + sequence)
    length = gl.load(boundaries + sequence + 1) - first
    if length == 0:
        return
    dtype: gl.constexpr = query.dtype.element_ty
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])  # as memory is read and written
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LONGEST, 16])
    GRADIENTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    inside = (gl.arange(0, LONGEST, gl.SliceLayout(1, ROWS)) < length)[:, None]
    places = _places(first, head, STRIDE, SIZE, LONGEST, ROWS)
    q_given = gl.load(query + places, mask=inside, other=0.0)
    k_given = gl.load(key + places, mask=inside, other=0.0)
    v_given = gl.load(value + places, mask=inside, other=0.0)
    g_given = gl.load(grad_out + _places(first, head, HEADS * SIZE, SIZE, LONGEST, ROWS), mask=inside, other=0.0)
    q_given = _with_bias(q_given, bias, head, 0, HEADS, SIZE, ROWS)
    k_given = _with_bias(k_given, bias, head, 1, HEADS, SIZE, ROWS)
    v_given = _with_bias(v_given, bias, head, 2, HEADS, SIZE, ROWS)
    q = gl.allocate_shared_memory(dtype, [LONGEST, SIZE], SHARED, q_given)
    k = gl.allocate_shared_memory(dtype, [LONGEST, SIZE], SHARED, k_given)
    v = gl.allocate_shared_memory(dtype, [LONGEST, SIZE], SHARED, v_given)
    g = gl.allocate_shared_memory(dtype, [LONGEST, SIZE], SHARED, g_given)
    dropped_shared = gl.allocate_shared_memory(dtype, [_HALF, LONGEST], SHARED)
    grad_scores_shared = gl.allocate_shared_memory(dtype, [LONGEST, LONGEST], SHARED)
    fence_async_shared()  # what was stored is there for the tensor cores

    keys = gl.arange(0, LONGEST, gl.SliceLayout(0, SCORES))[None, :]
    grad_v = gl.zeros([LONGEST, SIZE], gl.float32, GRADIENTS)
    for begin in gl.static_range(0, LONGEST, _HALF):
        queries = begin + gl.arange(0, _HALF, gl.SliceLayout(1, SCORES))
        nothing = gl.zeros([_HALF, LONGEST], gl.float32, SCORES)
        q_half, g_half = q.slice(begin, _HALF), g.slice(begin, _HALF)
        scores = warpgroup_mma(q_half, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        grad_p = warpgroup_mma(g_half, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores, _, _ = warpgroup_mma_wait(1, [scores, q, k])
        if length < LONGEST:
            scores = gl.where(keys < length, scores, float("-inf"))
        p = gl.exp2(scores * log2_scale - (gl.max(scores, 1) * log2_scale)[:, None])
        p = p * (1 / gl.sum(p, 1))[:, None]
        grad_p, _, _ = warpgroup_mma_wait(0, [grad_p, g, v])
        dropped = p
        if DROPOUT:  # what is kept gets its factor at the end
            kept = _kept(first, head, queries[:, None], keys, seed, threshold, HEADS, LONGEST)
            dropped = gl.where(kept, p, 0.0)
            grad_p = gl.where(kept, grad_p, 0.0)
        dropped_shared.store(dropped.to(dtype))
        fence_async_shared()
        grad_v = warpgroup_mma(dropped_shared.permute((1, 0)), g_half, grad_v, use_acc=begin > 0, is_async=True)
        grad_scores = p * (grad_p - gl.sum(grad_p * p, 1)[:, None])
        grad_scores_shared.slice(begin, _HALF).store(grad_scores.to(dtype))
        grad_v, _, _ = warpgroup_mma_wait(0, [grad_v, dropped_shared, g])
        _barrier()  # every warp's product has read `dropped_shared`
    fence_async_shared()

    if DROPOUT:
        scale = scale * kept_scale
        grad_v *= kept_scale
    nothing = gl.zeros([LONGEST, SIZE], gl.float32, GRADIENTS)
    grad_q = warpgroup_mma(grad_scores_shared, k, nothing, use_acc=False, is_async=True)
    v.store(grad_v.to(dtype))
    _store_gradient(v, grad_qkv, grad_bias, boundaries, sequence, head, 2, HEADS, SIZE, LONGEST, ROWS)
    grad_k = warpgroup_mma(grad_scores_shared.permute((1, 0)), q, nothing, use_acc=False, is_async=True)
    grad_q, _, _ = warpgroup_mma_wait(1, [grad_q, grad_scores_shared, k])
    g.store((grad_q * scale).to(dtype))
    _store_gradient(g, grad_qkv, grad_bias, boundaries, sequence, head, 0, HEADS, SIZE, LONGEST, ROWS)
    grad_k, _, _ = warpgroup_mma_wait(0, [grad_k, grad_scores_shared, q])
    k.store((grad_k * scale).to(dtype))
    _store_gradient(k, grad_qkv, grad_bias, boundaries, sequence, head, 1, HEADS, SIZE, LONGEST, ROWS)
