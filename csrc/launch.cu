// Grids, shared memory and error checks.
#include "launch.h"

#include <limits>

#include "cholesky.cuh"
#include "lanczos.cuh"
#include "ldlt.cuh"
#ifndef IPCA_HOST
#include "device.cuh"
#endif

namespace ipca {

template <typename T>
void ldlt_panel(const Panels<T>& panels, void* stream) {
  if (panels.batch == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto batch = unsigned(panels.batch);
  launch("ldlt_top_kernel", ldlt_top_kernel<T>, dim3(batch), SQUARE_THREADS, sizeof(TopMemory<T>), queue, panels);
  const int64_t below = panels.rows - panels.k;
  if (below == 0) return;
  const auto tiles = unsigned((below + BELOW_ROWS - 1) / BELOW_ROWS);
  launch("ldlt_below_kernel", ldlt_below_kernel<T>, dim3(batch, tiles), BELOW_THREADS, sizeof(BelowMemory<T>), queue,
         panels);
}

template <typename T>
void scaled_cholesky(const Grams<T>& grams, void* stream) {
  if (grams.batch == 0) return;
  const T least = 16 * T(grams.p) * std::numeric_limits<T>::epsilon();
  const size_t shared = sizeof(CholeskyMemory<T>) + size_t(grams.p) * sizeof(T);
  launch("scaled_cholesky_kernel", scaled_cholesky_kernel<T>, dim3(unsigned(grams.batch)), SQUARE_THREADS, shared,
         static_cast<cudaStream_t>(stream), grams, least);
}

template <typename T>
void lanczos_step(const Chains<T>& chains, void* stream) {
  if (chains.chains == 0) return;
  const double vanished = 64 * double(std::numeric_limits<T>::epsilon());
  const size_t shared = sizeof(ChainMemory) + size_t(chains.step + 2) * sizeof(double);
  launch("lanczos_step_kernel", lanczos_step_kernel<T>, dim3(unsigned(chains.chains)), CHAIN_THREADS, shared,
         static_cast<cudaStream_t>(stream), chains, vanished);
}

template void ldlt_panel(const Panels<float>&, void*);
template void ldlt_panel(const Panels<double>&, void*);
template void scaled_cholesky(const Grams<float>&, void*);
template void scaled_cholesky(const Grams<double>&, void*);
template void lanczos_step(const Chains<float>&, void*);
template void lanczos_step(const Chains<double>&, void*);

}  // namespace ipca
