// The Python module ipca._C: raw pointers, strides and a stream as integers. Nothing of PyTorch is compiled in or linked,
// so one build serves every version of it. ipca/svd/inner_loops.py is the only caller and has checked what it passes.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launch.h"
#include "sizes.h"

namespace {

using Address = std::uintptr_t;  // 0 is the default stream

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void ldlt_panel(int device, Address stream, Address data, int64_t batch_stride, int64_t row_stride, Address growth,
                int64_t growth_batch_stride, int64_t growth_stride, Address positive, Address tiny, int64_t batch,
                int64_t rows, int k) {
  if (k < 1 || k > ipca::PANEL || k > rows) {
    throw std::invalid_argument("A panel of " + std::to_string(k) + " columns and " + std::to_string(rows) +
                                " rows; 1 to " + std::to_string(ipca::PANEL) + " columns fit, and no fewer rows.");
  }
  const ipca::DeviceGuard guard(device);
  ipca::ldlt_panel<T>({pointer<T>(data), batch_stride, row_stride, pointer<T>(growth), growth_batch_stride,
                       growth_stride, pointer<int64_t>(positive), pointer<T>(tiny), batch, rows, k},
                      pointer<void>(stream));
}

template <typename T>
void scaled_cholesky(int device, Address stream, Address data, int64_t batch_stride, int64_t row_stride,
                     Address inverse, Address shift, int64_t batch, int p) {
  const ipca::DeviceGuard guard(device);
  ipca::scaled_cholesky<T>(
      {pointer<T>(data), batch_stride, row_stride, pointer<T>(inverse), pointer<T>(shift), batch, p},
      pointer<void>(stream));
}

template <typename T>
void lanczos_step(int device, Address stream, Address basis, int64_t step_stride, int64_t chain_stride,
                  Address product, int64_t product_stride, Address alpha, int64_t alpha_stride, Address beta,
                  int64_t beta_stride, int64_t chains, int64_t n, int step) {
  const ipca::DeviceGuard guard(device);
  ipca::lanczos_step<T>({pointer<T>(basis), step_stride, chain_stride, pointer<T>(product), product_stride,
                         pointer<T>(alpha), alpha_stride, pointer<T>(beta), beta_stride, chains, n, step},
                        pointer<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("sources") = IPCA_SOURCES;
  m.attr("panel") = ipca::PANEL;
  m.def("try_device", &ipca::try_device, "Raise unless the kernels can run on this device.");
  m.def("ldlt_panel_float32", &ldlt_panel<float>);
  m.def("ldlt_panel_float64", &ldlt_panel<double>);
  m.def("scaled_cholesky_float32", &scaled_cholesky<float>);
  m.def("scaled_cholesky_float64", &scaled_cholesky<double>);
  m.def("lanczos_step_float32", &lanczos_step<float>);
  m.def("lanczos_step_float64", &lanczos_step<double>);
}
