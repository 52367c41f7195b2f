// One step of independent Lanczos recurrences with full reorthogonalization, in one launch: alpha = <v, w>, w made
// orthogonal to all earlier vectors by classical Gram-Schmidt, twice, beta = ||w||, the next vector w / beta.
//
// One thread block per chain. All sums are in double; their order depends on the sizes only.
#pragma once

#include "launch.h"
#include "platform.h"
#include "sizes.h"

namespace ipca {

constexpr int CHAIN_WARPS = CHAIN_THREADS / WARP;

struct alignas(16) ChainMemory {
  double partial[CHAIN_WARPS];
  // the overlaps with all earlier vectors follow
};

// The sum over a warp's threads, the same in all of them.
__device__ inline double warp_sum(double value) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// overlap[j] = <v_j, w> for j <= step, and at the end <w, w>; one warp per vector.
template <typename T>
__device__ void find_overlaps(double* overlap, const T* basis, int64_t stride, const T* w, int64_t n, int step) {
  for (int j = threadIdx.x / WARP; j <= step + 1; j += CHAIN_WARPS) {
    const T* v = j <= step ? basis + j * stride : w;
    double sum = 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x % WARP; i < n; i += WARP) sum += double(v[i]) * double(w[i]);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) overlap[j] = sum;
  }
  __syncthreads();
}

// w -= sum over j of overlap[j] v_j; what this thread adds to <w, w>.
template <typename T>
__device__ double subtract_overlaps(const double* overlap, const T* basis, int64_t stride, T* w, int64_t n, int step) {
  double squares = 0;
  for (int64_t i = threadIdx.x; i < n; i += CHAIN_THREADS) {
    double left = w[i];
#pragma unroll 8
    for (int j = 0; j <= step; ++j) left -= overlap[j] * double(basis[j * stride + i]);
    w[i] = T(left);
    squares += double(w[i]) * double(w[i]);
  }
  __syncthreads();
  return squares;
}

// Grid: one block per chain. A norm up to `vanished` times the one before is rounding: the space is exhausted.
template <typename T>
__global__ __launch_bounds__(CHAIN_THREADS) void lanczos_step_kernel(Chains<T> chains, double vanished) {
  auto& shared = shared_memory<ChainMemory>();
  double* overlap = reinterpret_cast<double*>(&shared + 1);
  const int64_t chain = blockIdx.x, stride = chains.step_stride, n = chains.n;
  const int step = chains.step;
  T* basis = chains.basis + chain * chains.chain_stride;
  T* w = chains.product + chain * chains.product_stride;

  find_overlaps(overlap, basis, stride, w, n, step);
  const double alpha = overlap[step], before = sqrt(overlap[step + 1]);
  subtract_overlaps(overlap, basis, stride, w, n, step);
  find_overlaps(overlap, basis, stride, w, n, step);
  const double squares = warp_sum(subtract_overlaps(overlap, basis, stride, w, n, step));
  if (threadIdx.x % WARP == 0) shared.partial[threadIdx.x / WARP] = squares;
  __syncthreads();

  double norm = 0;
  for (int i = 0; i < CHAIN_WARPS; ++i) norm += shared.partial[i];
  norm = sqrt(norm);
  norm = norm > vanished * before ? norm : 0;
  const double inverse = norm > 0 ? 1 / norm : 0;
  T* next = basis + (step + 1) * stride;
  for (int64_t i = threadIdx.x; i < n; i += CHAIN_THREADS) next[i] = T(double(w[i]) * inverse);
  if (threadIdx.x == 0) {
    chains.alpha[chain * chains.alpha_stride] = T(alpha);
    chains.beta[chain * chains.beta_stride] = T(norm);
  }
}

}  // namespace ipca
