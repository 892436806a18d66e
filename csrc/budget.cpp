#include "budget.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "workspace.h"

namespace l0 {
namespace {

constexpr double kDecay = 0.999, kFloor = 1e-2;  // as in reference/budget.py
constexpr double kLeast = 1e-30;                 // a direction below it is none: its price would overflow
constexpr int kSearch = 100;                     // evaluations at most; 4 or 5 are enough where prices are small

template <typename T>
double sum(const T* x, int64_t n) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += double(x[i]);
  return total;
}

// Evaluates the cost of one kind: x is (width), sums is (sums), both scratch.
template <typename T>
struct Evaluation {
  const CostTerms& cost;
  T* x;
  double* sums;

  double operator()() const {
    x[cost.n] = T(1);
    x[cost.n + 1] = T(0);
    T* to = x + cost.n + 2;
    for (const auto& a : cost.atoms)
      for (auto at = a.index.begin(); at != a.index.end(); at += a.factors) *to++ = atom(a, &*at);
    double total = cost.constant;
    for (const auto& run : cost.linear) total += run.weight * sum(x + run.first, run.count);
    for (int64_t k = 0; k < cost.sums(); ++k) {
      sums[k] = 0.0;
      for (int64_t r = cost.offsets[k]; r < cost.offsets[k + 1]; ++r)
        sums[k] += cost.runs[r].weight * sum(x + cost.runs[r].first, cost.runs[r].count);
    }
    for (const auto& pair : cost.pairs) total += pair.coefficient * sums[pair.first] * sums[pair.second];
    return total;
  }

  // dx (width) of what was evaluated last; dsums (sums) is scratch.
  void gradient(double* dx, double* dsums) const {
    std::fill_n(dx, cost.width(), 0.0);
    std::fill_n(dsums, cost.sums(), 0.0);
    for (const auto& pair : cost.pairs) {
      dsums[pair.first] += pair.coefficient * sums[pair.second];
      dsums[pair.second] += pair.coefficient * sums[pair.first];
    }
    for (const auto& run : cost.linear) add(run, 1.0, dx);
    for (int64_t k = 0; k < cost.sums(); ++k)
      for (int64_t r = cost.offsets[k]; r < cost.offsets[k + 1]; ++r) add(cost.runs[r], dsums[k], dx);
    int64_t end = cost.width();
    for (auto a = cost.atoms.rbegin(); a != cost.atoms.rend(); ++a)
      for (int64_t i = a->size() - 1; i >= 0; --i) spread(*a, &a->index[i * a->factors], dx[--end], dx);
  }

 private:
  T atom(const CostAtoms& a, const int64_t* index) const {
    T product = T(1);
    for (int64_t j = 0; j < a.factors; ++j) product *= a.is_any ? T(1) - x[index[j]] : x[index[j]];
    return a.is_any ? T(1) - product : product;
  }

  void add(const CostRun& run, double by, double* dx) const {
    for (int64_t i = 0; i < run.count; ++i) dx[run.first + i] += by * run.weight;
  }

  // The product of all factors but one, for each.
  void spread(const CostAtoms& a, const int64_t* index, double by, double* dx) const {
    for (int64_t j = 0; j < a.factors; ++j) {
      double others = by;
      for (int64_t k = 0; k < a.factors; ++k)
        if (k != j) others *= a.is_any ? 1.0 - x[index[k]] : double(x[index[k]]);
      dx[index[j]] += others;
    }
  }
};

// The gates of one kind on their way to the budget.
template <typename T>
struct Kind {
  const BudgetKind& kind;
  const Evaluation<T> evaluation;
  const T *log_alpha, *direction;  // (n)
  double limit;

  // The share of the cost at a price.
  double at(double price) const {
    int64_t start = 0;
    for (const auto& g : kind.gates) {
      kernels<T>().share_open(log_alpha + start, direction + start, g.size, T(price), T(limit), T(g.shift),
                              T(g.low), T(g.scale), evaluation.x + start);
      start += g.size;
    }
    return (evaluation() - kind.offset) / kind.unit;
  }

  // From which on every gate that moves lies at the lower end.
  double highest() const {
    double found = 0.0;
    for (int64_t i = 0; i < kind.cost.n; ++i)
      if (direction[i] > T(0))
        found = std::max(found, (double(log_alpha[i]) + limit) / double(direction[i]));
    return found;
  }

