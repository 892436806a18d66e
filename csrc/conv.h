// Convolutions of channels-last images (N, H, W, C) as products of matrices: im2col makes rows of what each
// output position reads, col2im adds rows up where they came from. Depthwise ones are computed as they are.
#pragma once
#include <cstdint>

namespace l0 {

// The output has the height (H + 2 pad_h - dilation_h (kernel_h - 1) - 1) / stride_h + 1, its width likewise.
struct ConvShape {
  int64_t N, H, W, C;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t out_h, out_w;

  int64_t taps() const { return kernel_h * kernel_w; }
};

// A window of taps of which only those inside the image count.
constexpr int64_t kMostTaps = 64;

// y[c] = sum over channel c's kernel; w (taps, C). Backward: dx and dw_parts (N, taps, C), whose sum over the
// images is left to the caller: one order, however many threads.
template <typename T>
struct DepthwiseParams {
  ConvShape shape;
  const T* x;
  const T* w;
  T* y;           // forward
  const T* dy;    // backward
  T* dx;          // null: not wanted
  T* dw_parts;    // null: not wanted
};

}  // namespace l0
