#include "budget.h"

namespace l0 {

CostFactor::CostFactor(std::vector<int64_t> places) : index(std::move(places)) {
  const int64_t n = int64_t(index.size());
  if (n == 0) return;
  int64_t run = 1;
  while (run < n && index[run] == index[0]) ++run;
  const int64_t by = run < n ? index[run] - index[0] : 1;
  for (int64_t i = 0; i < n; ++i)
    if (index[i] != index[0] + i / run * by) return;
  first = index[0], stride = by, repeat = run;
}

}  // namespace l0
