// Proximal operators; compiled once per instruction set, like gemm_impl.h. Each sum over a group has one
// order, however many threads.

namespace l0 {
namespace L0_ISA {

constexpr int64_t kProxChunk = 1024;   // elements that go through all stages while they are in the L1 cache
constexpr int64_t kProxLong = 32768;   // elements of a task where there is one stage and no buffer
constexpr int64_t kProxSegment = 64;   // elements in a row from which on a group is read by itself
constexpr double kProxSeries = 0.002;  // up to which four terms are right to 2e-9

// 1 / x for 1e-37 < x < 1e37, to the last bit or two: a division is slower than memory.
inline double prox_inverse(double x) { return 1.0 / x; }
inline float prox_inverse(float x) {
  float y = math::from_bits(0x7ef311c7u - math::to_bits(x));  // to 5 %, and three steps of Newton's
  y = y * (2.0f - x * y);
  y = y * (2.0f - x * y);
  return y + y * (1.0f - x * y);
}

// Of the root of (1 - d)^2 d = p in [0, 1/3], which is d = 4/3 sin^2(asin(s) / 3) with s^2 = 27/4 p <= 1. In
// u = 1 - cos(asin(s)), got without cancellation, it is u times a polynomial, right to 2e-9 of d.
inline double prox_root(double p) {
  const double s = 6.75 * p < 1.0 ? std::sqrt(6.75 * p) : 1.0;
  const double sine = std::sin(std::asin(s) / 3.0);
  return 4.0 / 3.0 * sine * sine;
}
inline float prox_root(float p) {
  const float s2 = 6.75f * p < 1.0f ? 6.75f * p : 1.0f;
  const float u = s2 * prox_inverse(1.0f + std::sqrt(1.0f - s2));
  float y = 0.0001814604412f;
  y = y * u - 0.0003992084366f;
  y = y * u + 0.0006282437938f;
  y = y * u - 8.945745262e-5f;
  y = y * u + 0.0008144265413f;
  y = y * u + 0.00196116306f;
  y = y * u + 0.006505663619f;
  y = y * u + 0.02743474376f;
  y = y * u + 0.2962962969f;
  return y * u;
}

// to[i] = f(from[i], step[i]), or f(from[i]) where there is no step; from may be to.
template <typename T, typename F>
inline void prox_each(const T* from, T* to, int64_t n, F f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = f(from[i]);
}
template <typename T, typename F>
inline void prox_each(const T* step, const T* from, T* to, int64_t n, F f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = f(from[i], step[i]);
}

// What is not above the threshold is 0. A NaN is kept: no comparison with it holds.
template <typename T>
inline T prox_soft(T x, T l1, T threshold) {
  const T size = std::fabs(x) - l1;
  return size <= threshold ? T(0) : std::copysign(size, x);
}
template <typename T>
inline T prox_ridge(T x, T shrink, T threshold) {
  return std::fabs(x) <= threshold ? T(0) : x / shrink;
}
template <typename T>
inline T prox_shrunk(T x, T whole, T root, T threshold) {
  const T size = std::fabs(x), shrunk = size - whole * root;
  return size <= threshold ? T(0) : std::copysign(shrunk < T(0) ? T(0) : shrunk, x);
}

template <typename T>
void prox_l0_l1(const ProxStage& s, const T* step, const T* from, T* to, int64_t n) {
  const T l1 = T(s.second), twice = T(2 * s.first), threshold = T(std::sqrt(2 * s.first));
  if (step)
    prox_each(step, from, to, n, [=](T x, T by) { return prox_soft(x, l1 * by, std::sqrt(twice * by)); });
  else
    prox_each(from, to, n, [=](T x) { return prox_soft(x, l1, threshold); });
}

template <typename T>
void prox_l0_l2(const ProxStage& s, const T* step, const T* from, T* to, int64_t n) {
  const T l2 = T(s.second), twice = T(2 * s.first), shrink = T(1 + s.second);
  const T threshold = T(std::sqrt(2 * s.first * (1 + s.second)));
  if (step)
    prox_each(step, from, to, n, [=](T x, T by) {
      const T shrink_by = T(1) + l2 * by;
      return prox_ridge(x, shrink_by, std::sqrt(twice * by * shrink_by));
    });
  else
    prox_each(from, to, n, [=](T x) { return prox_ridge(x, shrink, threshold); });
}

template <typename T>
void prox_transformed_l1(const ProxStage& s, const T* step, const T* from, T* to, int64_t n) {
  const double lam = s.first, alpha = s.second, critical = alpha * alpha / (2 * (alpha + 1));
  const T third = T(std::cbrt(lam) * std::cbrt(alpha) * std::cbrt(alpha + 1)), a = T(alpha);
  const T most = T(1e37);  // beyond it nothing shrinks, and inf - inf * 0 would be NaN
  const auto whole = [=](T x) {
    const T sum = std::fabs(x) + a;
    return sum > most ? most : sum;
  };
  if (step) {
    const T weight = T(lam), limit = T(critical), slope = T((alpha + 1) / alpha), twice = T(2 * (alpha + 1));
    const T half = T(alpha / 2);
    return prox_each(step, from, to, n, [=](T x, T by) {
      const T sum = whole(x), ratio = third * prox_inverse(sum), own = weight * by;
      const T jump = std::sqrt(twice * own) - half;
      const T threshold = own <= limit ? own * slope : jump;
      return prox_shrunk(x, sum, prox_root(by * (ratio * ratio * ratio)), threshold);
    });
  }
  const double slow = lam * ((alpha + 1) / alpha), jump = std::sqrt(2 * lam * (alpha + 1)) - alpha / 2;
  const T threshold = T(lam <= critical ? slow : jump);
  if (std::is_same_v<T, float> && lam * (alpha + 1) / (alpha * alpha) <= kProxSeries)  // p is largest at 0
    return prox_each(from, to, n, [=](T x) {
      const T sum = whole(x), ratio = third * prox_inverse(sum), p = ratio * ratio * ratio;
      return prox_shrunk(x, sum, p * (T(1) + p * (T(2) + p * (T(7) + p * T(30)))), threshold);
    });
  prox_each(from, to, n, [=](T x) {
    const T sum = whole(x), ratio = third * prox_inverse(sum);
    return prox_shrunk(x, sum, prox_root(ratio * ratio * ratio), threshold);
  });
}

template <typename T>
void prox_stage(const ProxStage& s, const T* step, const T* from, T* to, int64_t n) {
  switch (s.kind) {
    case Prox::kNone:
      return;
    case Prox::kL0L1:
      return prox_l0_l1(s, step, from, to, n);
    case Prox::kL0L2:
      return prox_l0_l2(s, step, from, to, n);
    case Prox::kTransformedL1:
      return prox_transformed_l1(s, step, from, to, n);
  }
}

// Elements of type S as they are computed on: in place where that is T, else by way of a buffer.
template <typename T, typename S>
struct ProxMemory {
  const ProxParams<T>& p;

