// The k elements of the largest magnitude; compiled once per instruction set, like gemm_impl.h. Magnitudes are
// compared as the integers that their bits are, which have the same order. A sample says between which two the
// k-th lies; one reading of all counts those above and collects those between.

namespace l0 {
namespace L0_ISA {

constexpr int64_t kTopSample = 65536, kTopLeast = 4096;  // elements of a sample, one in 16 between these two
constexpr int64_t kTopChunk = 32768;  // elements of a task
constexpr int64_t kTopBlock = 2048;   // elements whose keys are collected at once

// The integer of as many bits as a number has, and that of infinity.
template <typename K, K infinity>
struct TopFormat {
  using Key = K;
  static constexpr Key kInfinity = infinity;
};
template <typename S>
struct TopBits;
template <>
struct TopBits<float> : TopFormat<uint32_t, 0x7f800000u> {};
template <>
struct TopBits<double> : TopFormat<uint64_t, 0x7ff0000000000000u> {};
template <>
struct TopBits<BFloat16> : TopFormat<uint16_t, 0x7f80u> {};
template <>
struct TopBits<Half> : TopFormat<uint16_t, 0x7c00u> {};

template <typename S>
struct Top {
  using Key = typename TopBits<S>::Key;
  typedef Key Bits __attribute__((may_alias));
  static constexpr Key kInfinity = TopBits<S>::kInfinity, kMagnitude = Key(~(Key(1) << (8 * sizeof(Key) - 1)));

  const Bits* x;
  Bits* y;  // may be x
  int64_t n, k;
  int threads;

  // A NaN is as large as what is infinite.
  static Key key(Bits bits) {
    const Key size = bits & kMagnitude;
    return size < kInfinity ? size : kInfinity;
  }

  struct Between {
    Key low, high;
  };
  // Between which two keys the k-th lies: four standard deviations of a sample around its place there.
  Between guess() const {
    const int64_t size = std::min(n, std::clamp(n / 16, kTopLeast, kTopSample));
    std::vector<Key> sample(size);
    for (int64_t i = 0; i < size; ++i) sample[i] = key(x[i * n / size]);
    const double place = double(k) / double(n) * double(size);
    const double off = 4.0 * std::sqrt(place * (1.0 - place / double(size))) + 4.0;
    const int64_t first = int64_t(place - off), last = int64_t(place + off) + 1;
    Between found{0, kInfinity};
    const auto at = [&](int64_t i) {
      std::nth_element(sample.begin(), sample.begin() + i, sample.end(), std::greater<Key>());
      return sample[i];
    };
    if (first > 0) found.high = at(first);
    if (last < size) found.low = at(last);
    return found;
  }

  // Appends the keys of a block that lie between, and returns how many lie above.
  static int64_t collect(const Bits* from, int64_t size, Between between, std::vector<Key>& found) {
    Key keys[kTopBlock + 16];
    int64_t above = 0, count = 0, i = 0;
#if L0_VECTOR_BYTES == 64
    if constexpr (sizeof(Key) == 4) {
      const __m512i magnitude = _mm512_set1_epi32(int(kMagnitude)), most = _mm512_set1_epi32(int(kInfinity));
      const __m512i low = _mm512_set1_epi32(int(between.low)), high = _mm512_set1_epi32(int(between.high));
      for (; i + 16 <= size; i += 16) {
        __builtin_prefetch(reinterpret_cast<const char*>(from + i) + kProxAhead);
        const __m512i bits = _mm512_loadu_si512(from + i);
        const __m512i each = _mm512_maskz_min_epu32(__mmask16(-1), _mm512_and_si512(bits, magnitude), most);
        const __mmask16 is_above = _mm512_cmpgt_epu32_mask(each, high);
        const __mmask16 is_between = _mm512_mask_cmpge_epu32_mask(__mmask16(~is_above), each, low);
        above += __builtin_popcount(is_above);
        if (is_between == 0) continue;
        _mm512_storeu_si512(keys + count, _mm512_maskz_compress_epi32(is_between, each));
        count += __builtin_popcount(is_between);
      }
    }
#endif
    for (; i < size; ++i) {
      const Key own = key(from[i]);
      above += own > between.high;
      keys[count] = own;
      count += own >= between.low && own <= between.high;
    }
    found.insert(found.end(), keys, keys + count);
    return above;
  }

