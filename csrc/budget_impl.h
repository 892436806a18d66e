// The step that puts gates on a budget; compiled once per instruction set, like gemm_impl.h.

namespace l0 {
namespace L0_ISA {

constexpr double kDecay = 0.999, kFloor = 1e-2;  // as in reference/budget.py
constexpr double kLeast = 1e-30;                 // a direction below it is none: its price would overflow
constexpr int kSearch = 100;  // evaluations at most; from the last step's price on 2 or 3 are enough

template <typename T>
double sum(const T* x, int64_t n) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += double(x[i]);
  return total;
}

template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  T total = T(0);
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += a[i] * b[i];
  return total;
}

// f(i, place of the factor of atom i) for all atoms; f writes to what is atom i's.
template <typename F>
void each_atom(const CostFactor& factor, int64_t atoms, F f) {
  const int64_t first = factor.first, stride = factor.stride, repeat = factor.repeat;
  if (repeat == 1 && stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < atoms; ++i) f(i, first + i);
  } else if (repeat == 1) {
    for (int64_t i = 0; i < atoms; ++i) f(i, first + i * stride);
  } else if (repeat > 1) {
    for (int64_t block = 0, at = first; block < atoms; block += repeat, at += stride) {
      const int64_t end = block + repeat < atoms ? block + repeat : atoms;
#pragma omp simd
      for (int64_t i = block; i < end; ++i) f(i, at);
    }
  } else {
    const int64_t* index = factor.index.data();
    for (int64_t i = 0; i < atoms; ++i) f(i, index[i]);
  }
}

// Evaluates the cost of one kind. Scratch: x and fall, by how much x falls with the price (width each); sums
// and falls (sums each).
template <typename T>
struct Evaluation {
  const CostTerms& cost;
  T *x, *fall;
  double *sums, *falls;

  double value() const {
    const auto atoms = [&](const CostAtoms& a, int64_t at) {
      T* to = x + at;
      std::fill_n(to, a.size, T(1));
      for (const CostFactor& factor : a.factors) multiply(a, factor, to);
      if (a.is_any)
        for (int64_t i = 0; i < a.size; ++i) to[i] = T(1) - to[i];
    };
    const double total = cost.constant + linear(x, T(1), sums, atoms);
    double of_pairs = 0.0;
    for (const CostPair& pair : cost.pairs)
      of_pairs += pair.coefficient * sums[pair.first] * sums[pair.second];
    return total + of_pairs;
  }

  // By how much what was evaluated last falls with the price.
  double slope() const {
    const auto atoms = [&](const CostAtoms& a, int64_t at) {
      const bool is_any = a.is_any;
      const T *from = x, *falls_by = fall;
      T *to = x + at, *to_fall = fall + at;
      std::fill_n(to, a.size, T(1));
      std::fill_n(to_fall, a.size, T(0));
      for (const CostFactor& factor : a.factors)
        each_atom(factor, a.size, [=](int64_t i, int64_t j) {
          const T by = is_any ? T(1) - from[j] : from[j], by_fall = is_any ? -falls_by[j] : falls_by[j];
          to_fall[i] = to_fall[i] * by + to[i] * by_fall;
          to[i] *= by;
        });
      if (is_any)
        for (int64_t i = 0; i < a.size; ++i) to[i] = T(1) - to[i], to_fall[i] = -to_fall[i];
    };
    double total = linear(fall, T(0), falls, atoms);
    for (const CostPair& pair : cost.pairs)
      total +=
          pair.coefficient * (falls[pair.first] * sums[pair.second] + sums[pair.first] * falls[pair.second]);
    return total;
  }

  // dx (width) of what was evaluated last; before is (factors, atoms) of the largest atoms, scratch.
  void gradient(T* dx, T* before) const {
    std::fill_n(dx, cost.width(), T(0));
    std::fill_n(falls, cost.sums(), 0.0);
    for (const CostPair& pair : cost.pairs) {
      falls[pair.first] += pair.coefficient * sums[pair.second];
      falls[pair.second] += pair.coefficient * sums[pair.first];
    }
    for (const CostRun& run : cost.linear) add(run, 1.0, dx);
    for (int64_t k = 0; k < cost.sums(); ++k)
      for (int64_t r = cost.offsets[k]; r < cost.offsets[k + 1]; ++r) add(cost.runs[r], falls[k], dx);
    int64_t end = cost.width();
    for (size_t k = cost.atoms.size(); k-- > 0;) {
      const CostAtoms& a = cost.atoms[k];
      end -= a.size;
      spread(a, dx + end, before, dx);
    }
  }

