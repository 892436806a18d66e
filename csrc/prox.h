// Proximal operators by element and by group: y = after(factor_g * before(x)), argmin_y of
// 1/2 |y - x|^2 / step + R(y). Arithmetic is T; norms of groups are double.
#pragma once
#include <cstdint>

#include "half.h"

namespace l0 {

// The two numbers of a penalty: (l0, l1) of l0 |y|_0 + l1 |y|_1, (l0, l2) of l0 |y|_0 + l2/2 y^2, (lam, a) of
// lam (a + 1)|y| / (a + |y|).
enum class Prox : int32_t { kNone = 0, kL0L1 = 1, kL0L2 = 2, kTransformedL1 = 3 };
struct ProxStage {
  Prox kind;
  double first, second;
  // Made of these once per call, as it takes as long as a short row: the |x| up to which the result is 0, and
  // of kTransformedL1 the cube root of lam a (a + 1).
  double threshold, third;
};
// lam |y_g|_2, or lam for each group that is not 0; kTop: at most lam elements that are not 0, without groups,
// stages and steps.
enum class ProxGroup : int32_t { kNone = 0, kLasso = 1, kL0 = 2, kTop = 3 };

template <typename T>
struct ProxParams {
  const void* x;  // (outer, groups, inner); without groups (1, 1, inner)
  void* y;        // likewise, and may be x
  DType type;     // of both
  const T* step;  // (outer, groups, inner), multiplies the weights of the elements; null: 1
  const double* group_step;  // (groups), those of the groups; null: 1
  int64_t outer, groups, inner;
  ProxStage before, after;
  ProxGroup group;
  double lam;
};

}  // namespace l0
