// The primitives that are compiled once per instruction set, and the table through which everything else
// calls them.
#pragma once
#include <cstdint>
#include <vector>

#include "batch_norm.h"
#include "budget.h"
#include "conv.h"
#include "gemm.h"
#include "prox.h"
#include "taps.h"

namespace l0 {

// One gate vector as the products see it. `index` lists open gates ascending, then closed ones; null: every
// gate is open.
template <typename T>
struct GateView {
  const T* z = nullptr;
  const int32_t* index = nullptr;
  int64_t size = 0;
  int64_t open = 0;
  bool full_grad = false;  // a gradient for every open gate, not for fractional ones alone

  bool wants_grad(int64_t j) const { return full_grad ? z[j] != T(0) : !(z[j] <= T(0) || z[j] >= T(1)); }
};

// z and the open/closed order of one gate vector; see hard_concrete.h for the formula.
template <typename T>
struct SampleParams {
  const T* log_alpha;
  int64_t first;  // gate index of log_alpha[0], a multiple of 1024
  int64_t size;
  uint64_t seed;
  uint32_t stream, rank;
  T beta, gamma, zeta;
  T* z;
};

// da = v * z * act'(a), its column sums db and dz = sum_m v * act(a), over packed columns. In place: v
// becomes da.
template <typename T>
struct ActivationGradParams {
  int64_t M, N;  // rows, packed columns
  T* v;          // (M, N), stride
  const T* h;    // (M, N): z * act(a), as the forward left it
  const T* pre;  // (M, N): a; null for activations whose derivative h gives away
  int64_t stride;
  Activation act;
  const GateView<T>* gate;  // null: no gate
  T* db;                    // by ungathered column, null: not wanted
  T* dz;                    // likewise
};

// out[n] = sum_m a[m, n] * b[m, n] / z[n] where gate wants a gradient, else 0. Rows that m_gate closes are
// not read.
template <typename T>
struct ColumnDotParams {
  int64_t M, N;
  const T* a;
  int64_t a_stride_m, a_stride_n;
  const T* b;
  int64_t b_stride_m;
  const GateView<T>* gate;
  const GateView<T>* m_gate;  // null: every row
  T* out;
};

// out[n'] = z[n'] * sum_m a[m, n'] over open columns n', zero elsewhere; gate null: all columns; scaled:
// whether z multiplies.
template <typename T>
struct ColumnSumParams {
  int64_t M, N;
  const T* a;
  int64_t a_stride_m, a_stride_n;
  const GateView<T>* gate;
  bool scaled;
  T* out;
};

// The L2 norm of a weight under the probabilities of its gates. Rows come in groups, each with its own p_col;
// every kSquareRows rows of a group have their own partial column sums: one order, however many threads.
constexpr int64_t kSquareRows = 64;
template <typename T>
struct SquaresParams {
  int64_t n_rows, n_cols, group_rows;
  const T* w;      // (n_rows, n_cols)
  const T* p_row;  // (n_rows)
  const T* p_col;  // (groups, n_cols)
};

template <typename T>
struct Kernels {
  void (*gemm)(const GemmParams<T>&, int num_threads);
  void (*sample)(const SampleParams<T>&, int num_threads);
  void (*p_open)(const T* log_alpha, int64_t n, T shift, T* p);  // hard_concrete.h
  void (*activation_grad)(const ActivationGradParams<T>&, int num_threads);
  void (*column_dot)(const ColumnDotParams<T>&, int num_threads);
  void (*column_sum)(const ColumnSumParams<T>&, int num_threads);
  // row_sums[o] = sum_j p_col[j] w[o, j]^2; col_sums[t, j] = sum_o p_row[o] w[o, j]^2 over part t's rows,
  // null: not wanted.
  void (*squares)(const SquaresParams<T>&, T* row_sums, T* col_sums, int num_threads);
  // grad[o, j] = p_row[o] p_col[j] w[o, j]
  void (*squares_grad)(const SquaresParams<T>&, T* grad, int num_threads);
  void (*im2col)(const ConvShape&, const T* x, T* col, int num_threads);  // conv.h
  void (*col2im)(const ConvShape&, const T* col, T* x, int num_threads);
  void (*conv)(const ConvParams<T>&, int num_threads);
  void (*conv_grad)(const ConvParams<T>&, int num_threads);
  void (*taps)(const TapsParams<T>&, int num_threads);  // taps.h
  void (*taps_grad)(const TapsParams<T>&, int num_threads);
  void (*depthwise)(const DepthwiseParams<T>&, int num_threads);
  void (*depthwise_grad)(const DepthwiseParams<T>&, int num_threads);
  void (*batch_norm)(const BatchNormParams<T>&, int num_threads);  // batch_norm.h
  void (*batch_norm_grad)(const BatchNormParams<T>&, int num_threads);
  void (*prox)(const ProxParams<T>&, int num_threads);  // prox.h
  // One step of a budget; false if it was skipped. budget.h
  bool (*budget_step)(const std::vector<BudgetKind>& kinds, const std::vector<int64_t>& numbers,
                      const BudgetStep<T>& s);
};

template <typename T>
const Kernels<T>& kernels();  // of the instruction set in use (isa.h)

}  // namespace l0
