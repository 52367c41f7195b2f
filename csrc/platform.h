// The platform of the kernels: CUDA, or in tests a CPU (tests/csrc/host_shim.h).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef IPCA_HOST
#include "host_shim.h"
#else
#include <cuda_runtime.h>

namespace ipca {

// Throws std::runtime_error with CUDA's words and what was being done.
void check(cudaError_t status, const char* doing);

// The thread block's shared memory. Always dynamic, so that the CPU can fill it with NaN before a block.
template <typename Memory>
__device__ Memory& shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<Memory*>(bytes);
}

template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            cudaStream_t stream, Parameters... arguments) {
  constexpr size_t GRANTED = 48 << 10;  // more has to be asked for
  if (shared > GRANTED) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
  }
  kernel<<<grid, threads, shared, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace ipca
#endif
