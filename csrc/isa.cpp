#include "isa.h"

#include <cstring>

#include "kernels.h"

namespace l0 {
namespace {

Isa widest() {
#if L0_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBase;
}

Isa& current() {
  static Isa value = widest();
  return value;
}

constexpr const char* kNames[] = {"base", "avx2", "avx512"};

}  // namespace

Isa isa() { return current(); }

const char* isa_name() { return kNames[static_cast<int>(current())]; }

bool set_isa(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    current() = widest();
    return true;
  }
  for (int i = 0; i <= static_cast<int>(widest()); ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      current() = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

#if L0_X86
namespace avx512 {
template <typename T>
Kernels<T> kernels();
}
namespace avx2 {
template <typename T>
Kernels<T> kernels();
}
#endif
namespace base {
template <typename T>
Kernels<T> kernels();
}

// A table is made by code of its own instruction set: none is made that the processor may lack.
template <typename T>
const Kernels<T>& kernels() {
  switch (current()) {
#if L0_X86
    case Isa::kAvx512: {
      static const Kernels<T> table = avx512::kernels<T>();
      return table;
    }
    case Isa::kAvx2: {
      static const Kernels<T> table = avx2::kernels<T>();
      return table;
    }
#endif
    default: {
      static const Kernels<T> table = base::kernels<T>();
      return table;
    }
  }
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace l0
