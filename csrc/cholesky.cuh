// T, upper triangular, such that X T is orthonormal where G = X^T X: T = D K^-T with D = diag(G)^-1/2 and
// D G D + shift I = K K^T. The shift is 0, or the least of 16 p eps 100^i with which no pivot falls below 16 p eps.
//
// One thread block per matrix. [D G D + shift I; D] K^-T = [K; T], so one factorization over stacked rows gives both, a
// block of columns after the other:
//
//     [K; T]_J = ([D G D + shift I; D]_J - sum over earlier blocks m of [K; T]_m (K_Jm)^T) (K_JJ)^-T
//
// K lies below the diagonal blocks of the output and T above and on them, so nothing else is needed. G is only read: a
// retry with a larger shift starts again.
//
// Sources: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices", SIAM J.
// Sci. Comput. 42 (2020); the scaling is van der Sluis's.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace ipca {

constexpr int TILE = 4;  // a thread adds up TILE x TILE entries
constexpr int ATTEMPTS = 8;
static_assert(STACK_ROWS / TILE * (BLOCK / TILE) == SQUARE_THREADS, "a tile for every thread");

template <typename T>
struct alignas(16) CholeskyMemory {
  Block<T, BLOCK> lower;             // L and D of the diagonal block, K = L sqrt(D)
  T column[2][BLOCK];
  T root[BLOCK];                     // sqrt(D)
  T rows[BLOCK][STACK_ROWS + 1];     // what is being computed, [column][row]
  T left[BLOCK][STACK_ROWS + 2];     // the same rows in an earlier block of columns
  T right[BLOCK][BLOCK + 2];         // the diagonal block's rows there
  // the p scales D follow
};

// One matrix, and the block of columns [J, J + width) that is being computed.
template <typename T>
struct Stack {
  const T* gram;
  int64_t row_stride;
  T* out;
  const T* scale;
  int p, J, width;

  // Stacked rows that are not zero: rows of K from J on, then those of T through the diagonal block.
  __device__ int count() const { return p + width; }
  __device__ bool is_inverse(int v) const { return v >= p - J; }
  __device__ int row(int v) const { return is_inverse(v) ? v - (p - J) : J + v; }

  __device__ bool in_gram(int v, int c) const { return !is_inverse(v) && c < width; }

  // Whether the output holds row v in the earlier block of columns at m; of T it holds no zeros.
  __device__ bool stored(int v, int m) const { return v < count() && (!is_inverse(v) || row(v) < m + BLOCK); }

  // Row v, column J + c, before anything is subtracted; `g` is the entry of G where row v belongs to K.
  __device__ T start(int v, int c, T g, T shift) const {
    if (v >= count() || c >= width) return 0;
    const int i = row(v), j = J + c;
    if (is_inverse(v)) return i == j ? scale[i] : T(0);
    if (i == j && g <= 0) return 1 + shift;
    return g * scale[j] * scale[i] + (i == j ? shift : T(0));
  }
};

// shared.rows = stacked rows [first, first + STACK_ROWS) of the block: where they start, less the earlier blocks.
template <typename T>
__device__ void update_rows(CholeskyMemory<T>& shared, const Stack<T>& stack, int first, T shift) {
  fill<STACK_ROWS, BLOCK, SQUARE_THREADS>(shared.rows, [&](int i, int c) {
    return stack.in_gram(first + i, c) ? stack.gram[stack.row(first + i) * stack.row_stride + stack.J + c] : T(0);
  });
  const int row = threadIdx.x / (BLOCK / TILE) * TILE, col = threadIdx.x % (BLOCK / TILE) * TILE;
  T sum[TILE][TILE] = {};
  // Row i of T is zero before the block that holds column i.
  for (int m = stack.is_inverse(first) ? stack.row(first) / BLOCK * BLOCK : 0; m < stack.J; m += BLOCK) {
    fill<STACK_ROWS, BLOCK, SQUARE_THREADS>(shared.left, [&](int i, int c) {
      return stack.stored(first + i, m) ? stack.out[int64_t(stack.row(first + i)) * stack.p + m + c] : T(0);
    });
    fill<BLOCK, BLOCK, SQUARE_THREADS>(shared.right, [&](int i, int c) {
      return i < stack.width ? stack.out[int64_t(stack.J + i) * stack.p + m + c] : T(0);
    });
    __syncthreads();
    for (int c = 0; c < BLOCK; ++c) {
#pragma unroll
      for (int a = 0; a < TILE; ++a) {
#pragma unroll
        for (int b = 0; b < TILE; ++b) sum[a][b] += shared.left[c][row + a] * shared.right[c][col + b];
      }
    }
    __syncthreads();
  }
  __syncthreads();  // shared.rows is filled, also where there was no earlier block
#pragma unroll
  for (int a = 0; a < TILE; ++a) {
#pragma unroll
    for (int b = 0; b < TILE; ++b) {
      T& entry = shared.rows[col + b][row + a];
      entry = stack.start(first + row + a, col + b, entry, shift) - sum[a][b];
    }
  }
  __syncthreads();
}

