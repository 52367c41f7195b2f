// Runs the kernels on a CPU: calls from one file, the arrays as they are afterward into another.
//
// A call is five int64 (operation, bytes of a float, numbers, arrays, 0), its numbers, and for each array its size in
// bytes and the bytes. The numbers are those of the structs in csrc/launch.h, pointers as offsets into their arrays.
#include <cstdint>
#include <fstream>
#include <vector>

#include "launch.cu"

#ifndef IPCA_SINGLE
#define IPCA_SINGLE float
#endif

using Numbers = std::vector<int64_t>;
using Arrays = std::vector<std::vector<char>>;

template <typename T>
T* at(Arrays& arrays, int i, int64_t offset) {
  return reinterpret_cast<T*>(arrays[i].data()) + offset;
}

template <typename T>
void run(int64_t operation, const Numbers& n, Arrays& a) {
  if (operation == 0) {
    ipca::ldlt_panel<T>({at<T>(a, 0, n[0]), n[1], n[2], at<T>(a, 1, n[3]), n[4], n[5], at<int64_t>(a, 2, 0),
                         at<T>(a, 3, 0), n[6], n[7], int(n[8])},
                        nullptr);
  } else if (operation == 1) {
    ipca::scaled_cholesky<T>({at<T>(a, 0, n[0]), n[1], n[2], at<T>(a, 1, 0), at<T>(a, 2, 0), n[3], int(n[4])}, nullptr);
  } else {
    ipca::lanczos_step<T>({at<T>(a, 0, n[0]), n[1], n[2], at<T>(a, 1, n[3]), n[4], at<T>(a, 2, n[5]), n[6],
                           at<T>(a, 3, n[7]), n[8], n[9], n[10], int(n[11])},
                          nullptr);
  }
}

int main(int, char** arguments) {
  std::ifstream in(arguments[1], std::ios::binary);
  std::ofstream out(arguments[2], std::ios::binary);
  int64_t head[5];
  while (in.read(reinterpret_cast<char*>(head), sizeof head)) {
    Numbers numbers(head[2]);
    in.read(reinterpret_cast<char*>(numbers.data()), int64_t(numbers.size() * sizeof(int64_t)));
    Arrays arrays(head[3]);
    for (auto& array : arrays) {
      int64_t bytes;
      in.read(reinterpret_cast<char*>(&bytes), sizeof bytes);
      array.resize(bytes);
      in.read(array.data(), bytes);
    }
    head[1] == 8 ? run<double>(head[0], numbers, arrays) : run<IPCA_SINGLE>(head[0], numbers, arrays);
    for (auto& array : arrays) out.write(array.data(), int64_t(array.size()));
  }
}
