"""Dropout masks: Philox4x32-7 on an entry's own row and column, so that nothing of size M × K is stored.

One call gives the random words of 8 neighboring columns, 16 bits each: entry ``(m, k)`` reads half ``k % 2`` of word
``k % 8 // 2`` of ``philox(seed, k // 8, m, 0, 0)`` and is dropped where that is below ``threshold = round(65536 p)``.
The mask depends on nothing else: every kernel and ``ipca.ops.dropout.kernel_mask`` draw the same one. Seven rounds pass
BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

import triton
import triton.language as tl


@triton.jit
def kept(seed, offs_m, first_k, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """``(BLOCK_M, BLOCK_K)`` booleans for the rows ``offs_m`` and the columns from ``first_k``, a multiple of 8, on."""
    groups = first_k // 8 + tl.arange(0, BLOCK_K // 8)
    zero = tl.zeros((BLOCK_M, BLOCK_K // 8), dtype=tl.int32)
    column, row = zero + groups[None, :], zero + offs_m[:, None]
    w0, w1, w2, w3 = tl.philox(seed, column, row, zero, zero, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (…, 2, 2), flattened in the order w0, w1, w2, w3
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, (BLOCK_M, BLOCK_K)).to(tl.int32) >= threshold


@triton.jit
def dropped(x, seed, offs_m, first_k, threshold, keep_scale, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """``x`` with the dropped entries 0 and the others times ``keep_scale = 1 / P(kept)``, in the dtype of ``x``."""
    keep = kept(seed, offs_m, first_k, threshold, BLOCK_M, BLOCK_K)
    return tl.where(keep, x.to(tl.float32) * keep_scale, 0.0).to(x.dtype)
