// The three operations as module.cpp and the tests call them. Pointers are device memory, strides count elements, and
// everything is queued on `stream` (a cudaStream_t). ipca/svd/inner_loops.py defines what they compute.
#pragma once

#include <cstdint>

namespace ipca {

// The first k columns of what is left of each matrix: rows x k, a row's entries adjacent.
template <typename T>
struct Panels {
  T* data;
  int64_t batch_stride, row_stride;
  T* growth;
  int64_t growth_batch_stride, growth_stride;
  int64_t* positive;
  const T* tiny;
  int64_t batch, rows;
  int k;
};

// Symmetric matrices p x p, of which the lower triangle counts; inverse and shift are contiguous.
template <typename T>
struct Grams {
  const T* data;
  int64_t batch_stride, row_stride;
  T* inverse;
  T* shift;
  int64_t batch;
  int p;
};

// Chains of vectors of length n, the entries of a vector adjacent; alpha and beta point at the column of this step.
template <typename T>
struct Chains {
  T* basis;
  int64_t step_stride, chain_stride;
  T* product;
  int64_t product_stride;
  T* alpha;
  int64_t alpha_stride;
  T* beta;
  int64_t beta_stride;
  int64_t chains, n;
  int step;
};

template <typename T>
void ldlt_panel(const Panels<T>& panels, void* stream);

template <typename T>
void scaled_cholesky(const Grams<T>& grams, void* stream);

template <typename T>
void lanczos_step(const Chains<T>& chains, void* stream);

// Throws unless the kernels can run on the device.
void try_device(int device);

// Makes the device current for this thread while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* before_;
};

}  // namespace ipca
