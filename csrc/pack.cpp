#include "pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "half.h"
#include "past_caches.h"

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

constexpr int64_t kMostColumns = 256;  // of a task of the gate gradient

inline int64_t at(const PackAxis& axis, int64_t i) { return axis.index ? axis.index[i] : i; }

template <typename C>
inline bool wants_grad(C z, bool full_grad) {
  return full_grad ? z != C(0) : !(z <= C(0) || z >= C(1));
}

// Types that training moves; the others, checks in float64 and one half precision to the other, get fewer loops.
template <typename C, typename S, typename D>
constexpr bool kCommon = std::is_same_v<C, float> && !std::is_same_v<S, double> && !std::is_same_v<D, double> &&
                         (std::is_same_v<S, D> || std::is_same_v<S, float> || std::is_same_v<D, float>);

// f(entries of a column, from one to the next in packed rows, from one column to the next there), numbers that
// the compiler knows for the common ones.
template <bool common, typename F>
void with_run(const PackAxis& cols, F f) {
  using One = std::integral_constant<int64_t, 1>;
  using Nine = std::integral_constant<int64_t, 9>;
  if (cols.run == 1) return f(One{}, One{}, One{});
  if constexpr (common) {
    if (cols.apart) return cols.run == 9 ? f(Nine{}, cols.extent, One{}) : f(cols.run, cols.extent, One{});
    if (cols.run == 9) return f(Nine{}, One{}, Nine{});
    f(cols.run, One{}, cols.run);
  } else {
    f(cols.run, cols.apart ? cols.extent : 1, cols.apart ? 1 : cols.run);
  }
}

// n columns in a row, times f and each one's z, if there is one.
template <typename C, typename S, typename D>
void scale_row(const S* from, D* to, int64_t n, C f, const C* z) {
  if (z == nullptr) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) to[c] = store_as<D>(load_as<C>(from[c]) * f);
  } else {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) to[c] = store_as<D>(load_as<C>(from[c]) * (f * z[c]));
  }
}

// C: the type of the gates and of the arithmetic.
template <typename C, typename S, typename D>
void pack_as(const PackParams& p, int num_threads) {
  const C* z_row = static_cast<const C*>(p.rows.z);
  const C* z_col = static_cast<const C*>(p.cols.z);
  with_run<kCommon<C, S, D>>(p.cols, [&](auto run, auto next, auto step) {
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && p.rows.extent * p.cols.extent * run > 16384)
    for (int64_t r = 0; r < p.rows.extent; ++r) {
      D* dst = static_cast<D*>(p.packed) + r * p.packed_stride;
      int64_t c = 0;
      if (r < p.rows.open) {
        const int64_t row = at(p.rows, r);
        const S* src = static_cast<const S*>(p.full) + row * p.full_stride_row;
        const C f = z_row ? z_row[row] : C(1);
        if (run == 1 && p.full_stride_col == 1 && p.cols.index == nullptr) {
          scale_row(src, dst, p.cols.open, f, z_col);
          c = p.cols.open;
        }
        for (; c < p.cols.open; ++c) {
          const int64_t col = at(p.cols, c);
          const C factor = z_col ? f * z_col[col] : f;
          for (int64_t k = 0; k < run; ++k)
            dst[c * step + k * next] =
                store_as<D>(load_as<C>(src[(col * run + k) * p.full_stride_col]) * factor);
        }
      }
      for (; c < p.cols.extent; ++c)
        for (int64_t k = 0; k < run; ++k) dst[c * step + k * next] = store_as<D>(C(0));
    }
  });
}

// The columns [c, end) of a packed row, at their places behind column `first`.
template <typename C, typename S, typename D, typename Run, typename Next, typename Step>
inline void scatter(const S* src, D* dst, const PackAxis& cols, const C* z_col, C f, int64_t c, int64_t end,
                    int64_t first, Run run, Next next, Step step) {
  for (; c < end; ++c) {
    const int64_t col = at(cols, c);
    const C factor = z_col ? f * z_col[col] : f;
    for (int64_t k = 0; k < run; ++k)
      dst[(col - first) * run + k] = store_as<D>(load_as<C>(src[c * step + k * next]) * factor);
  }
}

constexpr int64_t kPieceBytes = 8192;  // of a row that is made in the first-level cache
constexpr int64_t kTurnBytes = 16384;  // that a thread writes before it is the next one's turn