  // All keys between, in any order, and how many are above.
  int64_t gather(Between between, std::vector<Key>& found) const {
    int64_t above = 0;
    found.clear();
#pragma omp parallel num_threads(threads) if (threads > 1 && n > kTopChunk)
    {
      std::vector<Key> own;
      int64_t own_above = 0;
#pragma omp for schedule(static)
      for (int64_t begin = 0; begin < n; begin += kTopBlock)
        own_above += collect(x + begin, std::min(kTopBlock, n - begin), between, own);
#pragma omp critical
      {
        above += own_above;
        found.insert(found.end(), own.begin(), own.end());
      }
    }
    return above;
  }

  // to[i] = x[i] where its key is at least `least`, else 0.
  static void keep(const Bits* from, Bits* to, int64_t size, Key least) {
    prox_each(from, to, size, [=](Bits bits, int64_t) { return key(bits) >= least ? bits : Bits(0); });
  }

  // Of what equals the k-th only the first `ties`.
  void write(Key kth, int64_t ties, int64_t equal) const {
    const int64_t chunks = (n + kTopChunk - 1) / kTopChunk;
    std::vector<int64_t> before(chunks + 1, 0);  // how many equals lie before each
    const auto size = [&](int64_t c) { return std::min(kTopChunk, n - c * kTopChunk); };
    const bool is_long = threads > 1 && chunks > 1;
    if (ties < equal) {
#pragma omp parallel for schedule(static) num_threads(threads) if (is_long)
      for (int64_t c = 0; c < chunks; ++c) {
        const Bits* from = x + c * kTopChunk;
        int64_t count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t i = 0; i < size(c); ++i) count += key(from[i]) == kth;
        before[c + 1] = count;
      }
      for (int64_t c = 0; c < chunks; ++c) before[c + 1] += before[c];
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (is_long)
    for (int64_t c = 0; c < chunks; ++c) {
      const Bits* from = x + c * kTopChunk;
      Bits* to = y + c * kTopChunk;
      if (before[c + 1] <= ties || before[c] >= ties) {
        keep(from, to, size(c), before[c + 1] <= ties ? kth : Key(kth + 1));
        continue;
      }
      for (int64_t i = 0, left = ties - before[c]; i < size(c); ++i) {
        const Key own = key(from[i]);
        const bool kept = own > kth || (own == kth && left > 0);
        left -= own == kth;
        to[i] = kept ? from[i] : Bits(0);
      }
    }
  }

  void run() const {
    if (k == 0) {
      std::memset(y, 0, sizeof(Bits) * n);
      return;
    }
    if (k >= n) {
      if (x != y) std::memcpy(y, x, sizeof(Bits) * n);
      return;
    }
    std::vector<Key> found;
    int64_t above = gather(guess(), found);
    if (above >= k || above + int64_t(found.size()) < k) above = gather({0, kInfinity}, found);
    const int64_t place = k - above - 1;
    std::nth_element(found.begin(), found.begin() + place, found.end(), std::greater<Key>());
    const Key kth = found[place];
    int64_t greater = above, equal = 0;
    for (const Key own : found) greater += own > kth, equal += own == kth;
    write(kth, k - greater, equal);
  }
};

template <typename S>
void top_k(const void* x, void* y, int64_t n, int64_t k, int num_threads) {
  using Bits = typename Top<S>::Bits;
  Top<S>{static_cast<const Bits*>(x), static_cast<Bits*>(y), n, k, num_threads}.run();
}

}  // namespace L0_ISA
}  // namespace l0
