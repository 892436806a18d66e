// Where a launch goes. Addresses are the device's; nothing here needs CUDA's headers.
#pragma once
#include <cstdint>

namespace l0::cuda {

struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

}  // namespace l0::cuda
