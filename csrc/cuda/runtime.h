// The state of CUDA on this machine.
#pragma once
#include <string>

namespace l0::cuda {

std::string device_error();  // why no kernel can run here; empty if one can

}  // namespace l0::cuda