 private:
  // The linear part of `of` (width), whose atoms `make` fills in, and its sums.
  template <typename F>
  double linear(T* of, T one, double* of_sums, F make) const {
    of[cost.n] = one;
    of[cost.n + 1] = T(0);
    int64_t at = cost.n + 2;
    for (const CostAtoms& a : cost.atoms) {
      make(a, at);
      at += a.size;
    }
    double total = 0.0;
    for (const CostRun& run : cost.linear) total += run.weight * sum(of + run.first, run.count);
    for (int64_t k = 0; k < cost.sums(); ++k) {
      of_sums[k] = 0.0;
      for (int64_t r = cost.offsets[k]; r < cost.offsets[k + 1]; ++r)
        of_sums[k] += cost.runs[r].weight * sum(of + cost.runs[r].first, cost.runs[r].count);
    }
    return total;
  }

  void multiply(const CostAtoms& a, const CostFactor& factor, T* to) const {
    const T* from = x;
    if (a.is_any)
      each_atom(factor, a.size, [=](int64_t i, int64_t j) { to[i] *= T(1) - from[j]; });
    else
      each_atom(factor, a.size, [=](int64_t i, int64_t j) { to[i] *= from[j]; });
  }

  void add(const CostRun& run, double by, T* dx) const {
    const T whole = T(by * run.weight);
    T* to = dx + run.first;
    for (int64_t i = 0; i < run.count; ++i) to[i] += whole;
  }

  // To each factor the product of the others: of those before it, and `by`, which gathers those behind.
  void spread(const CostAtoms& a, T* by, T* before, T* dx) const {
    const int64_t n = a.size, factors = int64_t(a.factors.size());
    std::fill_n(before, n, T(1));
    for (int64_t k = 0; k + 1 < factors; ++k) {
      std::copy_n(before + k * n, n, before + (k + 1) * n);
      multiply(a, a.factors[k], before + (k + 1) * n);
    }
    for (int64_t k = factors; k-- > 0;) {
      const CostFactor& factor = a.factors[k];
      const T* others = before + k * n;
      if (factor.repeat == 1 && factor.stride == 1) {
        T* to = dx + factor.first;
        for (int64_t i = 0; i < n; ++i) to[i] += by[i] * others[i];
      } else if (factor.repeat > 1) {
        for (int64_t i = 0, to = factor.first; i < n; i += factor.repeat, to += factor.stride)
          dx[to] += dot(by + i, others + i, std::min(factor.repeat, n - i));
      } else {
        for (int64_t i = 0; i < n; ++i) dx[factor.index[i]] += by[i] * others[i];
      }
      if (k > 0) multiply(a, factor, by);
    }
  }
};

// x = (p_open(clamp(log_alpha - price * direction, -limit, limit)) - low) * scale, in [0, 1] but for roundings,
// and what it falls by with the price; direction null: price is 0. All of it is finite.
template <typename T>
void share_open(const T* __restrict log_alpha, const T* __restrict direction, const BudgetGates& gates,
                T price, T limit, T* __restrict x, T* __restrict fall) {
  const T shift = T(gates.shift), scale = T(gates.scale), start = T(-gates.low * gates.scale);
  const auto p_open = [=](T within) {
    return T(1) / (T(1) + math::exp_within(math::bounded(shift - within, T(87))));
  };
  if (direction == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < gates.size; ++i)
      x[i] = start + scale * p_open(math::bounded(log_alpha[i], limit));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < gates.size; ++i) {
    const T moved = log_alpha[i] - price * direction[i], within = math::bounded(moved, limit);
    const T p = p_open(within), by = direction[i] * scale * (p * (T(1) - p));
    x[i] = start + scale * p;
    fall[i] = within == moved ? by : T(0);
  }
}

// The gates of one kind on their way to the budget.
template <typename T>
struct MovingKind {
  const BudgetKind& kind;
  const Evaluation<T>& evaluation;
  const T* const* log_alpha;
  const T* direction;  // (n)
  double limit;