  // The smallest price at which the share is at most `target`. A line from price 0 along the slope there, then
  // between the two prices around the target (Illinois) or, until there are two, through the last two tried.
  double solve(double start, double slope, double target) const {
    const double end = highest(), tolerance = sizeof(T) == 4 ? 1e-7 : 1e-13;
    if (start <= target || end <= 0.0) return 0.0;
    double low = 0.0, at_low = start - target, high = end, at_high = 0.0;
    bool around = false;
    int side = 0;
    double price = slope > 0.0 ? std::min(at_low / slope, end) : end;
    for (int i = 0; i < kSearch; ++i) {
      const double found = at(price) - target;
      if (std::abs(found) <= tolerance) break;
      double next;
      if (found > 0.0) {
        if (price >= end) break;  // that is all there is
        if (around) {
          if (side > 0) at_high /= 2;
          next = 0.0;
        } else {
          const double by = found * (price - low) / (at_low - found);
          next = std::min(price + std::min(std::max(1.2 * by, 0.1 * price), 10.0 * price), end);
          if (!(next > price)) next = end;
        }
        low = price, at_low = found, side = 1;
      } else {
        if (around && side < 0) at_low /= 2;
        high = price, at_high = found, side = -1, around = true;
      }
      if (around) {
        next = (low * at_high - high * at_low) / (at_high - at_low);
        if (!(next > low && next < high)) next = low + (high - low) / 2;
        if (!(next > low && next < high)) {  // neighbours
          price = high;
          break;
        }
      }
      price = next;
    }
    return price;
  }
};

template <typename T>
bool all_finite(const T* x, int64_t n) {
  T total = T(0);  // of zeros, unless one is not finite
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += x[i] * T(0);
  return total == T(0);
}

// v <- decay * v + (1 - decay) * g^2; grad null: g = 0.
template <typename T>
void next_moment(const T* moment, const T* grad, int64_t n, T* next) {
  if (grad == nullptr) {
    for (int64_t i = 0; i < n; ++i) next[i] = T(kDecay) * moment[i];
  } else {
    for (int64_t i = 0; i < n; ++i) next[i] = T(kDecay) * moment[i] + T(1 - kDecay) * (grad[i] * grad[i]);
  }
}

// q = dc/da / (sqrt(v^) + floor * rms(sqrt(v^))), and its product with dc/da: what the cost falls by at price 0.
template <typename T>
double directions(const BudgetKind& kind, const Evaluation<T>& evaluation, const double* dx, const T* moment,
                  double correction, const std::vector<bool>& moves, size_t first, T* direction) {
  const double mean = sum(moment, kind.cost.n) / double(kind.cost.n);
  const T corrected = T(correction), floor = T(kFloor * std::sqrt(mean * correction));
  const bool by_gradient = floor > T(0);
  double slope = 0.0;
  int64_t start = 0;
  for (size_t g = 0; g < kind.gates.size(); ++g) {
    const auto& gates = kind.gates[g];
    const T low = T(gates.low), width = T(1.0 / gates.scale), factor = T(gates.scale / kind.unit);
    const T moving = moves[first + g] ? T(1) : T(0);
    const T* x = evaluation.x + start;
    for (int64_t i = 0; i < gates.size; ++i) {
      const T p = low + x[i] * width, dc = T(dx[start + i]) * p * (T(1) - p) * factor;
      const T by = by_gradient ? std::sqrt(moment[start + i] * corrected) + floor : T(1);
      const T q = moving * dc / by;
      direction[start + i] = q < T(kLeast) ? T(0) : q;
      evaluation.x[start + i] = dc * direction[start + i];  // scratch from here on
    }
    slope += sum(x, gates.size);
    start += gates.size;
  }
  return slope;
}

}  // namespace

template <typename T>
bool budget_step(const std::vector<BudgetKind>& kinds, const std::vector<int64_t>& numbers,
                 const BudgetStep<T>& s) {
  int64_t n = 0, width = 0, sums = 0;
  for (const auto& kind : kinds) {
    n += kind.cost.n;
    width = std::max(width, kind.cost.width());
    sums = std::max(sums, kind.cost.sums());
  }
  thread_local Workspace workspace;
  double* dx = static_cast<double*>(
      workspace.get(sizeof(double) * (width + 2 * sums) + sizeof(T) * (3 * n + width)));
  double *of_sums = dx + width, *dsums = of_sums + sums;
  T *next = reinterpret_cast<T*>(dsums + sums), *before = next + n, *direction = before + n,
    *x = direction + n;

  size_t gate = 0;
  int64_t start = 0;
  for (const auto& kind : kinds)
    for (const auto& g : kind.gates) {
      next_moment(s.moment + start, s.grad[gate], g.size, next + start);
      std::copy_n(s.log_alpha[gate], g.size, before + start);
      start += g.size;
      ++gate;
    }
  if (!all_finite(next, n) || !all_finite(before, n)) {
    ++*s.skipped;
    return false;
  }
  ++*s.step;
  std::copy_n(next, n, s.moment);

  const double correction = 1.0 / (1.0 - std::pow(kDecay, double(*s.step)));
  const double share = s.ramp_steps > 0.0 ? std::min(double(*s.step) / s.ramp_steps, 1.0) : 1.0;
  gate = 0;
  start = 0;
  for (size_t k = 0; k < kinds.size(); ++k) {
    const BudgetKind& kind = kinds[k];
    const int64_t number = numbers[k];
    const Evaluation<T> evaluation{kind.cost, x, of_sums};
    const Kind<T> moving{kind, evaluation, before + start, direction + start, s.limit};
    std::fill_n(direction + start, kind.cost.n, T(0));
    const double at_start = moving.at(0.0);
    evaluation.gradient(dx, dsums);
    const double slope = directions(kind, evaluation, dx, s.moment + start, correction, s.moves, gate,
                                    direction + start);
    const double target = s.first[number] + (kind.keep - s.first[number]) * share;
    const double price = s.price[number] = moving.solve(at_start, slope, target);
    for (const auto& g : kind.gates) {
      T* to = s.log_alpha[gate];
      const T by = T(price), limit = T(s.limit);
      if (s.moves[gate])
        for (int64_t i = 0; i < g.size; ++i)
          to[i] = std::min(std::max(before[start + i] - by * direction[start + i], -limit), limit);
      start += g.size;
      ++gate;
    }
  }
  return true;
}

template bool budget_step(const std::vector<BudgetKind>&, const std::vector<int64_t>&,
                          const BudgetStep<float>&);
template bool budget_step(const std::vector<BudgetKind>&, const std::vector<int64_t>&,
                          const BudgetStep<double>&);

}  // namespace l0
