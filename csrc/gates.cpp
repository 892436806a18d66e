#include "gates.h"

#include <cstring>

#include "hard_concrete.h"

namespace l0 {

template <typename T>
void compact(const T* z, int64_t size, int32_t* index, int32_t* count) {
  int64_t open = 0;
  for (int64_t i = 0; i < size; ++i) open += z[i] != T(0);
  int64_t at[2] = {open, 0};  // next place of a closed, of an open gate
  for (int64_t i = 0; i < size; ++i) index[at[z[i] != T(0)]++] = int32_t(i);
  const int64_t padded = (size + kAlign - 1) / kAlign * kAlign;
  if (padded > size) std::memset(index + size, 0, sizeof(int32_t) * (padded - size));  // no gates: no index
  count[0] = int32_t(open);
  count[1] = int32_t((open + kAlign - 1) / kAlign * kAlign);
}

template <typename T>
bool any_nan(const T* x, int64_t n) {
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) nan |= x[i] != x[i];
  return nan;
}

template <typename T>
double expected_open(const T* log_alpha, int64_t n, T shift) {
  constexpr int64_t kChunk = 512;
  T p[kChunk];
  double total = 0.0;
  for (int64_t first = 0; first < n; first += kChunk) {
    const int64_t m = n - first < kChunk ? n - first : kChunk;
    kernels<T>().p_open(log_alpha + first, m, shift, p);
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < m; ++i) total += double(p[i]);
  }
  return total;
}

template <typename T>
void gate_grad(const T* dz, const T* z, T* dlog_alpha, int64_t n, T beta, T gamma, T zeta) {
#pragma omp simd  // dlog_alpha may be dz
  for (int64_t i = 0; i < n; ++i)
    dlog_alpha[i] = z[i] > T(0) && z[i] < T(1) ? dz[i] * hard_concrete_grad(z[i], beta, gamma, zeta) : T(0);
}

#define L0_INSTANTIATE(T)                                          \
  template void compact<T>(const T*, int64_t, int32_t*, int32_t*); \
  template bool any_nan<T>(const T*, int64_t);                     \
  template double expected_open<T>(const T*, int64_t, T);          \
  template void gate_grad<T>(const T*, const T*, T*, int64_t, T, T, T);
L0_INSTANTIATE(float)
L0_INSTANTIATE(double)

}  // namespace l0