  // The share of the cost at a price, and by how much it falls there.
  double at(double price, double& slope) const {
    const T* q = direction;
    T *x = evaluation.x, *fall = evaluation.fall;
    for (size_t g = 0; g < kind.gates.size(); ++g) {
      const int64_t n = kind.gates[g].size;
      share_open(log_alpha[g], q, kind.gates[g], T(price), T(limit), x, fall);
      q += n, x += n, fall += n;
    }
    const double share = (evaluation.value() - kind.offset) / kind.unit;
    slope = evaluation.slope() / kind.unit;
    return share;
  }

  // From which on every gate that moves lies at the lower end.
  double highest() const {
    double found = 0.0;
    const T* q = direction;
    for (size_t g = 0; g < kind.gates.size(); ++g)
      for (int64_t i = 0; i < kind.gates[g].size; ++i, ++q)
        if (*q > T(0)) found = std::max(found, (double(log_alpha[g][i]) + limit) / double(*q));
    return found;
  }

  // The smallest price at which the share is at most `target`: Newton's steps from `guess`, the price of the
  // step before. They stay between the two prices around the target, as soon as there are two, by a line
  // through both, and by halves of what is between where they do not close in. The last step is not
  // evaluated: it is off by what the slope changes on so short a way.
  double solve(double start, double slope, double target, double guess) const {
    const double tolerance = sizeof(T) == 4 ? 3e-7 : 1e-11, none = std::numeric_limits<double>::infinity();
    double low = 0.0, at_low = start - target, high = none, at_high = 0.0, step = none, end = none;
    const auto within_end = [&](double asked) {
      if (end == none) end = highest();
      return asked < end ? asked : end;  // NaN: end
    };
    const double first = at_low / slope;
    double price = guess > 0.0 && guess < none && at_low > tolerance ? guess : within_end(first);
    for (int i = 0; i < kSearch; ++i) {
      const double found = at(price, slope) - target;
      if (found > 0.0)
        low = price, at_low = found;
      else
        high = price, at_high = found;
      double next = price + found / slope;
      if (std::abs(found) <= tolerance) {
        if (next > low && next < high) price = next;
        break;
      }
      if (high == none) {
        if (!(next > price && next < 8.0 * price)) next = within_end(next);
        if (price >= end) return end;  // that is all there is
        if (!(next > price)) next = end;
      } else {
        if (!(next > low && next < high)) next = (low * at_high - high * at_low) / (at_high - at_low);
        if (!(next > low && next < high && std::abs(next - price) <= step / 2)) next = low + (high - low) / 2;
        if (!(next > low && next < high)) return high;  // neighbours
      }
      step = std::abs(next - price);
      price = next;
    }
    return slope > 0.0 ? price : within_end(price);
  }
};

// next = decay * v + (1 - decay) * g^2, grad null: g = 0; false if one, or a log_alpha, is not finite.
template <typename T>
bool next_moment(const T* __restrict moment, const T* __restrict grad, const T* __restrict log_alpha,
                 int64_t n, T* __restrict next, double& total) {
  const T decay = T(kDecay), rest = T(1 - kDecay);
  double added = 0.0;
  T zeros = T(0);  // a sum of zeros, unless one is not finite
  if (grad == nullptr) {
#pragma omp simd reduction(+ : zeros, added)
    for (int64_t i = 0; i < n; ++i) {
      next[i] = decay * moment[i];
      zeros += (next[i] + log_alpha[i]) * T(0);
      added += double(next[i]);
    }
  } else {
#pragma omp simd reduction(+ : zeros, added)
    for (int64_t i = 0; i < n; ++i) {
      next[i] = decay * moment[i] + rest * (grad[i] * grad[i]);
      zeros += next[i] * T(0) + log_alpha[i] * T(0);
      added += double(next[i]);
    }
  }
  total += added;
  return zeros == T(0);
}

// q = dc/da / (sqrt(v^) + floor * rms(sqrt(v^))) and what c falls by at price 0; x: of the gates there.
template <typename T>
double directions(const BudgetGates& gates, double unit, const T* __restrict x, const T* __restrict dx,
                  const T* __restrict moment, T correction, T floor, T* __restrict direction) {
  const T low = T(gates.low), width = T(1.0 / gates.scale), factor = T(gates.scale / unit);
  const T least = T(kLeast), by_gradient = floor > T(0) ? T(1) : T(0), otherwise = T(1) - by_gradient;
  double slope = 0.0;
#pragma omp simd reduction(+ : slope)
  for (int64_t i = 0; i < gates.size; ++i) {
    const T p = low + x[i] * width, dc = dx[i] * (p * (T(1) - p)) * factor;
    const T q = dc / (by_gradient * (std::sqrt(moment[i] * correction) + floor) + otherwise);
    direction[i] = q < least ? T(0) : q;
    slope += double(dc * direction[i]);
  }
  return slope;
}

