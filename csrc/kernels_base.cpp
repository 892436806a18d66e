// What every processor can do: 128-bit vectors (SSE2, NEON), lowered by the compiler where there are none.
#include "impl_common.h"
#define L0_ISA base
#define L0_VECTOR_BYTES 16
#if defined(__aarch64__)
#define L0_VECTOR_REGISTERS 32
#else
#define L0_VECTOR_REGISTERS 16
#endif
#include "gemm_impl.h"
#include "batch_norm_impl.h"
#include "conv_impl.h"
#include "taps_impl.h"
#include "prox_impl.h"
#include "prox_top_impl.h"
#include "budget_impl.h"
#include "elementwise_impl.h"
