#include "penalty.h"

#include <algorithm>

#include "workspace.h"

namespace l0 {
namespace {

// Scratch of a call: p_open of all gates, and what a term takes by row and by column.
template <typename T>
struct Shares {
  std::vector<T*> open;            // by gate vector
  T *ones, *row, *col, *col_sums;  // (rows or groups * cols), (rows), (groups * cols), (groups, parts, cols)

  explicit Shares(const PenaltyParams<T>& p) {
    int64_t gates = 0, rows = 0, cols = 0, sums = 0;
    for (const auto& g : p.gates) gates += g.size;
    for (const auto& t : p.terms) {
      rows = std::max(rows, t.rows);
      cols = std::max(cols, t.groups * t.cols);
      sums = std::max(sums, t.groups * t.parts() * t.cols);
    }
    const int64_t longest = std::max(rows, cols);
    thread_local Workspace workspace;
    T* at = static_cast<T*>(workspace.get(sizeof(T) * (gates + longest + rows + cols + sums)));
    for (const auto& g : p.gates) {
      open.push_back(at);
      kernels<T>().p_open(g.log_alpha, g.size, p.shift, at);
      at += g.size;
    }
    ones = at;
    std::fill_n(ones, longest, T(1));
    row = ones + longest;
    col = row + rows;
    col_sums = col + cols;
  }

  const T* by_row(const PenaltyTerm<T>& t) const { return t.out < 0 ? ones : open[t.out]; }

  const T* by_col(const PenaltyTerm<T>& t) const {
    if (t.in < 0) return ones;
    if (t.run == 1) return open[t.in];
    for (int64_t c = 0; c < t.groups * t.cols; c += t.run) std::fill_n(col + c, t.run, open[t.in][c / t.run]);
    return col;
  }
};

template <typename T>
double sum(const T* x, int64_t n) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += double(x[i]);
  return total;
}

}  // namespace

template <typename T>
double penalty(const T* log_alpha, int64_t n, double weight, T shift, T* grad) {
  const T w = T(weight);
  kernels<T>().p_open(log_alpha, n, shift, grad);
  const double total = sum(grad, n);
  for (int64_t i = 0; i < n; ++i) grad[i] = w * grad[i] * (T(1) - grad[i]);
  return total * weight;
}

template <typename T>
double coupled_penalty(const PenaltyParams<T>& p, T* grad, int num_threads) {
  const Shares<T> s(p);
  const double half = 0.5 * p.decay;
  double total = 0.0;
  std::vector<T*> grads;  // until the end without their factor p * (1 - p)
  for (size_t g = 0; g < p.gates.size(); ++g) {
    grads.push_back(grad);
    std::fill_n(grad, p.gates[g].size, T(p.gates[g].weight));
    total += p.gates[g].weight * sum(s.open[g], p.gates[g].size);
    grad += p.gates[g].size;
  }
  for (const auto& t : p.terms) {
    if (t.rows == 0) continue;
    const T* by_row = s.by_row(t);
    kernels<T>().squares({t.rows, t.cols, t.group_rows(), t.theta, by_row, s.by_col(t)}, s.row,
                         t.in < 0 ? nullptr : s.col_sums, num_threads);
    double of_term = 0.0;
    for (int64_t o = 0; o < t.rows; ++o) of_term += double(s.row[o]) * double(by_row[o]);
    total += half * of_term;
    if (t.out >= 0)
      for (int64_t o = 0; o < t.rows; ++o) grads[t.out][o] += T(half) * s.row[o];
    for (int64_t group = 0; t.in >= 0 && group < t.groups; ++group) {
      T* sums = s.col_sums + group * t.parts() * t.cols;
      for (int64_t part = 1; part < t.parts(); ++part)
        for (int64_t c = 0; c < t.cols; ++c) sums[c] += sums[part * t.cols + c];
      T* to = grads[t.in] + group * t.cols / t.run;
      for (int64_t c = 0; c < t.cols; c += t.run) to[c / t.run] += T(half * sum(sums + c, t.run));
    }
  }
  for (size_t g = 0; g < p.gates.size(); ++g) {
    const T* open = s.open[g];
    for (int64_t i = 0; i < p.gates[g].size; ++i) grads[g][i] *= open[i] * (T(1) - open[i]);
  }
  return total;
}

template <typename T>
void coupled_penalty_grad(const PenaltyParams<T>& p, T factor, const std::vector<T*>& dtheta,
                          int num_threads) {
  const Shares<T> s(p);
  const T scale = factor * T(p.decay);
  for (size_t i = 0; i < p.terms.size(); ++i) {
    const auto& t = p.terms[i];
    const T* by_row = s.by_row(t);
    for (int64_t o = 0; o < t.rows; ++o) s.row[o] = scale * by_row[o];
    kernels<T>().squares_grad({t.rows, t.cols, t.group_rows(), t.theta, s.row, s.by_col(t)}, dtheta[i],
                              num_threads);
  }
}

#define L0_INSTANTIATE(T)                                               \
  template double penalty<T>(const T*, int64_t, double, T, T*);         \
  template double coupled_penalty<T>(const PenaltyParams<T>&, T*, int); \
  template void coupled_penalty_grad<T>(const PenaltyParams<T>&, T, const std::vector<T*>&, int);
L0_INSTANTIATE(float)
L0_INSTANTIATE(double)

}  // namespace l0
