// The way from a tensor of Python to an address: what a kernel assumes of memory is looked at here.
#pragma once
#include <Python.h>

#include <cstdint>

namespace l0 {

enum class Layout : long { any, contiguous, channels_last };

// What a tensor must be.
struct Asked {
  PyObject* dtype;  // None: any
  int64_t n;        // elements; negative: any
  Layout layout;
  PyObject* device;  // None: the CPU; null: any
};

// From now on tensors are read by `exchange_api`, DLPack's table of torch.Tensor; where that is None, or of
// another version, `otherwise` is asked, a function of Python with the arguments of address(). `plain`: the
// two types whose memory is their values; `samples`: a tensor of each dtype. False, with a Python error, where
// the arguments are not these.
bool know_tensors(PyObject* exchange_api, PyObject* plain, PyObject* samples, PyObject* otherwise);

// Address of the first element of `tensor`; 0 where it has none, is not what is asked for, or is lazily
// negated, without memory of its own, or longer than its storage. `otherwise` may leave a Python error.
uintptr_t address_of(PyObject* tensor, const Asked& asked);

}  // namespace l0
