// Proximal operators; compiled once per instruction set, like gemm_impl.h. Each sum over a group has one
// order, however many threads.

namespace l0 {
namespace L0_ISA {

constexpr int64_t kProxChunk = 1024;  // elements that go through all stages while they are in the L1 cache
constexpr int64_t kProxWide = 8192;   // likewise, without a buffer: constants of a stage take time, too
constexpr int64_t kProxLong = 32768;  // elements of a task where there is one stage and no buffer
constexpr int64_t kProxShortRows = 4096;  // elements of groups that are read together
constexpr int64_t kProxSegment = 64;      // elements in a row from which on a group is read by itself
constexpr int64_t kProxParts = 16, kProxRows = 32;  // parts of the rows at most, and rows of a part at least
constexpr int kProxTogether = 8;  // groups, or rows, that are read at once
constexpr int64_t kProxAhead = 4096;  // bytes: the processor's own prefetchers stop at the end of a page
constexpr int64_t kProxBlock = 256;   // bytes that are asked for at once
constexpr double kProxShort = 0.002, kProxMiddle = 0.02, kProxLonger = 0.04;  // of p, for the polynomials below

// Of the root of (1 - d)^2 d = p in [0, 1/3], which is d = 4/3 sin^2(asin(s) / 3) with s^2 = 27/4 p <= 1.
inline double prox_root(double p) {
  const double s = 6.75 * p < 1.0 ? std::sqrt(6.75 * p) : 1.0;
  const double sine = std::sin(std::asin(s) / 3.0);
  return 4.0 / 3.0 * sine * sine;
}

// scale * d / p, a polynomial in u = 1 - cos(asin(s)), right to 3e-8. As a factor of p it loses nothing where
// p is small and u cancels.
struct ProxRatio {
  float c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10;
  explicit ProxRatio(double scale)
      : c0(float(scale)),
        c1(float(scale * 0.592590868473053)),
        c2(float(scale * 0.3183280825614929)),
        c3(float(scale * 0.16443374752998352)),
        c4(float(scale * 0.09657425433397293)),
        c5(float(scale * -0.008768410421907902)),
        c6(float(scale * 0.16814671456813812)),
        c7(float(scale * -0.24280506372451782)),
        c8(float(scale * 0.27616405487060547)),
        c9(float(scale * -0.16115251183509827)),
        c10(float(scale * 0.046488214284181595)) {}
  float operator()(float p) const {
    const float rest = 1.0f - 6.75f * p, u = 1.0f - std::sqrt(rest > 0.0f ? rest : 0.0f);
    float y = c10;
    y = y * u + c9;
    y = y * u + c8;
    y = y * u + c7;
    y = y * u + c6;
    y = y * u + c5;
    y = y * u + c4;
    y = y * u + c3;
    y = y * u + c2;
    y = y * u + c1;
    return y * u + c0;
  }
};

// Has the block that lies kProxAhead behind `from` brought near, if there is one: no address is too far.
inline void prox_ask_ahead(const void* from) {
  const char* at = static_cast<const char*>(from) + kProxAhead;
  for (int64_t byte = 0; byte < kProxBlock; byte += 64) __builtin_prefetch(at + byte);
}

// to[i] = f(from[i], i); from may be to.
template <typename T, typename F>
inline void prox_each(const T* from, T* to, int64_t n, F f) {
  constexpr int64_t kBlock = kProxBlock / sizeof(T);
  const int64_t whole = n / kBlock * kBlock;
  for (int64_t begin = 0; begin < whole; begin += kBlock) {
    prox_ask_ahead(from + begin);
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) to[begin + i] = f(from[begin + i], begin + i);
  }
#pragma omp simd
  for (int64_t i = 0; i < n - whole; ++i) to[whole + i] = f(from[whole + i], whole + i);
}

struct ProxSame {
  template <typename T>
  T operator()(T x) const {
    return x;
  }
};

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
// |x| less `by`, which is as much at the threshold of a continuous operator: a rounding beyond is no jump.
template <typename T>
inline T prox_shrunk(T x, T size, T by, T threshold) {
  return size <= threshold ? T(0) : std::copysign(size - by, x);
}

// then(f), where f(x) is the operator of a stage with step 1.
template <typename T, typename F>
void prox_transformed_l1(const ProxStage& s, F then) {
  const double alpha = s.second, cube = s.third, least = s.threshold;
  const T third = T(cube), a = T(alpha), threshold = T(least);
  if constexpr (std::is_same_v<T, double>) {
    const T far = T(1e300);  // beyond it nothing shrinks, and inf * 0 would be NaN
    then([=](T x) {
      const T size = std::fabs(x), whole = size + a > far ? far : size + a, ratio = third / whole;
      return prox_shrunk(x, size, whole * prox_root(ratio * ratio * ratio), threshold);
    });
  } else {
    // |x| + a times the root of p = ratio^3; by third, as p may be below the smallest number. Where no p is
    // large, the root over p is a polynomial of few terms, right to 1e-8 (the last to 3e-8).
    const auto with = [=](auto root) {
      then([=](T x) {
        const T size = std::fabs(x), ratio = third / (size + a), square = ratio * ratio;
        return prox_shrunk(x, size, square * root(ratio * square), threshold);
      });
    };
    const double highest = cube / (alpha + least), most = highest * highest * highest;
    const auto by = [=](double c) { return T(cube * c); };
    if (most <= kProxShort) {
      const T c1 = by(1.9999475479125977), c2 = by(7.084445476531982);
      return with([=](T p) { return third + p * (c1 + p * c2); });
    }
    if (most <= kProxMiddle) {
      const T c1 = by(1.9999890327453613), c2 = by(7.005204677581787), c3 = by(29.237926483154297),
              c4 = by(185.71495056152344);
      return with([=](T p) { return third + p * (c1 + p * (c2 + p * (c3 + p * c4))); });
    }
    if (most <= kProxLonger) {
      const T c1 = by(2.000021457672119), c2 = by(6.992681980133057), c3 = by(30.803844451904297),
              c4 = by(105.50228881835938), c5 = by(1467.9892578125);
      return with([=](T p) { return third + p * (c1 + p * (c2 + p * (c3 + p * (c4 + p * c5)))); });
    }
    with(ProxRatio(cube));
  }
}

template <typename T, typename F>
void prox_with(const ProxStage& s, F then) {
  switch (s.kind) {
    case Prox::kNone:
      return then(ProxSame{});
    case Prox::kL0L1: {
      const T l1 = T(s.second), threshold = T(s.threshold);
      return then([=](T x) { return prox_soft(x, l1, threshold); });
    }
    case Prox::kL0L2: {
      const T shrink = T(1 + s.second), threshold = T(s.threshold);
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
      const T third = T(s.third), a = T(alpha);
      const T weight = T(s.first), limit = T(alpha * alpha / (2 * (alpha + 1))), half = T(alpha / 2);
      const T slope = T((alpha + 1) / alpha), twice = T(2 * (alpha + 1));
      const auto with = [=](auto shrink) {
        each([=](T x, T by) {
          const T size = std::fabs(x), own = weight * by, jump = std::sqrt(twice * own) - half;
          return prox_shrunk(x, size, shrink(size + a, by), own <= limit ? own * slope : jump);
        });
      };
      if constexpr (std::is_same_v<T, double>) {
        const T far = T(1e300);
        return with([=](T sum, T by) {
          const T whole = sum > far ? far : sum, ratio = third / whole;
          return whole * prox_root(by * (ratio * ratio * ratio));
        });
      } else {
        const ProxRatio root(1.0);
        return with([=](T sum, T by) {
          const T ratio = third / sum, square = ratio * ratio;
          return third * square * by * root(by * (ratio * square));
        });
      }
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
    const ProxStage none{Prox::kNone, 0.0, 0.0, 0.0, 0.0};
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

// As many values as a vector has doubles, as these; the compiler's own way is three instructions.
inline Vec<double>::type prox_wide(const float* v) {
#if L0_VECTOR_BYTES == 64
  return (Vec<double>::type)_mm512_maskz_cvtps_pd(__mmask8(0xff), _mm256_loadu_ps(v));
#elif L0_VECTOR_BYTES == 32
  return (Vec<double>::type)_mm256_cvtps_pd(_mm_loadu_ps(v));
#else
  Vec<double>::type wide;
  for (int64_t i = 0; i < int64_t(kVectorBytes / sizeof(double)); ++i) wide[i] = double(v[i]);
  return wide;
#endif
}
inline Vec<double>::type prox_wide(const double* v) { return load(v); }

// Four sums that need not wait for one another.
template <typename T, typename F>
double prox_squares(const T* v, int64_t n, F f) {
  constexpr int64_t kDoubles = kVectorBytes / sizeof(double), kBlock = 8 * kDoubles;
  Vec<double>::type a{}, b{}, c{}, d{};
  T values[kBlock];
  const auto add = [&](const T* from, int64_t some) {
    if (!std::is_same_v<F, ProxSame> || some < kBlock) {
      if (some < kBlock) std::memset(values, 0, sizeof values);
      prox_each(from, values, some, [=](T x, int64_t) { return f(x); });
      from = values;
    }
    for (int64_t i = 0; i < kBlock; i += 4 * kDoubles) {
      const auto y0 = prox_wide(from + i), y1 = prox_wide(from + i + kDoubles);
      const auto y2 = prox_wide(from + i + 2 * kDoubles), y3 = prox_wide(from + i + 3 * kDoubles);
      a += y0 * y0, b += y1 * y1, c += y2 * y2, d += y3 * y3;
    }
  };
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) add(v + i, kBlock);
  if (i < n) add(v + i, n - i);
  const Vec<double>::type all = (a + b) + (c + d);
  double sums[kDoubles];
  std::memcpy(sums, &all, sizeof sums);
  for (int64_t half = kDoubles / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  return sums[0];
}

// Of some rows, which are `stride` apart: one after the other would read and write `sums` for each.
template <typename T, typename F>
void prox_add_squares(const T* v, int64_t stride, int64_t rows, int64_t n, double* sums, F f) {
  const auto add = [=](auto together, const T* first) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0.0;
      for (int r = 0; r < decltype(together)::value; ++r) {
        const double y = f(first[r * stride + i]);
        sum += y * y;
      }
      sums[i] += sum;
    }
  };
  int64_t o = 0;
  for (; o + kProxTogether <= rows; o += kProxTogether)
    add(std::integral_constant<int, kProxTogether>{}, v + o * stride);
  for (; o < rows; ++o) add(std::integral_constant<int, 1>{}, v + o * stride);
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

// Groups of long segments: what is short is still in the cache when it is scaled, and several short ones need
// not wait for one another's norms.
template <typename T, typename S>
void prox_segments(const ProxParams<T>& p, int num_threads) {
  const ProxMemory<T, S> memory{p};
  const int64_t chunk = memory.chunk(), size = p.outer * p.inner;
  const int64_t together = std::clamp<int64_t>(kProxShortRows / size, 1, kProxTogether);
  const bool is_alone = p.before.kind == Prox::kNone && p.after.kind == Prox::kNone && p.x == p.y;
#pragma omp parallel for schedule(static) \
    num_threads(num_threads) if (num_threads > 1 && size * p.groups > 32768)
  for (int64_t first = 0; first < p.groups; first += together) {
    const int64_t some = std::min(together, p.groups - first);
    const auto each = [&](int64_t g, auto f) {
      for (int64_t o = 0; o < p.outer; ++o)
        for (int64_t i = 0; i < p.inner; i += chunk)
          f((o * p.groups + g) * p.inner + i, std::min(chunk, p.inner - i));
    };
    double squares[kProxTogether];
    for (int64_t k = 0; k < some; ++k) {
      double sum = 0.0;
      each(first + k, [&](int64_t begin, int64_t n) {
        T buffer[kProxChunk];
        if (p.step || p.before.kind == Prox::kNone) {
          sum += prox_squares(memory.first(begin, n, buffer), n, ProxSame{});
        } else {
          const T* v = memory.load(begin, n, buffer);
          prox_with<T>(p.before, [&](auto f) { sum += prox_squares(v, n, f); });
        }
      });
      squares[k] = sum;
    }
    for (int64_t k = 0; k < some; ++k) squares[k] = prox_factor(p, first + k, squares[k]);
    for (int64_t k = 0; k < some; ++k) {
      const T factor = T(squares[k]);
      if (factor == T(0))
        each(first + k, [&](int64_t begin, int64_t n) { memory.zero(begin, n); });
      else if (squares[k] != 1.0 || !is_alone)
        each(first + k, [&](int64_t begin, int64_t n) { memory.finish(begin, n, &factor, false); });
    }
  }
}

// Groups of columns that are read row by row: whole rows, as memory is fastest in long runs. Each part of the
// rows has its own sums, and the parts are as many however many threads there are.
template <typename T, typename S>
void prox_columns(const ProxParams<T>& p, int num_threads) {
  const ProxMemory<T, S> memory{p};
  const int64_t width = p.groups * p.inner, parts = std::clamp<int64_t>(p.outer / kProxRows, 1, kProxParts);
  const int64_t rows = round_up((p.outer + parts - 1) / parts, kProxTogether);
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
      for (int64_t o = part * rows; o < end; o += kProxTogether) {
        const int64_t some = std::min<int64_t>(kProxTogether, end - o);
        T buffers[kProxTogether * kProxChunk];
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

template <typename S>
void top_k(const void* x, void* y, int64_t n, int64_t k, int num_threads);  // prox_top_impl.h

template <typename T, typename S>
void prox_as(const ProxParams<T>& p, int num_threads) {
  if (p.outer * p.groups * p.inner == 0) return;
  if (p.group == ProxGroup::kTop) return top_k<S>(p.x, p.y, p.inner, int64_t(p.lam), num_threads);
  if (p.group == ProxGroup::kNone) return prox_elements<T, S>(p, num_threads);
  if (p.outer == 1 || p.inner >= kProxSegment) return prox_segments<T, S>(p, num_threads);
  prox_columns<T, S>(p, num_threads);
}

inline void prox_prepare(ProxStage& s) {
  const double first = s.first, second = s.second;
  if (s.kind == Prox::kL0L1) s.threshold = std::sqrt(2 * first);
  if (s.kind == Prox::kL0L2) s.threshold = std::sqrt(2 * first * (1 + second));
  if (s.kind == Prox::kTransformedL1) {
    const double critical = second * second / (2 * (second + 1));
    const double slow = first * ((second + 1) / second);
    s.threshold = first <= critical ? slow : std::sqrt(2 * first * (second + 1)) - second / 2;
    s.third = std::cbrt(first) * std::cbrt(second) * std::cbrt(second + 1);
  }
}

template <typename T>
void prox(const ProxParams<T>& given, int num_threads) {
  ProxParams<T> p = given;
  prox_prepare(p.before);
  prox_prepare(p.after);
  if constexpr (std::is_same_v<T, double>) return prox_as<double, double>(p, num_threads);
  if constexpr (std::is_same_v<T, float>) {
    if (p.type == DType::kBFloat16) return prox_as<float, BFloat16>(p, num_threads);
    if (p.type == DType::kHalf) return prox_as<float, Half>(p, num_threads);
    prox_as<float, float>(p, num_threads);
  }
}

}  // namespace L0_ISA
}  // namespace l0
