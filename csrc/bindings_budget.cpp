// Python's door to a budget's step: what does not change from step to step is told once.
#include "bindings.h"

#include <array>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "budget.h"
#include "kernels.h"
#include "tensor.h"

using namespace l0::python;

namespace {

using CostRun = std::tuple<int64_t, int64_t, double>;               // first, count, weight
using CostAtoms = std::tuple<bool, int64_t, std::vector<int64_t>>;  // is_any, factors, index
using CostPair = std::tuple<int64_t, int64_t, double>;              // two sums, coefficient
// gates, constant, atoms, linear, offsets, runs, pairs: see CostTerms
using Cost = std::tuple<int64_t, double, std::vector<CostAtoms>, std::vector<CostRun>, std::vector<int64_t>,
                        std::vector<CostRun>, std::vector<CostPair>>;
using BudgetGates = std::tuple<int64_t, double, double, double>;  // size, shift, low, scale
// number, cost, gates, offset, unit, keep
using BudgetKind = std::tuple<int64_t, Cost, std::vector<BudgetGates>, double, double, double>;
using State = std::array<Address, 5>;  // moment, first, price, step, skipped

void check_budget(bool fits) {
  if (!fits) throw std::invalid_argument("the terms of a cost must lie within its values");
}

std::vector<l0::CostRun> cost_runs(const std::vector<CostRun>& given, int64_t width) {
  std::vector<l0::CostRun> runs;
  for (const auto& [first, count, weight] : given) {
    check_budget(first >= 0 && count >= 0 && first <= width - count);
    runs.push_back({first, count, weight});
  }
  return runs;
}

l0::CostTerms cost_terms(const Cost& given) {
  const auto& [n, constant, atoms, linear, offsets, runs, pairs] = given;
  l0::CostTerms cost{n, constant, {}, {}, offsets, {}, {}};
  check_budget(n >= 0 && !offsets.empty() && offsets.front() == 0 && offsets.back() == int64_t(runs.size()));
  for (size_t k = 1; k < offsets.size(); ++k) check_budget(offsets[k - 1] <= offsets[k]);
  for (const auto& [is_any, factors, index] : atoms) {
    check_budget(factors > 0 && index.size() % factors == 0);
    for (int64_t at : index) check_budget(at >= 0 && at < cost.width());  // of the values before these
    l0::CostAtoms made{is_any, int64_t(index.size()) / factors, {}};
    for (int64_t j = 0; j < factors; ++j) {
      std::vector<int64_t> places;
      for (int64_t i = 0; i < made.size; ++i) places.push_back(index[i * factors + j]);
      made.factors.emplace_back(std::move(places));
    }
    cost.atoms.push_back(std::move(made));
  }
  cost.linear = cost_runs(linear, cost.width());
  cost.runs = cost_runs(runs, cost.width());
  for (const auto& [first, second, coefficient] : pairs) {
    check_budget(first >= 0 && first < cost.sums() && second >= 0 && second < cost.sums());
    cost.pairs.push_back({first, second, coefficient});
  }
  return cost;
}

// A budget's kinds of gates and its state, kept from step to step.
struct Budget {
  using Given = std::vector<BudgetKind>;

  std::vector<l0::BudgetKind> kinds;
  std::vector<int64_t> numbers;
  size_t gates = 0;
  bool is_double;
  py::object dtype;
  State state;
  double ramp_steps, limit;

  Budget(const Given& given, bool is_double_, py::object dtype_, const State& state_,
         double ramp_steps_, double limit_)
      : is_double(is_double_),
        dtype(std::move(dtype_)),
        state(state_),
        ramp_steps(ramp_steps_),
        limit(limit_) {
    for (const auto& [number, cost, of_gates, offset, unit, keep] : given) {
      l0::BudgetKind kind{cost_terms(cost), {}, offset, unit, keep};
      int64_t n = 0;
      for (const auto& [size, shift, low, scale] : of_gates) {
        check_budget(size >= 0);
        kind.gates.push_back({size, shift, low, scale});
        n += size;
      }
      check_budget(n == kind.cost.n && number >= 0);
      gates += of_gates.size();
      kinds.push_back(std::move(kind));
      numbers.push_back(number);
    }
  }

  // Gates that do not require a gradient stay. False, and nothing written, where a log_alpha or a gradient is
  // not what its gates need.
  bool step(const py::list& log_alpha, const py::list& grad) const {
    check_budget(log_alpha.size() == gates && grad.size() == gates);
    std::vector<Address> places, of_grads;
    std::vector<bool> moves;
    places.reserve(gates), of_grads.reserve(gates), moves.reserve(gates);
    if (!take(log_alpha, false, places) || !take(grad, true, of_grads)) return false;
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    for (const py::handle tensor : log_alpha) {
      const py::object found = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), requires_grad));
      if (!found) throw py::error_already_set();
      moves.push_back(found.ptr() == Py_True);
    }
    dispatch(is_double, [&](auto zero) {
      using T = decltype(zero);
      const auto [moment, first, price, count, skipped] = state;
      l0::BudgetStep<T> s{{}, {}, std::move(moves), as<T>(moment), as<const double>(first), as<double>(price),
                          as<int64_t>(count), as<int64_t>(skipped), ramp_steps, limit};
      s.log_alpha.reserve(gates), s.grad.reserve(gates);
      for (size_t g = 0; g < gates; ++g) {
        s.log_alpha.push_back(as<T>(places[g]));
        s.grad.push_back(as<const T>(of_grads[g]));
      }
      l0::kernels<T>().budget_step(kinds, numbers, s);
    });
    return true;
  }

 private:
  // Addresses of one tensor a gate vector, 0 for no gates and for None; false where one is something else.
  bool take(const py::list& tensors, bool may_be_none, std::vector<Address>& found) const {
    for (const l0::BudgetKind& kind : kinds)
      for (const l0::BudgetGates& of : kind.gates) {
        PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), Py_ssize_t(found.size()));
        const l0::Asked asked{dtype.ptr(), of.size, l0::Layout::contiguous, Py_None};
        const bool is_none = may_be_none && tensor == Py_None;
        found.push_back(is_none ? 0 : l0::address_of(tensor, asked));
        if (PyErr_Occurred()) throw py::error_already_set();
        if (found.back() == 0 && !is_none && of.size > 0) return false;
      }
    return true;
  }
};

}  // namespace

void l0::python::bind_budget(py::module_& m) {
  py::class_<Budget>(m, "Budget")
      .def(py::init<const Budget::Given&, bool, py::object, const State&, double, double>())
      .def("step", &Budget::step);
}
