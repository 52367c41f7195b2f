// A CPU implementation of what the kernels use of CUDA, for tests: a thread for every thread of a block, blocks in turn.
//
// __syncthreads is a barrier, so a thread sanitizer reports a missing one as a data race. IPCA_WITHOUT_BARRIER, such as
// block.cuh:57, leaves out the barrier of that line. Every block finds its shared memory filled with NaN.
#pragma once

#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "launch.h"
#include "sizes.h"

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;

namespace ipca::host {

// Two barriers in turn. A thread sanitizer takes leaving a barrier as ordered after every arrival so far, and a thread
// may leave late, when others have arrived for the next time: with one barrier it would take their work for ordered.
class Barrier {
 public:
  explicit Barrier(int threads) {
    for (auto& barrier : barriers_) pthread_barrier_init(&barrier, nullptr, unsigned(threads));
  }
  ~Barrier() {
    for (auto& barrier : barriers_) pthread_barrier_destroy(&barrier);
  }
  Barrier(const Barrier&) = delete;

  // `turn` is the calling thread's own, 0 at first.
  void wait(int& turn) {
    pthread_barrier_wait(&barriers_[turn]);
    turn = 1 - turn;
  }

 private:
  pthread_barrier_t barriers_[2];
};

// What the threads of a block have in common.
struct Ranks {
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<double> exchanged;
  std::vector<std::max_align_t> shared;

  Ranks(int threads, size_t bytes) : all(threads), exchanged(threads), shared(bytes / sizeof(std::max_align_t) + 1) {
    for (int first = 0; first < threads; first += WARP) {
      warps.push_back(std::make_unique<Barrier>(threads - first < WARP ? threads - first : WARP));
    }
  }
};

inline thread_local Ranks* team;
inline thread_local int block_turn, warp_turn;

inline void wait_for_block() { team->all.wait(block_turn); }

inline void synchronize(const char* file, int line) {
  static const char* const without = std::getenv("IPCA_WITHOUT_BARRIER");
  if (without != nullptr) {
    const std::string path = file;
    if (path.substr(path.rfind('/') + 1) + ":" + std::to_string(line) == without) return;
  }
  wait_for_block();
}

}  // namespace ipca::host

inline thread_local dim3 threadIdx, blockIdx;

#define __syncthreads() ipca::host::synchronize(__FILE__, __LINE__)

inline double __shfl_xor_sync(unsigned, double value, int distance) {
  auto& team = *ipca::host::team;
  auto& warp = *team.warps[threadIdx.x / ipca::WARP];
  team.exchanged[threadIdx.x] = value;
  warp.wait(ipca::host::warp_turn);
  const double other = team.exchanged[threadIdx.x ^ unsigned(distance)];
  warp.wait(ipca::host::warp_turn);
  return other;
}

namespace ipca {

template <typename Memory>
Memory& shared_memory() {
  return *reinterpret_cast<Memory*>(host::team->shared.data());
}

template <typename... Parameters>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t,
            Parameters... arguments) {
  host::Ranks team(threads, shared);
  const auto run = [&](int thread) {
    host::team = &team;
    threadIdx = dim3(unsigned(thread));
    for (unsigned block = 0; block < grid.x * grid.y; ++block) {
      blockIdx = dim3(block % grid.x, block / grid.x);
      if (thread == 0) std::memset(team.shared.data(), 0xFF, team.shared.size() * sizeof(team.shared[0]));
      host::wait_for_block();
      kernel(arguments...);
      host::wait_for_block();
    }
  };
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) running.emplace_back(run, thread);
  for (auto& thread : running) thread.join();
}

// The only device. Defined here, as only launch.cu includes this file.
DeviceGuard::DeviceGuard(int) : before_(nullptr) {}
DeviceGuard::~DeviceGuard() { before_ = nullptr; }
void try_device(int) {}

}  // namespace ipca