template <typename T>
bool budget_step(const std::vector<BudgetKind>& kinds, const std::vector<int64_t>& numbers,
                 const BudgetStep<T>& s) {
  int64_t n = 0, width = 0, sums = 0, products = 0;
  for (const BudgetKind& kind : kinds) {
    n += kind.cost.n;
    width = std::max(width, kind.cost.width());
    sums = std::max(sums, kind.cost.sums());
    products = std::max(products, kind.cost.products());
  }
  thread_local Workspace workspace;
  double* of_sums = static_cast<double*>(
      workspace.get(sizeof(double) * 2 * sums + sizeof(T) * (2 * n + 3 * width + products)));
  T *next = reinterpret_cast<T*>(of_sums + 2 * sums), *direction = next + n, *x = direction + n;
  T *fall = x + width, *dx = fall + width, *before = dx + width;

  bool fine = true;
  size_t gate = 0;
  int64_t start = 0;
  std::vector<double> totals;  // of the kinds' moments
  for (const BudgetKind& kind : kinds) {
    double total = 0.0;
    for (const BudgetGates& g : kind.gates) {
      fine &= next_moment(s.moment + start, s.grad[gate], s.log_alpha[gate], g.size, next + start, total);
      start += g.size;
      ++gate;
    }
    totals.push_back(total);
  }
  if (!fine) {
    ++*s.skipped;
    return false;
  }
  ++*s.step;
  std::copy_n(next, n, s.moment);

  const double correction = 1.0 / (1.0 - std::pow(kDecay, double(*s.step)));
  const double share = s.ramp_steps > 0.0 ? std::min(double(*s.step) / s.ramp_steps, 1.0) : 1.0;
  const T limit = T(s.limit);
  gate = 0;
  start = 0;
  for (size_t k = 0; k < kinds.size(); ++k) {
    const BudgetKind& kind = kinds[k];
    T* const* log_alpha = s.log_alpha.data() + gate;
    const Evaluation<T> evaluation{kind.cost, x, fall, of_sums, of_sums + sums};
    int64_t at = 0;
    for (size_t g = 0; g < kind.gates.size(); ++g) {
      share_open<T>(log_alpha[g], nullptr, kind.gates[g], T(0), limit, x + at, nullptr);
      at += kind.gates[g].size;
    }
    const double now = (evaluation.value() - kind.offset) / kind.unit;
    const double target = s.first[numbers[k]] + (kind.keep - s.first[numbers[k]]) * share;
    double price = 0.0;
    if (!(now <= target)) {
      evaluation.gradient(dx, before);
      const T floor = T(kFloor * std::sqrt(totals[k] / double(kind.cost.n) * correction));
      double slope = 0.0;
      at = 0;
      for (size_t g = 0; g < kind.gates.size(); ++g) {
        const int64_t size = kind.gates[g].size;
        if (s.moves[gate + g])
          slope += directions(kind.gates[g], kind.unit, x + at, dx + at, next + start + at, T(correction),
                              floor, direction + at);
        else
          std::fill_n(direction + at, size, T(0));
        at += size;
      }
      const MovingKind<T> moving{kind, evaluation, log_alpha, direction, s.limit};
      price = moving.solve(now, slope, target, s.price[numbers[k]]);
    }
    s.price[numbers[k]] = price;
    const T by = T(price);
    const T* q = direction;
    for (size_t g = 0; g < kind.gates.size(); ++g) {
      const int64_t size = kind.gates[g].size;
      T* to = log_alpha[g];
      if (s.moves[gate + g]) {
        if (price > 0.0) {
#pragma omp simd
          for (int64_t i = 0; i < size; ++i) to[i] -= by * q[i];
        }
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) to[i] = math::bounded(to[i], limit);
      }
      q += size;
    }
    gate += kind.gates.size();
    start += kind.cost.n;
  }
  return true;
}

}  // namespace L0_ISA
}  // namespace l0