  const T* load(int64_t begin, int64_t n, T* buffer) const {
    const S* x = static_cast<const S*>(p.x) + begin;
    if constexpr (std::is_same_v<S, T>) {
      (void)n, (void)buffer;
      return x;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) buffer[i] = load_as<T>(x[i]);
      return buffer;
    }
  }
  T* place(int64_t begin, T* buffer) const {
    if constexpr (std::is_same_v<S, T>) {
      (void)buffer;
      return static_cast<S*>(p.y) + begin;
    } else {
      (void)begin;
      return buffer;
    }
  }
  void store(int64_t begin, int64_t n, const T* values) const {
    S* y = static_cast<S*>(p.y) + begin;
    if constexpr (std::is_same_v<S, T>) {
      if (values != y) std::memcpy(y, values, sizeof(T) * n);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] = store_as<S>(values[i]);
    }
  }
  const T* step(int64_t begin) const { return p.step ? p.step + begin : nullptr; }

  // before(x) of up to kProxChunk elements
  const T* first(int64_t begin, int64_t n, T* buffer) const {
    const T* v = load(begin, n, buffer);
    if (p.before.kind == Prox::kNone) return v;
    prox_stage(p.before, step(begin), v, buffer, n);
    return buffer;
  }

  // All stages, with a factor by element, or with one: `by` is 1 or 0.
  void finish(int64_t begin, int64_t n, const T* factor, int64_t by) const {
    T buffer[kProxChunk];
    const T* v = load(begin, n, buffer);
    T* to = place(begin, buffer);
    if (p.before.kind != Prox::kNone) {
      prox_stage(p.before, step(begin), v, to, n);
      v = to;
    }
    if (factor) {
      if (by) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = factor[i] == T(0) ? T(0) : v[i] * factor[i];
      } else {
        const T f = *factor;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = v[i] * f;
      }
      v = to;
    }
    if (p.after.kind != Prox::kNone) {
      prox_stage(p.after, step(begin), v, to, n);
      v = to;
    }
    store(begin, n, v);
  }

  void zero(int64_t begin, int64_t n) const { std::memset(static_cast<S*>(p.y) + begin, 0, sizeof(S) * n); }
};

template <typename T>
double prox_factor(const ProxParams<T>& p, int64_t g, double squares) {
  const double norm = std::sqrt(squares), lam = p.lam * (p.group_step ? p.group_step[g] : 1.0);
  if (p.group == ProxGroup::kL0) return norm <= std::sqrt(2 * lam) ? 0.0 : 1.0;
  return norm <= lam ? 0.0 : 1.0 - lam / norm;
}

template <typename T>
double prox_squares(const T* v, int64_t n) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += double(v[i]) * double(v[i]);
  return sum;
}

