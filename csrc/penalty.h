// The expected L0 norm of gate vectors and the L2 norm of the weights behind them, with their gradients:
//     sum_g weight * p_open_g  +  decay / 2 * sum over terms of  sum_oi p_o * p_i * theta_oi^2.
#pragma once
#include <vector>

#include "kernels.h"

namespace l0 {

// Returns sum_g weight * p_open_g and writes grad_g = weight * p_open_g * (1 - p_open_g).
template <typename T>
double penalty(const T* log_alpha, int64_t n, double weight, T shift, T* grad);

template <typename T>
struct PenaltyGates {
  const T* log_alpha;  // (size,)
  int64_t size;
  double weight;
};

// A weight as a matrix, its rows in groups; p = 1 on a side without gates. Every `run` columns of a group
// belong to one input.
template <typename T>
struct PenaltyTerm {
  const T* theta;  // (rows, cols)
  int64_t rows, cols, groups, run;
  int out, in;  // numbers of the gates (rows,) and (groups * cols / run,); -1: none

  int64_t group_rows() const { return rows / groups; }
  int64_t parts() const { return (group_rows() + kSquareRows - 1) / kSquareRows; }
};

template <typename T>
struct PenaltyParams {
  std::vector<PenaltyGates<T>> gates;
  std::vector<PenaltyTerm<T>> terms;
  double decay;
  T shift;  // of p_open
};

// Returns the sum and writes its gradient of every log_alpha, one after the other.
template <typename T>
double coupled_penalty(const PenaltyParams<T>& p, T* grad, int num_threads);

// dtheta = factor * decay * p_o * p_i * theta of every term.
template <typename T>
void coupled_penalty_grad(const PenaltyParams<T>& p, T factor, const std::vector<T*>& dtheta,
                          int num_threads);

}  // namespace l0
