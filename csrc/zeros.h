// Zeros of large results.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa.h"
#if L0_X86
#include <emmintrin.h>
#endif

namespace l0 {

// Bytes of a matrix from which on its zeros go past the caches. They would be gone from there before anybody
// reads them, and to write a line by way of the caches is to read it first.
constexpr int64_t kPastCaches = 4 << 20;

inline void write_zeros(void* to, size_t bytes, int64_t of_matrix) {
#if L0_X86
  constexpr size_t kLine = 64;
  if (of_matrix >= kPastCaches && bytes >= 2 * kLine) {
    char* at = static_cast<char*>(to);
    const size_t head = -reinterpret_cast<uintptr_t>(at) % kLine;
    std::memset(at, 0, head);
    char* const end = at + bytes;
    const __m128i zero = _mm_setzero_si128();
    for (at += head; at + kLine <= end; at += kLine)
      for (size_t i = 0; i < kLine; i += sizeof zero)
        _mm_stream_si128(reinterpret_cast<__m128i*>(at + i), zero);
    std::memset(at, 0, size_t(end - at));
    _mm_sfence();  // other threads see them behind the next barrier
    return;
  }
#endif
  (void)of_matrix;
  std::memset(to, 0, bytes);
}

}  // namespace l0
