// Instruction sets: code for each is in the binary, the processor decides at run time.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define L0_X86 1
#else
#define L0_X86 0
#endif

#define L0_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define L0_TARGET_BEGIN(isa) \
  L0_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define L0_TARGET_END _Pragma("clang attribute pop")
#else
#define L0_TARGET_BEGIN(isa) _Pragma("GCC push_options") L0_PRAGMA(GCC target(isa))
#define L0_TARGET_END _Pragma("GCC pop_options")
#endif

namespace l0 {

enum class Isa { kBase = 0, kAvx2 = 1, kAvx512 = 2 };

Isa isa();                       // the widest of the processor, or what set_isa asked for
bool set_isa(const char* name);  // "base", "avx2", "avx512" or "auto"; false where the processor lacks it
const char* isa_name();

}  // namespace l0
