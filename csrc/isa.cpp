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

template <typename T>
const Kernels<T>& kernels() {
  static const Kernels<T> tables[] = {
      base::kernels<T>(),
#if L0_X86
      avx2::kernels<T>(),
      avx512::kernels<T>(),
#endif
  };
  return tables[static_cast<int>(current())];
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace l0
