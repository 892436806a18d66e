#include "isa.h"
#if L0_X86
#include <immintrin.h>

#include "impl_common.h"
L0_TARGET_BEGIN("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define L0_ISA avx512
#define L0_VECTOR_BYTES 64
#define L0_VECTOR_REGISTERS 32
#include "gemm_impl.h"
#include "batch_norm_impl.h"
#include "conv_impl.h"
#include "taps_impl.h"
#include "prox_impl.h"
#include "prox_top_impl.h"
#include "budget_impl.h"
#include "elementwise_impl.h"
L0_TARGET_END
#endif
