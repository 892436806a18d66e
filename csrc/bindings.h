// What the files of bindings share.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace l0::python {

namespace py = pybind11;

using Address = uintptr_t;

template <typename T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename F>
void dispatch(bool is_double, F f) {
  py::gil_scoped_release nogil;
  if (is_double)
    f(double{});
  else
    f(float{});
}

void bind_budget(py::module_& m);

}  // namespace l0::python
