// Building blocks of both factorizations: L D L^T of a small symmetric block, and one row solved against it.
//
// Blocks lie in shared memory column by column: lower[j][i] is row i of column j, so that threads which hold rows i
// read neighboring words. Two words of padding spread a transposing copy over the banks.
#pragma once

#include "platform.h"
#include "sizes.h"

namespace ipca {

template <typename T, int N>
using Block = T[N][N + 2];

// tile[j][i] = load(i, j) for ROWS x COLUMNS entries. Neighboring threads take neighboring columns, as global memory
// wants it, and each has AHEAD loads under way before it waits for the first.
template <int ROWS, int COLUMNS, int THREADS, typename T, int STEP, typename Load>
__device__ void fill(T (&tile)[COLUMNS][STEP], Load load) {
  constexpr int EACH = ROWS * COLUMNS / THREADS, AHEAD = EACH < 16 ? EACH : 16;
  static_assert(EACH * THREADS == ROWS * COLUMNS && EACH % AHEAD == 0, "every thread takes as many entries");
  for (int first = threadIdx.x; first < ROWS * COLUMNS; first += AHEAD * THREADS) {
    T held[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) held[u] = load((first + u * THREADS) / COLUMNS, (first + u * THREADS) % COLUMNS);
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) tile[(first + u * THREADS) % COLUMNS][(first + u * THREADS) / COLUMNS] = held[u];
  }
}

// lower = L D L^T in place and without pivoting: L below the diagonal (its ones not stored), D on it.
//
// Called by SQUARE_THREADS threads, after a barrier; ends with one. Only the lower triangle of the first k rows counts.
// A pivot that is NaN or smaller in magnitude than tiny becomes -tiny. `column` is scratch.
//
// Each thread holds PER x PER entries in registers, SIDE apart. A step publishes one column and subtracts its outer
// product. Two columns take turns: while one is read the next may already be written, so a step has one barrier.
template <typename T, int N>
__device__ void factorize_block(Block<T, N>& lower, T (&column)[2][N], int k, T tiny) {
  constexpr int PER = N / SIDE;
  const int row = threadIdx.x % SIDE, col = threadIdx.x / SIDE;
  T a[PER][PER];
#pragma unroll
  for (int r = 0; r < PER; ++r) {
#pragma unroll
    for (int c = 0; c < PER; ++c) a[r][c] = lower[col + c * SIDE][row + r * SIDE];
  }
#pragma unroll
  for (int part = 0; part < PER; ++part) {  // unrolled, so that `a` is indexed by constants and stays in registers
    for (int turn = 0; turn < SIDE; ++turn) {
      const int j = part * SIDE + turn;
      if (j >= k) break;
      T* now = column[j % 2];
      if (col == turn) {
#pragma unroll
        for (int r = 0; r < PER; ++r) now[row + r * SIDE] = a[r][part];
      }
      __syncthreads();
      T pivot = now[j];
      if (!(fabs(pivot) >= tiny)) pivot = -tiny;
#pragma unroll
      for (int r = 0; r < PER; ++r) {
        const int i = row + r * SIDE;
        if (i > j) {
          const T l = now[i] / pivot;
#pragma unroll
          for (int c = part; c < PER; ++c) {
            const int m = col + c * SIDE;
            if (m > j) a[r][c] -= l * now[m];
          }
          if (col == turn) a[r][part] = l;
        }
        if (i == j && col == turn) a[r][part] = pivot;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < PER; ++r) {
#pragma unroll
    for (int c = 0; c < PER; ++c) lower[col + c * SIDE][row + r * SIDE] = a[r][c];
  }
  __syncthreads();
}

// x L^T = b for one row by one thread: row[c * STEP] holds b_c, then x_c, for c < k.
//
// GROUP columns at a time are in registers; their updates by earlier columns are independent of each other, which hides
// the latency of the arithmetic. From column k on, row and `lower` hold zeros up to a multiple of GROUP.
template <typename T, int N, int STEP>
__device__ void solve_row(T* row, const Block<T, N>& lower, int k) {
  for (int first = 0; first < k; first += GROUP) {
    T x[GROUP];
#pragma unroll
    for (int c = 0; c < GROUP; ++c) x[c] = row[(first + c) * STEP];
    for (int j = 0; j < first; ++j) {
      const T known = row[j * STEP];
#pragma unroll
      for (int c = 0; c < GROUP; ++c) x[c] -= known * lower[j][first + c];
    }
#pragma unroll
    for (int c = 0; c < GROUP; ++c) {
#pragma unroll
      for (int later = c + 1; later < GROUP; ++later) x[later] -= x[c] * lower[first + c][first + later];
    }
#pragma unroll
    for (int c = 0; c < GROUP; ++c) row[(first + c) * STEP] = x[c];
  }
}

}  // namespace ipca
