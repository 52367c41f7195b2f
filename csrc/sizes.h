// Sizes that are known when the kernels are compiled. Tests on a CPU take smaller ones, too: a few threads then reach
// every loop.
#pragma once

namespace ipca {

#ifdef IPCA_SMALL
constexpr int WARP = 4;
constexpr int PANEL = 8;
constexpr int SIDE = 2;
constexpr int GROUP = 2;
constexpr int BELOW_ROWS = 6;
constexpr int BELOW_THREADS = 4;
constexpr int BLOCK = 4;
constexpr int STACK_ROWS = 16;
constexpr int CHAIN_THREADS = 8;
#else
constexpr int WARP = 32;
constexpr int PANEL = 64;          // most columns of a panel of L D L^T
constexpr int SIDE = 16;           // SIDE x SIDE threads factorize a symmetric block
constexpr int GROUP = 16;          // columns that a row's substitution holds in registers
constexpr int BELOW_ROWS = 64;     // rows below a panel's top that one thread block solves
constexpr int BELOW_THREADS = 128;
constexpr int BLOCK = 32;          // columns at a time in the Cholesky factorization
constexpr int STACK_ROWS = 128;    // rows at a time in the Cholesky factorization
constexpr int CHAIN_THREADS = 512; // threads of one Lanczos chain
#endif

constexpr int SQUARE_THREADS = SIDE * SIDE;

}  // namespace ipca
