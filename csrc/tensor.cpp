#include "tensor.h"

#include <vector>

namespace l0 {
namespace {

// DLPack 1: what its C exchange API hands on, https://dmlc.github.io/dlpack/latest/c_api.html
constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;

struct DType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct View {  // DLTensor
  void* data;
  struct {
    int32_t type, number;
  } device;
  int32_t ndim;
  DType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* earlier;
  void *allocate, *owning_from_python, *owning_to_python;
  int (*from_python)(void* tensor, View* out);
  void* current_stream;
};

struct KnownDType {
  PyObject* dtype;
  DType is;
};

const ExchangeApi* api = nullptr;
PyObject* ask_otherwise = nullptr;
PyTypeObject *plain_type = nullptr, *parameter_type = nullptr;
std::vector<KnownDType> dtypes;
PyObject *is_neg, *untyped_storage, *nbytes, *storage_offset, *device_name;

bool view_of(PyObject* tensor, View& view) {
  if (api->from_python(tensor, &view) == 0) return true;
  PyErr_Clear();  // a transform's, sparse, on meta: it has no memory
  return false;
}

bool is_of(const View& view, PyObject* dtype) {
  if (dtype == Py_None) return true;
  for (const KnownDType& known : dtypes)
    if (known.dtype == dtype) return known.is.code == view.dtype.code && known.is.bits == view.dtype.bits;
  return false;
}

// Whether the elements follow one another, in the order of the dimensions or with the channels last.
bool lies(const View& view, Layout layout) {
  if (layout == Layout::any) return true;
  const bool channels_last = layout == Layout::channels_last;
  if (channels_last && view.ndim != 4) return false;
  constexpr int kChannelsLast[] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (int i = 0; i < view.ndim; ++i) {
    const int dim = channels_last ? kChannelsLast[i] : view.ndim - 1 - i;
    if (view.shape[dim] == 1) continue;
    if (view.strides[dim] != expected) return false;
    expected *= view.shape[dim];
  }
  return true;
}

bool is_on(PyObject* tensor, const View& view, PyObject* device) {
  if (device == nullptr) return true;
  if (device == Py_None) return view.device.type == kCpu;
  PyObject* is = PyObject_GetAttr(tensor, device_name);
  const int same = is == nullptr ? -1 : PyObject_RichCompareBool(is, device, Py_EQ);
  Py_XDECREF(is);
  if (same < 0) PyErr_Clear();
  return same == 1;
}

// The number that a method of `object` returns; negative where it raises.
int64_t number(PyObject* object, PyObject* method) {
  PyObject* found = PyObject_CallMethodNoArgs(object, method);
  const int64_t value = found == nullptr ? -1 : PyLong_AsLongLong(found);
  Py_XDECREF(found);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return -1;
  }
  return value;
}

bool is_negated(PyObject* tensor) {
  PyObject* found = PyObject_CallMethodNoArgs(tensor, is_neg);
  if (found == nullptr) PyErr_Clear();
  const bool negated = found != Py_False;
  Py_XDECREF(found);
  return negated;
}

int64_t bytes_held(PyObject* tensor) {
  PyObject* storage = PyObject_CallMethodNoArgs(tensor, untyped_storage);
  if (storage == nullptr) {
    PyErr_Clear();
    return -1;
  }
  const int64_t held = number(storage, nbytes);
  Py_DECREF(storage);
  return held;
}

uintptr_t asked_otherwise(PyObject* tensor, const Asked& asked) {
  if (ask_otherwise == nullptr) return 0;
  const long long n = asked.n;
  const long layout = static_cast<long>(asked.layout);
  PyObject* found = asked.device == nullptr
                        ? PyObject_CallFunction(ask_otherwise, "OOLl", tensor, asked.dtype, n, layout)
                        : PyObject_CallFunction(ask_otherwise, "OOLlO", tensor, asked.dtype, n, layout,
                                                asked.device);
  const uintptr_t address = found == nullptr ? 0 : PyLong_AsUnsignedLongLong(found);
  Py_XDECREF(found);
  return address;
}

}  // namespace

bool know_tensors(PyObject* exchange_api, PyObject* plain, PyObject* samples, PyObject* otherwise) {
  PyObject *tensor, *parameter;
  if (!PyArg_ParseTuple(plain, "OO", &tensor, &parameter)) return false;
  plain_type = reinterpret_cast<PyTypeObject*>(tensor);
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  Py_INCREF(otherwise);
  ask_otherwise = otherwise;
  if (exchange_api == Py_None) return true;
  const auto* found =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(exchange_api, "dlpack_exchange_api"));
  if (found == nullptr) return false;
  if (found->major != kMajor || found->from_python == nullptr) return true;
  is_neg = PyUnicode_InternFromString("is_neg");
  untyped_storage = PyUnicode_InternFromString("untyped_storage");
  nbytes = PyUnicode_InternFromString("nbytes");
  storage_offset = PyUnicode_InternFromString("storage_offset");
  device_name = PyUnicode_InternFromString("device");
  PyObject* each = PySequence_Fast(samples, "samples must be a sequence");
  bool fine = each != nullptr;
  for (Py_ssize_t i = 0; fine && i < PySequence_Fast_GET_SIZE(each); ++i) {
    PyObject* sample = PySequence_Fast_GET_ITEM(each, i);
    View view;
    PyObject* dtype = PyObject_GetAttrString(sample, "dtype");  // torch's live as long as the process
    fine = dtype != nullptr && found->from_python(sample, &view) == 0;
    if (fine) dtypes.push_back({dtype, view.dtype});
  }
  Py_XDECREF(each);
  if (fine) api = found;
  return fine;
}

uintptr_t address_of(PyObject* tensor, const Asked& asked) {
  if (api == nullptr) return asked_otherwise(tensor, asked);
  if (Py_TYPE(tensor) != plain_type && Py_TYPE(tensor) != parameter_type) return 0;
  View view;
  if (!view_of(tensor, view) || view.data == nullptr) return 0;
  int64_t n = 1, end = 1;  // one past the last element, from the first
  for (int i = 0; i < view.ndim; ++i) {
    n *= view.shape[i];
    end += (view.shape[i] - 1) * view.strides[i];
  }
  if (n == 0 || (asked.n >= 0 && n != asked.n)) return 0;
  if (!is_of(view, asked.dtype) || !lies(view, asked.layout) || !is_on(tensor, view, asked.device)) return 0;
  if (is_negated(tensor)) return 0;
  const int64_t held = bytes_held(tensor), begin = number(tensor, storage_offset);
  const int64_t size = (view.dtype.bits * view.dtype.lanes + 7) / 8;
  if (begin < 0 || held < (begin + end) * size) return 0;
  return reinterpret_cast<uintptr_t>(view.data) + view.byte_offset;
}

}  // namespace l0
