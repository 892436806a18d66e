#include "runtime.h"

#include "runtime.cuh"

namespace l0::cuda {

std::string device_error() {
#if defined(__CUDACC__)
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  }
  if (devices == 0) return "no CUDA device";
#endif
  return "";
}

}  // namespace l0::cuda
