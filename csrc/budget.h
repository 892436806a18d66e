// What gates cost, and the step that puts them on a budget (l0kernels/reference/budget.py has the formulas).
#pragma once
#include <cstdint>
#include <vector>

namespace l0 {

// `count` values in a row, with one weight.
struct CostRun {
  int64_t first, count;
  double weight;
};

// Values made of `factors` others each: their product, or with is_any 1 - prod(1 - x).
struct CostAtoms {
  bool is_any;
  int64_t factors;
  std::vector<int64_t> index;  // (atoms, factors)
  int64_t size() const { return int64_t(index.size()) / factors; }
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
    for (const auto& a : atoms) total += a.size();
    return total;
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
  double* price;                // (kinds)
  int64_t *step, *skipped;
  double ramp_steps, limit;
};

// One step; false if it was skipped.
template <typename T>
bool budget_step(const std::vector<BudgetKind>& kinds, const std::vector<int64_t>& numbers,
                 const BudgetStep<T>& s);

}  // namespace l0
