// Gate vectors: sampling, the order of open and closed gates, and the gate's derivative.
#pragma once
#include "kernels.h"

namespace l0 {

constexpr int64_t kAlign = 128;  // ALIGN in l0kernels/reference/gates.py

// index: open gates ascending, closed ones ascending, zeros up to a multiple of kAlign; count: [open, open
// rounded up to kAlign]. NaN is open.
template <typename T>
void compact(const T* z, int64_t size, int32_t* index, int32_t* count);

template <typename T>
bool any_nan(const T* x, int64_t n);

// sum of p_open, in double.
template <typename T>
double expected_open(const T* log_alpha, int64_t n, T shift);

// dlog_alpha = dz * dz/dlog_alpha, from z alone.
template <typename T>
void gate_grad(const T* dz, const T* z, T* dlog_alpha, int64_t n, T beta, T gamma, T zeta);

}  // namespace l0
