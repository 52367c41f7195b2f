// Device selection and CUDA errors.
//
// This module has a CUDA runtime of its own (static) beside torch's. Both work on the driver's primary context of a
// device, so pointers and streams are the same; what they keep apart is which device they believe to be current. The
// driver's current context is what counts, and a guard restores exactly that: setting a device instead, even the one
// that was there before, would start a context on it if it had none.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "ldlt.cuh"

namespace ipca {

void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that the next launch does not report it again
  throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                           ")");
}

// The driver's functions come through the runtime: a machine that builds may have no driver to link with.
template <typename Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status), name);
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status), name);
#endif
  if (found == nullptr) throw std::runtime_error(std::string(name) + ": not found in the CUDA driver");
  return reinterpret_cast<Function*>(found);
}

struct Driver {
  CUresult (*current)(CUcontext*) = driver_function<CUresult(CUcontext*)>("cuCtxGetCurrent");
  CUresult (*make_current)(CUcontext) = driver_function<CUresult(CUcontext)>("cuCtxSetCurrent");
};

const Driver& driver() {
  static const Driver found;
  return found;
}

DeviceGuard::DeviceGuard(int device) : before_(nullptr) {
  driver().current(reinterpret_cast<CUcontext*>(&before_));
  check(cudaSetDevice(device), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() { driver().make_current(static_cast<CUcontext>(before_)); }

void try_device(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, ldlt_top_kernel<float>), "loading the kernels");
}

}  // namespace ipca
