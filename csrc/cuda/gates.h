// Drawing gates on the GPU, and the gate's derivative.
#pragma once
#include "launch.h"

namespace l0::cuda {

constexpr int kSampleVectors = 96;  // what fits the 4 KB of a kernel's arguments

struct SampleVector {
  const void* log_alpha;  // (size,)
  void* z;                // (size,) log_alpha's type
  int32_t* index;         // (round_up(size),)
  int32_t size;
  uint32_t stream;
};

// z, index, count and the expected number of open gates of up to kSampleVectors vectors; see l0kernels.Gates.
struct SampleParams {
  SampleVector vector[kSampleVectors];
  const int64_t* seed;  // (1,)
  uint32_t rank;
  double beta, gamma, zeta;
  double shift;    // of p_open
  float tau;       // open share above which the extent is that of the whole vector
  int32_t* count;  // (vectors, 2)
  void* expected;  // (vectors,), log_alpha's type: sum of p_open; null: not wanted
};
template <typename T>
void sample(const SampleParams& p, int vectors, int32_t largest, const Stream& stream);

// dlog_alpha = dz * dz/dlog_alpha, (n,) each.
template <typename T>
void gate_grad(const T* dz, const T* z, T* dlog_alpha, int64_t n, double beta, double gamma, double zeta,
               const Stream& stream);

}  // namespace l0::cuda
