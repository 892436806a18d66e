// What the *_impl.h need, included before an instruction set is chosen so that no inline function of a
// standard header is compiled for it.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "activation.h"
#include "half.h"
#include "hard_concrete.h"
#include "kernels.h"
#include "workspace.h"
#include "past_caches.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace l0 {

#ifdef _OPENMP
inline int team_size() { return omp_get_num_threads(); }
inline int thread_number() { return omp_get_thread_num(); }
#else
inline int team_size() { return 1; }
inline int thread_number() { return 0; }
#endif

}  // namespace l0
