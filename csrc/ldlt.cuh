// A = L D L^T without pivoting: the first k columns of what is left of each matrix, in place.
//
// Two kernels. One thread block per matrix factorizes the k x k block on top; then many solve the rows below it.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace ipca {

template <typename T>
struct alignas(16) TopMemory {
  Block<T, PANEL> lower;
  T column[2][PANEL];
};

// Grid: one block per matrix.
template <typename T>
__global__ __launch_bounds__(SQUARE_THREADS) void ldlt_top_kernel(Panels<T> panels) {
  auto& shared = shared_memory<TopMemory<T>>();
  const int64_t matrix = blockIdx.x;
  const int k = panels.k, thread = threadIdx.x;
  T* top = panels.data + matrix * panels.batch_stride;

  fill<PANEL, PANEL, SQUARE_THREADS>(shared.lower, [&](int i, int j) {
    return i < k && j <= i ? top[i * panels.row_stride + j] : T(0);
  });
  __syncthreads();
  factorize_block<T, PANEL>(shared.lower, shared.column, k, panels.tiny[matrix]);

  for (int e = thread; e < PANEL * PANEL; e += SQUARE_THREADS) {
    const int i = e / PANEL, j = e % PANEL;
    if (i < k && j <= i) top[i * panels.row_stride + j] = shared.lower[j][i];
  }
  for (int i = thread; i < k; i += SQUARE_THREADS) {
    T grown = fabs(shared.lower[i][i]);
    for (int j = 0; j < i; ++j) {
      const T l = shared.lower[j][i];
      grown += l * l * fabs(shared.lower[j][j]);
    }
    panels.growth[matrix * panels.growth_batch_stride + i * panels.growth_stride] += grown;
  }
  if (thread == 0) {
    int positive = 0;
    for (int j = 0; j < k; ++j) positive += shared.lower[j][j] > 0;
    panels.positive[matrix] += positive;
  }
}

template <typename T>
struct alignas(16) BelowMemory {
  Block<T, PANEL> lower;
  T rows[PANEL][BELOW_ROWS + 1];
};

// Grid: matrices x tiles of BELOW_ROWS rows. A tile comes through shared memory, where threads that read along a row,
// as global memory wants it, hand over to threads that hold a row each.
template <typename T>
__global__ __launch_bounds__(BELOW_THREADS) void ldlt_below_kernel(Panels<T> panels) {
  auto& shared = shared_memory<BelowMemory<T>>();
  const int64_t matrix = blockIdx.x, first = panels.k + int64_t(blockIdx.y) * BELOW_ROWS;
  const int k = panels.k, thread = threadIdx.x;
  const int rows = int(panels.rows - first < BELOW_ROWS ? panels.rows - first : BELOW_ROWS);
  const T* top = panels.data + matrix * panels.batch_stride;
  T* below = panels.data + matrix * panels.batch_stride + first * panels.row_stride;
  T* growth = panels.growth + matrix * panels.growth_batch_stride + first * panels.growth_stride;

  fill<PANEL, PANEL, BELOW_THREADS>(shared.lower, [&](int i, int j) {
    return i < k && j <= i ? top[i * panels.row_stride + j] : T(0);
  });
  fill<BELOW_ROWS, PANEL, BELOW_THREADS>(shared.rows, [&](int i, int j) {
    return i < rows && j < k ? below[i * panels.row_stride + j] : T(0);
  });
  __syncthreads();

  for (int i = thread; i < rows; i += BELOW_THREADS) {
    solve_row<T, PANEL, BELOW_ROWS + 1>(&shared.rows[0][i], shared.lower, k);
    T grown = 0;
    for (int j = 0; j < k; ++j) {
      const T pivot = shared.lower[j][j], l = shared.rows[j][i] / pivot;
      shared.rows[j][i] = l;
      grown += l * l * fabs(pivot);
    }
    growth[i * panels.growth_stride] += grown;
  }
  __syncthreads();

  for (int e = thread; e < rows * PANEL; e += BELOW_THREADS) {
    const int i = e / PANEL, j = e % PANEL;
    if (j < k) below[i * panels.row_stride + j] = shared.rows[j][i];
  }
}

}  // namespace ipca
