// l0kernels._CUDA: kernels on the GPU. Addresses, sizes, strides and a stream come from Python, which
// allocates; torch is not linked. What is wrong with a call is found before it: only CUDA's own errors are
// raised here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "gates.h"
#include "runtime.h"

#ifdef L0_EMULATED
#include "cuda_emulator.h"
#endif

namespace py = pybind11;
namespace cuda = l0::cuda;

namespace {

using Address = uintptr_t;
using Where = std::tuple<int, Address>;           // device, cudaStream_t
using Dist = std::tuple<double, double, double>;  // beta, gamma, zeta

template <typename T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

cuda::Stream to_stream(const Where& where) { return {std::get<0>(where), as<void>(std::get<1>(where))}; }

double shift(const Dist& d) { return std::get<0>(d) * std::log(-std::get<1>(d) / std::get<2>(d)); }

int64_t padded(int64_t n) { return (n + 127) / 128 * 128; }

void sample(const std::vector<Address>& log_alpha, const std::vector<int64_t>& sizes, bool is_double,
            Address seed, uint32_t rank, const Dist& dist, float tau, Address z, Address index, Address count,
            Address expected, const Where& where) {
  cuda::SampleParams p;
  p.seed = as<const int64_t>(seed);
  p.rank = rank;
  std::tie(p.beta, p.gamma, p.zeta) = dist;
  p.shift = shift(dist);
  p.tau = tau;
  p.z = as<void>(z);
  p.index = as<int32_t>(index);
  int64_t z_at = 0, index_at = 0;
  for (size_t begin = 0; begin < sizes.size(); begin += cuda::kSampleVectors) {
    const int vectors = int(std::min<size_t>(cuda::kSampleVectors, sizes.size() - begin));
    int64_t largest = 0;
    for (int i = 0; i < vectors; ++i) {
      const int64_t size = sizes[begin + i];
      p.vector[i] = {as<const void>(log_alpha[begin + i]), z_at, index_at, int32_t(size),
                     uint32_t(begin + i)};
      z_at += size;
      index_at += padded(size);
      largest = std::max(largest, size);
    }
    p.count = as<int32_t>(count) + 2 * begin;
    p.expected = expected ? as<void>(expected + begin * (is_double ? 8 : 4)) : nullptr;
    (is_double ? cuda::sample<double> : cuda::sample<float>)(p, vectors, int32_t(largest), to_stream(where));
  }
}

void gate_grad(Address dz, Address z, Address dlog_alpha, int64_t n, bool is_double, const Dist& dist,
               const Where& where) {
  const auto [beta, gamma, zeta] = dist;
  if (is_double)
    cuda::gate_grad(as<const double>(dz), as<const double>(z), as<double>(dlog_alpha), n, beta, gamma, zeta,
                    to_stream(where));
  else
    cuda::gate_grad(as<const float>(dz), as<const float>(z), as<float>(dlog_alpha), n, beta, gamma, zeta,
                    to_stream(where));
}

}  // namespace

#ifndef L0_MODULE
#define L0_MODULE _CUDA
#endif

PYBIND11_MODULE(L0_MODULE, m) {
  m.doc() =
      "l0kernels' CUDA kernels: raw addresses, no checks of shape or type; use the public functions instead";
  m.attr("architectures") = L0_ARCHITECTURES;
  m.def("device_error", &cuda::device_error);
  m.def("sample", &sample);
  m.def("gate_grad", &gate_grad);
#ifdef L0_EMULATED
  m.def("emulator_seed", &l0::emulator::set_seed);
  m.def("emulator_launches", &l0::emulator::launches);
#endif
}
