// What the *_impl.h need, included before an instruction set is chosen so that no inline function of a standard header is compiled for it.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "activation.h"
#include "hard_concrete.h"
#include "kernels.h"
#include "workspace.h"
