#include "pack.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "half.h"

namespace l0 {
namespace {

template <typename F>
void with_type(DType t, F f) {
  switch (t) {
    case DType::kFloat:
      return f(float{});
    case DType::kDouble:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kHalf:
      return f(Half{});
  }
  throw std::invalid_argument("element type: expected 0..3");
}

inline int64_t at(const PackAxis& axis, int64_t i) { return axis.index ? axis.index[i] : i; }

template <typename C>
inline bool wants_grad(C z, bool full_grad) {
  return full_grad ? z != C(0) : !(z <= C(0) || z >= C(1));
}

// C: the type of the gates and of the arithmetic.
template <typename C, typename S, typename D>
void pack_as(const PackParams& p, int num_threads) {
  const C* z_row = static_cast<const C*>(p.rows.z);
  const C* z_col = static_cast<const C*>(p.cols.z);
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && p.rows.extent * p.cols.extent > 16384)
  for (int64_t r = 0; r < p.rows.extent; ++r) {
    D* dst = static_cast<D*>(p.packed) + r * p.packed_stride;
    int64_t c = 0;
    if (r < p.rows.open) {
      const int64_t row = at(p.rows, r);
      const S* src = static_cast<const S*>(p.full) + row * p.full_stride_row;
      const C f = z_row ? z_row[row] : C(1);
      if (z_col) {
        for (; c < p.cols.open; ++c) {
          const int64_t col = at(p.cols, c);
          dst[c] = store_as<D>(load_as<C>(src[col * p.full_stride_col]) * (f * z_col[col]));
        }
      } else {
        for (; c < p.cols.open; ++c)
          dst[c] = store_as<D>(load_as<C>(src[at(p.cols, c) * p.full_stride_col]) * f);
      }
    }
    for (; c < p.cols.extent; ++c) dst[c] = store_as<D>(C(0));
  }
}

template <typename C, typename S, typename D>
void unpack_as(const UnpackParams& p, int num_threads) {
  const C* z_row = static_cast<const C*>(p.rows.z);
  const C* z_col = static_cast<const C*>(p.cols.z);
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && p.rows.size * p.cols.size > 16384)
  for (int64_t r = 0; r < p.rows.size; ++r) {
    if (p.full == nullptr) continue;
    const int64_t row = at(p.rows, r);
    D* dst = static_cast<D*>(p.full) + row * p.cols.size;
    if (r >= p.rows.open || p.cols.open < p.cols.size) std::memset(dst, 0, sizeof(D) * p.cols.size);
    if (r >= p.rows.open) continue;
    const S* src = static_cast<const S*>(p.packed) + r * p.packed_stride;
    const C f = z_row ? z_row[row] : C(1);
    for (int64_t c = 0; c < p.cols.open; ++c) {
      const int64_t col = at(p.cols, c);
      dst[col] = store_as<D>(load_as<C>(src[c]) * (z_col ? f * z_col[col] : f));
    }
  }
}

template <typename C, typename S, typename Theta>
void gate_grad_as(const UnpackParams& p, int num_threads) {
  const C* z_row = static_cast<const C*>(p.rows.z);
  const C* z_col = static_cast<const C*>(p.cols.z);
  C* dz_row = static_cast<C*>(p.dz_row);
  C* dz_col = static_cast<C*>(p.dz_col);
  const S* packed = static_cast<const S*>(p.packed);
  const Theta* theta = static_cast<const Theta*>(p.theta);
  if (dz_row) {
#pragma omp parallel for schedule(dynamic, 16) \
    num_threads(num_threads) if (num_threads > 1 && p.rows.open * p.cols.open > 16384)
    for (int64_t r = 0; r < p.rows.size; ++r) {
      const int64_t row = at(p.rows, r);
      double total = 0.0;
      if (r < p.rows.open && wants_grad(z_row[row], p.rows.full_grad)) {
        for (int64_t c = 0; c < p.cols.open; ++c) {
          const int64_t col = at(p.cols, c);
          total += double(load_as<C>(packed[r * p.packed_stride + c]) * (z_col ? z_col[col] : C(1)) *
                          load_as<C>(theta[row * p.theta_stride_row + col * p.theta_stride_col]));
        }
      }
      dz_row[row] = C(total);
    }
  }
  if (dz_col) {  // whole rows are read in order; a task owns columns, so that the sum over rows has one order
    constexpr int64_t kColumns = 256;
    const int64_t tasks = (p.cols.size + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(dynamic, 1) \
    num_threads(num_threads) if (num_threads > 1 && p.rows.open * p.cols.open > 16384)
    for (int64_t t = 0; t < tasks; ++t) {
      const int64_t begin = t * kColumns,
                    end = begin + kColumns < p.cols.size ? begin + kColumns : p.cols.size;
      int64_t wanted[kColumns], count = 0;
      double total[kColumns] = {};
      for (int64_t c = begin; c < end; ++c) {
        const int64_t col = at(p.cols, c);
        dz_col[col] = C(0);
        if (c < p.cols.open && wants_grad(z_col[col], p.cols.full_grad)) wanted[count++] = c;
      }
      for (int64_t r = 0; count && r < p.rows.open; ++r) {
        const int64_t row = at(p.rows, r);
        const C f = z_row ? z_row[row] : C(1);
        for (int64_t i = 0; i < count; ++i)
          total[i] += double(
              load_as<C>(packed[r * p.packed_stride + wanted[i]]) * f *
              load_as<C>(theta[row * p.theta_stride_row + at(p.cols, wanted[i]) * p.theta_stride_col]));
      }
      for (int64_t i = 0; i < count; ++i) dz_col[at(p.cols, wanted[i])] = C(total[i]);
    }
  }
}

}  // namespace

void pack(const PackParams& p, int num_threads) {
  with_type(p.full_type, [&](auto s) {
    with_type(p.packed_type, [&](auto d) {
      if (p.z_is_double)
        pack_as<double, decltype(s), decltype(d)>(p, num_threads);
      else
        pack_as<float, decltype(s), decltype(d)>(p, num_threads);
    });
  });
}

void unpack(const UnpackParams& p, int num_threads) {
  with_type(p.packed_type, [&](auto s) {
    with_type(p.full_type, [&](auto d) {
      if (p.z_is_double)
        unpack_as<double, decltype(s), decltype(d)>(p, num_threads);
      else
        unpack_as<float, decltype(s), decltype(d)>(p, num_threads);
    });
    if (p.dz_row || p.dz_col) {
      with_type(p.theta_type, [&](auto theta) {
        if (p.z_is_double)
          gate_grad_as<double, decltype(s), decltype(theta)>(p, num_threads);
        else
          gate_grad_as<float, decltype(s), decltype(theta)>(p, num_threads);
      });
    }
  });
}

}  // namespace l0