template <typename T, typename S>
void prox_elements(const ProxParams<T>& p, int num_threads) {
  const ProxMemory<T, S> memory{p};
  const int64_t n = p.outer * p.groups * p.inner;
  if constexpr (std::is_same_v<S, T>) {
    const int64_t chunks = (n + kProxLong - 1) / kProxLong;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && chunks > 1)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = c * kProxLong;
      prox_stage(p.before, memory.step(begin), memory.load(begin, n, nullptr), memory.place(begin, nullptr),
                 std::min(kProxLong, n - begin));
    }
    return;
  }
  const int64_t chunks = (n + kProxChunk - 1) / kProxChunk;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && n > 32768)
  for (int64_t c = 0; c < chunks; ++c)
    memory.finish(c * kProxChunk, std::min(kProxChunk, n - c * kProxChunk), nullptr, 0);
}

// Groups of long segments, one after the other: a short one is still in the cache when it is scaled.
template <typename T, typename S>
void prox_segments(const ProxParams<T>& p, int num_threads) {
  const ProxMemory<T, S> memory{p};
  const bool is_alone = p.before.kind == Prox::kNone && p.after.kind == Prox::kNone && p.x == p.y;
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && p.outer * p.groups * p.inner > 32768)
  for (int64_t g = 0; g < p.groups; ++g) {
    const auto each = [&](auto f) {
      for (int64_t o = 0; o < p.outer; ++o)
        for (int64_t i = 0; i < p.inner; i += kProxChunk)
          f((o * p.groups + g) * p.inner + i, std::min(kProxChunk, p.inner - i));
    };
    double squares = 0.0;
    each([&](int64_t begin, int64_t n) {
      T buffer[kProxChunk];
      squares += prox_squares(memory.first(begin, n, buffer), n);
    });
    const double exact = prox_factor(p, g, squares);
    const T factor = T(exact);
    if (factor == T(0))
      each([&](int64_t begin, int64_t n) { memory.zero(begin, n); });
    else if (exact != 1.0 || !is_alone)
      each([&](int64_t begin, int64_t n) { memory.finish(begin, n, &factor, 0); });
  }
}

// Groups of columns that are read row by row, a block of columns after the other.
template <typename T, typename S>
void prox_columns(const ProxParams<T>& p, int num_threads) {
  const ProxMemory<T, S> memory{p};
  const int64_t width = p.groups * p.inner, share = (width + num_threads - 1) / num_threads;
  const int64_t wanted = std::min(kProxChunk, std::max(kProxSegment, share));
  const int64_t block = std::max<int64_t>(1, wanted / p.inner), blocks = (p.groups + block - 1) / block;
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && p.outer * width > 32768)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t g0 = b * block, groups = std::min(block, p.groups - g0), n = groups * p.inner;
    double squares[kProxChunk] = {};
    T factor[kProxChunk];
    const int64_t begin = g0 * p.inner;
    int64_t o = 0;
    for (; o + 4 <= p.outer; o += 4) {
      T buffers[4][kProxChunk];
      const T* v[4];
      for (int64_t r = 0; r < 4; ++r) v[r] = memory.first((o + r) * width + begin, n, buffers[r]);
      const T *v0 = v[0], *v1 = v[1], *v2 = v[2], *v3 = v[3];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i)
        squares[i] += (double(v0[i]) * double(v0[i]) + double(v1[i]) * double(v1[i])) +
                      (double(v2[i]) * double(v2[i]) + double(v3[i]) * double(v3[i]));
    }
    for (; o < p.outer; ++o) {
      T buffer[kProxChunk];
      const T* v = memory.first(o * width + begin, n, buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) squares[i] += double(v[i]) * double(v[i]);
    }
    for (int64_t g = 0; g < groups; ++g) {
      double sum = 0.0;
      for (int64_t i = 0; i < p.inner; ++i) sum += squares[g * p.inner + i];
      const T own = T(prox_factor(p, g0 + g, sum));
      for (int64_t i = 0; i < p.inner; ++i) factor[g * p.inner + i] = own;
    }
    for (o = 0; o < p.outer; ++o) memory.finish(o * width + begin, n, factor, 1);
  }
}

template <typename T, typename S>
void prox_as(const ProxParams<T>& p, int num_threads) {
  if (p.outer * p.groups * p.inner == 0) return;
  if (p.group == ProxGroup::kNone) return prox_elements<T, S>(p, num_threads);
  if (p.outer == 1 || p.inner >= kProxSegment) return prox_segments<T, S>(p, num_threads);
  prox_columns<T, S>(p, num_threads);
}

template <typename T>
void prox(const ProxParams<T>& p, int num_threads) {
  if constexpr (std::is_same_v<T, double>) return prox_as<double, double>(p, num_threads);
  if constexpr (std::is_same_v<T, float>) {
    if (p.type == DType::kBFloat16) return prox_as<float, BFloat16>(p, num_threads);
    if (p.type == DType::kHalf) return prox_as<float, Half>(p, num_threads);
    prox_as<float, float>(p, num_threads);
  }
}

}  // namespace L0_ISA
}  // namespace l0
