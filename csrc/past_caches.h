// Writing large results that nobody reads soon.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa.h"
#if L0_X86
#include <emmintrin.h>
#endif

namespace l0 {

// Bytes of a matrix from which on it is written past the caches. It would be gone from there before anybody
// reads it, and to write a line by way of the caches is to read it first.
constexpr int64_t kPastCaches = 1 << 20;

// Between what is written so and a barrier, behind which other threads see it.
inline void settle_past_caches() {
#if L0_X86
  _mm_sfence();
#endif
}

#if L0_X86
// part(i): the 16 bytes from i on; rest(begin, end) writes those of lines that are not whole.
template <typename Part, typename Rest>
inline void stream_lines(char* to, size_t bytes, Part part, Rest rest) {
  constexpr size_t kLine = 64, kPart = sizeof(__m128i);
  if (bytes < 2 * kLine) return rest(0, bytes);
  const size_t head = -reinterpret_cast<uintptr_t>(to) % kLine, end = head + (bytes - head) / kLine * kLine;
  rest(0, head);
  for (size_t line = head; line < end; line += kLine)
    for (size_t i = line; i < line + kLine; i += kPart)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), part(i));
  rest(end, bytes);
}
#endif

inline void copy_past_caches(void* to, const void* from, size_t bytes) {
#if L0_X86
  char* const target = static_cast<char*>(to);
  const char* const source = static_cast<const char*>(from);
  stream_lines(
      target, bytes, [=](size_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)); },
      [=](size_t begin, size_t end) { std::memcpy(target + begin, source + begin, end - begin); });
#else
  std::memcpy(to, from, bytes);
#endif
}

// Of a matrix of so many bytes, some.
inline void write_zeros(void* to, size_t bytes, int64_t of_matrix) {
#if L0_X86
  char* const target = static_cast<char*>(to);
  if (of_matrix >= kPastCaches)
    return stream_lines(
        target, bytes, [](size_t) { return _mm_setzero_si128(); },
        [=](size_t begin, size_t end) { std::memset(target + begin, 0, end - begin); });
#endif
  (void)of_matrix;
  std::memset(to, 0, bytes);
}

}  // namespace l0