// The diagonal block, whose rows come first; false where a pivot falls below `least`.
template <typename T>
__device__ bool factorize_diagonal(CholeskyMemory<T>& shared, int width, T least) {
  for (int e = threadIdx.x; e < BLOCK * BLOCK; e += SQUARE_THREADS) {
    const int i = e % BLOCK, j = e / BLOCK;
    shared.lower[j][i] = j <= i ? shared.rows[j][i] : T(0);
  }
  __syncthreads();
  factorize_block<T, BLOCK>(shared.lower, shared.column, width, T(0));
  for (int j = threadIdx.x; j < width; j += SQUARE_THREADS) shared.root[j] = sqrt(shared.lower[j][j]);
  bool positive = true;
  for (int j = 0; j < width; ++j) positive = positive && shared.lower[j][j] >= least;
  return positive;
}

// Every block of columns; false where the shift is too small.
template <typename T>
__device__ bool factorize(CholeskyMemory<T>& shared, Stack<T> stack, T shift, T least) {
  for (stack.J = 0; stack.J < stack.p; stack.J += BLOCK) {
    stack.width = stack.p - stack.J < BLOCK ? stack.p - stack.J : BLOCK;
    for (int first = 0; first < stack.count(); first += STACK_ROWS) {
      update_rows(shared, stack, first, shift);
      if (first == 0 && !factorize_diagonal(shared, stack.width, least)) return false;
      for (int i = threadIdx.x; i < STACK_ROWS; i += SQUARE_THREADS) {
        solve_row<T, BLOCK, STACK_ROWS + 1>(&shared.rows[0][i], shared.lower, stack.width);
      }
      __syncthreads();
      for (int e = threadIdx.x; e < STACK_ROWS * BLOCK; e += SQUARE_THREADS) {
        const int v = first + e / BLOCK, c = e % BLOCK;
        if (v < stack.width || v >= stack.count() || c >= stack.width) continue;  // K_JJ is not needed any more
        stack.out[int64_t(stack.row(v)) * stack.p + stack.J + c] = shared.rows[c][e / BLOCK] / shared.root[c];
      }
      __syncthreads();
    }
  }
  return true;
}

// Grid: one block per matrix.
template <typename T>
__global__ __launch_bounds__(SQUARE_THREADS) void scaled_cholesky_kernel(Grams<T> grams, T least) {
  auto& shared = shared_memory<CholeskyMemory<T>>();
  T* scale = reinterpret_cast<T*>(&shared + 1);
  const int64_t matrix = blockIdx.x;
  const int p = grams.p;
  const T* gram = grams.data + matrix * grams.batch_stride;
  T* out = grams.inverse + matrix * p * p;

  for (int i = threadIdx.x; i < p; i += SQUARE_THREADS) {
    const T g = gram[i * (grams.row_stride + 1)];
    scale[i] = g > 0 ? 1 / sqrt(g) : T(0);  // read behind the barriers of update_rows
  }
  const Stack<T> stack{gram, grams.row_stride, out, scale, p, 0, 0};
  T shift = 0, retry = least;
  bool done = false;
  for (int attempt = 0; attempt < ATTEMPTS && !done; ++attempt) {
    if (attempt > 0) {
      shift = retry;
      retry *= 100;
    }
    done = factorize(shared, stack, shift, least);
  }
  for (int64_t e = threadIdx.x; e < int64_t(p) * p; e += SQUARE_THREADS) {
    if (!done) out[e] = T(NAN);  // no shift helps a G that is not finite
    else if (e % p < e / p) out[e] = 0;
  }
  if (threadIdx.x == 0) grams.shift[matrix] = shift;
}

}  // namespace ipca