template <typename C, typename S, typename D>
void unpack_as(const UnpackParams& p, int num_threads) {
  if (p.full == nullptr) return;
  const C* z_row = static_cast<const C*>(p.rows.z);
  const C* z_col = static_cast<const C*>(p.cols.z);
  with_run<kCommon<C, S, D>>(p.cols, [&](auto run, auto next, auto step) {
    const int64_t width = p.cols.size * run, bytes = sizeof(D) * p.rows.size * width;
    const int64_t piece = kPieceBytes / int64_t(sizeof(D)) / run;  // in columns
    const bool in_pieces = bytes >= kPastCaches && p.cols.open < p.cols.size && piece > 0;
    // Open rows, which take longer, come first: threads take turns.
    const int64_t turn = std::max<int64_t>(1, kTurnBytes / std::max<int64_t>(1, sizeof(D) * width));
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && p.rows.size * width > 16384)
    {
#pragma omp for schedule(static, turn) nowait
      for (int64_t r = 0; r < p.rows.size; ++r) {
        const int64_t row = at(p.rows, r);
        D* dst = static_cast<D*>(p.full) + row * width;
        if (r >= p.rows.open) {
          write_zeros(dst, sizeof(D) * width, bytes);
          continue;
        }
        const S* src = static_cast<const S*>(p.packed) + r * p.packed_stride;
        const C f = z_row ? z_row[row] : C(1);
        if (in_pieces) {
          alignas(64) unsigned char memory[kPieceBytes];
          D* const part = reinterpret_cast<D*>(memory);
          for (int64_t first = 0, c = 0, end; first < p.cols.size; first += piece, c = end) {
            const int64_t n = std::min(piece, p.cols.size - first);
            for (end = c; end < p.cols.open && at(p.cols, end) < first + n;) ++end;
            std::memset(memory, 0, sizeof(D) * n * run);
            scatter(src, part, p.cols, z_col, f, c, end, first, run, next, step);
            copy_past_caches(dst + first * run, memory, sizeof(D) * n * run);
          }
          continue;
        }
        if (p.cols.open < p.cols.size) std::memset(dst, 0, sizeof(D) * width);
        if (run == 1 && p.cols.index == nullptr)
          scale_row(src, dst, p.cols.open, f, z_col);
        else
          scatter(src, dst, p.cols, z_col, f, 0, p.cols.open, 0, run, next, step);
      }
      settle_past_caches();
    }
  });
}

template <typename C, typename S, typename Theta>
void gate_grad_as(const UnpackParams& p, int num_threads) {
  const C* z_row = static_cast<const C*>(p.rows.z);
  const C* z_col = static_cast<const C*>(p.cols.z);
  C* dz_row = static_cast<C*>(p.dz_row);
  C* dz_col = static_cast<C*>(p.dz_col);
  const S* packed = static_cast<const S*>(p.packed);
  const Theta* theta = static_cast<const Theta*>(p.theta);
  const int64_t run = p.cols.run, next = p.cols.apart ? p.cols.extent : 1, step = p.cols.apart ? 1 : run;
  if (dz_row) {
#pragma omp parallel for schedule(dynamic, 16) \
    num_threads(num_threads) if (num_threads > 1 && p.rows.open * p.cols.open * run > 16384)
    for (int64_t r = 0; r < p.rows.size; ++r) {
      const int64_t row = at(p.rows, r);
      double total = 0.0;
      if (r < p.rows.open && wants_grad(z_row[row], p.rows.full_grad)) {
        for (int64_t c = 0; c < p.cols.open; ++c) {
          const int64_t col = at(p.cols, c);
          const S* grad = packed + r * p.packed_stride + c * step;
          const Theta* entry = theta + row * p.theta_stride_row + col * run * p.theta_stride_col;
          for (int64_t k = 0; k < run; ++k)
            total += double(load_as<C>(grad[k * next]) * (z_col ? z_col[col] : C(1)) *
                            load_as<C>(entry[k * p.theta_stride_col]));
        }
      }
      dz_row[row] = C(total);
    }
  }
  if (dz_col) {  // whole rows are read in order; a task owns columns, so that the sum over rows has one order
    for (int64_t c = p.cols.open; c < p.cols.size; ++c) dz_col[at(p.cols, c)] = C(0);
    const int64_t share = (p.cols.open + num_threads - 1) / std::max(num_threads, 1);
    const int64_t columns = run > 1 ? std::clamp<int64_t>(share, 8, 64) : kMostColumns;
    const int64_t tasks = (p.cols.open + columns - 1) / columns;
#pragma omp parallel for schedule(dynamic, 1) \
    num_threads(num_threads) if (num_threads > 1 && p.rows.open * p.cols.open * run > 16384)
    for (int64_t t = 0; t < tasks; ++t) {
      const int64_t begin = t * columns, end = std::min(begin + columns, p.cols.open);
      int64_t wanted[kMostColumns], count = 0;
      double total[kMostColumns] = {};
      for (int64_t c = begin; c < end; ++c) {
        const int64_t col = at(p.cols, c);
        dz_col[col] = C(0);
        if (wants_grad(z_col[col], p.cols.full_grad)) wanted[count++] = c;
      }
      for (int64_t r = 0; count && r < p.rows.open; ++r) {
        const int64_t row = at(p.rows, r);
        const C f = z_row ? z_row[row] : C(1);
        for (int64_t i = 0; i < count; ++i) {
          const S* grad = packed + r * p.packed_stride + wanted[i] * step;
          const Theta* entry =
              theta + row * p.theta_stride_row + at(p.cols, wanted[i]) * run * p.theta_stride_col;
          for (int64_t k = 0; k < run; ++k)
            total[i] += double(load_as<C>(grad[k * next]) * f * load_as<C>(entry[k * p.theta_stride_col]));
        }
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
