// Proximal operators; compiled once per instruction set, like gemm_impl.h. Each sum over a group has one
// order, however many threads.

namespace l0 {
namespace L0_ISA {

constexpr int64_t kProxChunk = 1024;  // elements that go through all stages while they are in the L1 cache
constexpr int64_t kProxWide = 8192;   // likewise, without a buffer: constants of a stage take time, too
constexpr int64_t kProxLong = 32768;  // elements of a task where there is one stage and no buffer
constexpr int64_t kProxSegment = 64;  // elements in a row from which on a group is read by itself
constexpr int64_t kProxParts = 16, kProxRows = 32;  // parts of the rows at most, and rows of a part at least
constexpr double kProxShort = 0.002, kProxLonger = 0.04;  // up to which the series below are right to 2e-9

// Of the root of (1 - d)^2 d = p in [0, 1/3], which is d = 4/3 sin^2(asin(s) / 3) with s^2 = 27/4 p <= 1. In
// u = 1 - cos(asin(s)), got without cancellation, it is u times a polynomial, right to 2e-9 of d.
inline double prox_root(double p) {
  const double s = 6.75 * p < 1.0 ? std::sqrt(6.75 * p) : 1.0;
  const double sine = std::sin(std::asin(s) / 3.0);
  return 4.0 / 3.0 * sine * sine;
}
inline float prox_root(float p) {
  const float s2 = 6.75f * p < 1.0f ? 6.75f * p : 1.0f;
  const float u = s2 / (1.0f + std::sqrt(1.0f - s2));
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

// The same root over p, where p is small.
template <typename T>
inline T prox_short_root(T p) {
  return T(1) + p * (T(2) + p * (T(7) + p * T(30)));
}
template <typename T>
inline T prox_longer_root(T p) {
  T y = T(9163.576171875);
  y = y * p + T(384.6288146972656);
  y = y * p + T(153.18887329101562);
  y = y * p + T(29.84963607788086);
  y = y * p + T(7.001040458679199);
  y = y * p + T(1.9999973773956299);
  return y * p + T(1);
}

// to[i] = f(from[i], i); from may be to.
template <typename T, typename F>
inline void prox_each(const T* from, T* to, int64_t n, F f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = f(from[i], i);
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
inline T prox_shrunk(T x, T by, T threshold) {
  const T size = std::fabs(x), shrunk = size - by;
  return size <= threshold ? T(0) : std::copysign(shrunk < T(0) ? T(0) : shrunk, x);
}

// then(f), where f(x) is the operator of a stage with step 1.
template <typename T, typename F>
void prox_transformed_l1(const ProxStage& s, F then) {
  const double lam = s.first, alpha = s.second, critical = alpha * alpha / (2 * (alpha + 1));
  const double slow = lam * ((alpha + 1) / alpha), jump = std::sqrt(2 * lam * (alpha + 1)) - alpha / 2;
  const double least = lam <= critical ? slow : jump;
  const double cube = std::cbrt(lam) * std::cbrt(alpha) * std::cbrt(alpha + 1);
  const double highest = cube / (alpha + least), most = highest * highest * highest;  // of p
  const T third = T(cube), a = T(alpha), threshold = T(least);
  // |x| + a times the root of p = ratio^3; by third, as p may be below the smallest number
  const auto with = [=](auto root) {
    then([=](T x) {
      const T ratio = third / (std::fabs(x) + a), square = ratio * ratio;
      return prox_shrunk(x, third * square * root(ratio * square), threshold);
    });
  };
  if (std::is_same_v<T, float> && most <= kProxShort) return with([](T p) { return prox_short_root(p); });
  if (std::is_same_v<T, float> && most <= kProxLonger) return with([](T p) { return prox_longer_root(p); });
  const T far = T(1e37);  // beyond it nothing shrinks, and inf * 0 would be NaN
  then([=](T x) {
    const T sum = std::fabs(x) + a, whole = sum > far ? far : sum, ratio = third / whole;
    return prox_shrunk(x, whole * prox_root(ratio * ratio * ratio), threshold);
  });
}

template <typename T, typename F>
void prox_with(const ProxStage& s, F then) {
  switch (s.kind) {
    case Prox::kNone:
      return then([](T x) { return x; });
    case Prox::kL0L1: {
      const T l1 = T(s.second), threshold = T(std::sqrt(2 * s.first));
      return then([=](T x) { return prox_soft(x, l1, threshold); });
    }
    case Prox::kL0L2: {
      const T shrink = T(1 + s.second), threshold = T(std::sqrt(2 * s.first * (1 + s.second)));
      return then([=](T x) { return prox_ridge(x, shrink, threshold); });
    }
    case Prox::kTransformedL1:
      return prox_transformed_l1<T>(s, then);
  }
}

// The operator of a stage whose weights are multiplied by the step of each element.
template <typename T>
void prox_by_step(const ProxStage& s, const T* step, const T* from, T* to, int64_t n) {
  const auto each = [=](auto f) { prox_each(from, to, n, [=](T x, int64_t i) { return f(x, step[i]); }); };
  switch (s.kind) {
    case Prox::kNone:
      return;
    case Prox::kL0L1: {
      const T l1 = T(s.second), twice = T(2 * s.first);
      return each([=](T x, T by) { return prox_soft(x, l1 * by, std::sqrt(twice * by)); });
    }
    case Prox::kL0L2: {
      const T l2 = T(s.second), twice = T(2 * s.first);
      return each([=](T x, T by) {
        const T shrink_by = T(1) + l2 * by;
        return prox_ridge(x, shrink_by, std::sqrt(twice * by * shrink_by));
      });
    }
    case Prox::kTransformedL1: {
      const double alpha = s.second;
      const T third = T(std::cbrt(s.first) * std::cbrt(alpha) * std::cbrt(alpha + 1)), a = T(alpha);
      const T weight = T(s.first), limit = T(alpha * alpha / (2 * (alpha + 1))), half = T(alpha / 2);
      const T slope = T((alpha + 1) / alpha), twice = T(2 * (alpha + 1)), far = T(1e37);
      return each([=](T x, T by) {
        const T sum = std::fabs(x) + a, whole = sum > far ? far : sum, ratio = third / whole;
        const T own = weight * by, jump = std::sqrt(twice * own) - half;
        const T threshold = own <= limit ? own * slope : jump;
        return prox_shrunk(x, whole * prox_root(by * (ratio * ratio * ratio)), threshold);
      });
    }
  }
}

template <typename T>
void prox_stage(const ProxStage& s, const T* step, const T* from, T* to, int64_t n) {
  if (step) return prox_by_step(s, step, from, to, n);
  if (s.kind == Prox::kNone) return;
  prox_with<T>(s, [=](auto f) { prox_each(from, to, n, [=](T x, int64_t) { return f(x); }); });
}

// Both stages, those of step 1, around a factor for each element, or one for all that is not 0; only one of
// them may be there.
template <typename T>
void prox_scaled(const ProxStage& before, const ProxStage& after, const T* factor, bool by_element,
                 const T* from, T* to, int64_t n) {
  const auto with = [=](auto scaled) {
    if (after.kind == Prox::kNone)
      prox_with<T>(before,
                   [=](auto f) { prox_each(from, to, n, [=](T x, int64_t i) { return scaled(f(x), i); }); });
    else
      prox_with<T>(after,
                   [=](auto f) { prox_each(from, to, n, [=](T x, int64_t i) { return f(scaled(x, i)); }); });
  };
  const T one = *factor;
  const auto by_factor = [=](T x, int64_t i) { return factor[i] == T(0) ? T(0) : x * factor[i]; };
  const auto by_one = [=](T x, int64_t) { return x * one; };
  const bool is_alone = before.kind == Prox::kNone && after.kind == Prox::kNone;  // rows may be short
  if (is_alone && by_element) return prox_each(from, to, n, by_factor);
  if (is_alone) return prox_each(from, to, n, by_one);
  if (by_element) return with(by_factor);
  with(by_one);
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
  // How many elements `first` and `finish` take at once.
  int64_t chunk() const { return std::is_same_v<S, T> && !p.step ? kProxWide : kProxChunk; }
  const T* step(int64_t begin) const { return p.step ? p.step + begin : nullptr; }

  // before(x)
  const T* first(int64_t begin, int64_t n, T* buffer) const {
    const T* v = load(begin, n, buffer);
    if (p.before.kind == Prox::kNone) return v;
    prox_stage(p.before, step(begin), v, buffer, n);
    return buffer;
  }

  // All stages, with a factor by element, or with one for all.
  void finish(int64_t begin, int64_t n, const T* factor, bool by_element) const {
    T buffer[kProxChunk];
    const T* v = load(begin, n, buffer);
    T* to = place(begin, buffer);
    const ProxStage none{Prox::kNone, 0.0, 0.0};
    const bool is_before = p.step || !factor || p.after.kind != Prox::kNone, is_after = p.step || !factor;
    if (is_before && p.before.kind != Prox::kNone) {
      prox_stage(p.before, step(begin), v, to, n);
      v = to;
    }
    if (factor) {
      prox_scaled(is_before ? none : p.before, is_after ? none : p.after, factor, by_element, v, to, n);
      v = to;
    }
    if (is_after && p.after.kind != Prox::kNone) {
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

template <typename T, typename F>
double prox_squares(const T* v, int64_t n, F f) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const double y = f(v[i]);
    sum += y * y;
  }
  return sum;
}

// Of some rows, which are `stride` apart: one after the other would read and write `sums` for each.
template <typename T, typename F>
void prox_add_squares(const T* v, int64_t stride, int64_t rows, int64_t n, double* sums, F f) {
  int64_t o = 0;
  for (; o + 4 <= rows; o += 4) {
    const T *v0 = v + o * stride, *v1 = v0 + stride, *v2 = v1 + stride, *v3 = v2 + stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const double y0 = f(v0[i]), y1 = f(v1[i]), y2 = f(v2[i]), y3 = f(v3[i]);
      sums[i] += (y0 * y0 + y1 * y1) + (y2 * y2 + y3 * y3);
    }
  }
  for (; o < rows; ++o) {
    const T* v0 = v + o * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const double y = f(v0[i]);
      sums[i] += y * y;
    }
  }
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
    memory.finish(c * kProxChunk, std::min(kProxChunk, n - c * kProxChunk), nullptr, false);
}

// Groups of long segments, one after the other: a short one is still in the cache when it is scaled.
template <typename T, typename S>
void prox_segments(const ProxParams<T>& p, int num_threads) {
  const ProxMemory<T, S> memory{p};
  const int64_t chunk = memory.chunk();
  const bool is_alone = p.before.kind == Prox::kNone && p.after.kind == Prox::kNone && p.x == p.y;
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && p.outer * p.groups * p.inner > 32768)
  for (int64_t g = 0; g < p.groups; ++g) {
    const auto each = [&](auto f) {
      for (int64_t o = 0; o < p.outer; ++o)
        for (int64_t i = 0; i < p.inner; i += chunk)
          f((o * p.groups + g) * p.inner + i, std::min(chunk, p.inner - i));
    };
    double squares = 0.0;
    each([&](int64_t begin, int64_t n) {
      T buffer[kProxChunk];
      if (p.step || p.before.kind == Prox::kNone) {
        squares += prox_squares(memory.first(begin, n, buffer), n, [](T x) { return x; });
      } else {
        const T* v = memory.load(begin, n, buffer);
        prox_with<T>(p.before, [&](auto f) { squares += prox_squares(v, n, f); });
      }
    });
    const double exact = prox_factor(p, g, squares);
    const T factor = T(exact);
    if (factor == T(0))
      each([&](int64_t begin, int64_t n) { memory.zero(begin, n); });
    else if (exact != 1.0 || !is_alone)
      each([&](int64_t begin, int64_t n) { memory.finish(begin, n, &factor, false); });
  }
}

// Groups of columns that are read row by row: whole rows, as memory is fastest in long runs. Each part of the
// rows has its own sums, and the parts are as many however many threads there are.
template <typename T, typename S>
void prox_columns(const ProxParams<T>& p, int num_threads) {
  const ProxMemory<T, S> memory{p};
  const int64_t width = p.groups * p.inner, parts = std::clamp<int64_t>(p.outer / kProxRows, 1, kProxParts);
  const int64_t rows = (p.outer + parts - 1) / parts;
  thread_local Workspace workspace;
  double* squares = static_cast<double*>(workspace.get((sizeof(double) * parts + sizeof(T)) * width));
  T* factor = reinterpret_cast<T*>(squares + parts * width);
  std::fill_n(squares, parts * width, 0.0);
  const int64_t chunk = memory.chunk();
  const bool in_place = chunk > kProxChunk;
  const bool is_large = num_threads > 1 && p.outer * width > 32768;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (is_large)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t end = std::min(p.outer, (part + 1) * rows);
    for (int64_t i = 0; i < width && part * rows < end; i += chunk) {
      const int64_t n = std::min(chunk, width - i);
      double* sums = squares + part * width + i;
      if (in_place) {
        const T* v = memory.load(part * rows * width + i, n, nullptr);
        prox_with<T>(p.before, [&](auto f) { prox_add_squares(v, width, end - part * rows, n, sums, f); });
        continue;
      }
      for (int64_t o = part * rows; o < end; o += 4) {
        const int64_t some = std::min<int64_t>(4, end - o);
        T buffers[4 * kProxChunk];
        for (int64_t r = 0; r < some; ++r) {
          T* buffer = buffers + r * kProxChunk;
          const T* v = memory.first((o + r) * width + i, n, buffer);
          if (v != buffer) std::copy_n(v, n, buffer);
        }
        prox_add_squares(buffers, kProxChunk, some, n, sums, [](T x) { return x; });
      }
    }
  }
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < width; ++i) squares[i] += squares[part * width + i];
  for (int64_t g = 0; g < p.groups; ++g) {
    double sum = 0.0;
    for (int64_t i = 0; i < p.inner; ++i) sum += squares[g * p.inner + i];
    const T own = T(prox_factor(p, g, sum));
    for (int64_t i = 0; i < p.inner; ++i) factor[g * p.inner + i] = own;
  }
#pragma omp parallel for schedule(static) num_threads(num_threads) if (is_large)
  for (int64_t o = 0; o < p.outer; ++o)
    for (int64_t i = 0; i < width; i += chunk)
      memory.finish(o * width + i, std::min(chunk, width - i), factor + i, true);
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
