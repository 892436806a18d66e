// What gates cost, and the step that puts them on a budget (l0kernels/reference/budget.py has the formulas).
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace l0 {

// `count` values in a row, with one weight.
struct CostRun {
  int64_t first, count;
  double weight;
};

// Where each of some atoms has one of its factors: index[i], which is first + i / repeat * stride unless
// repeat is 0.
struct CostFactor {
  std::vector<int64_t> index;  // (atoms)
  int64_t first = 0, stride = 0, repeat = 0;
  explicit CostFactor(std::vector<int64_t> places);
};

// Values made of as many others each, its factors: their product, or with is_any 1 - prod(1 - x).
struct CostAtoms {
  bool is_any;
  int64_t size;
  std::vector<CostFactor> factors;
};

struct CostPair {
  int64_t first, second;
  double coefficient;
};

// constant + <linear, x> + sum over pairs of coefficient * s_first * s_second; x is the gates, 1, 0, atoms.
struct CostTerms {
  int64_t n;  // gates
  double constant;
  std::vector<CostAtoms> atoms;
  std::vector<CostRun> linear;
  std::vector<int64_t> offsets;  // (sums + 1): where the runs of each begin
  std::vector<CostRun> runs;
  std::vector<CostPair> pairs;

  int64_t width() const {
    int64_t total = n + 2;
    for (const auto& a : atoms) total += a.size;
    return total;
  }
  int64_t products() const {
    int64_t most = 0;
    for (const auto& a : atoms) most = std::max(most, a.size * int64_t(a.factors.size()));
    return most;
  }
  int64_t sums() const { return int64_t(offsets.size()) - 1; }
};

// A gate vector: its share is (p_open(log_alpha) - low) * scale, within [0, 1].
struct BudgetGates {
  int64_t size;
  double shift, low, scale;
};

// Gates that share a price: their cost is to be `keep` of `unit`, `offset` aside.
struct BudgetKind {
  CostTerms cost;
  std::vector<BudgetGates> gates;
  double offset, unit, keep;
};

template <typename T>
struct BudgetStep {
  std::vector<T*> log_alpha;    // of each gate vector, all kinds
  std::vector<const T*> grad;   // null: none
  std::vector<bool> moves;
  T* moment;                    // (gates of all kinds)
  const double* first;          // (kinds): the share at the start
  double* price;                // (kinds): of the step before, then of this one
  int64_t *step, *skipped;
  double ramp_steps, limit;
};

}  // namespace l0
