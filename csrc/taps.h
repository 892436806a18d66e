// Convolutions of small images (N, H, W, C) as a product for each tap of the kernel, of the pixels that it
// reads within the image: where others multiply the zeros around. The weight is read, and its gradient
// written, where they are, in blocks of channels that stay in the cache: no packed weight is ever whole.
#pragma once
#include <cstdint>
#include <vector>

#include "conv.h"

namespace l0 {

template <typename T>
struct TapsParams {
  ConvShape shape;          // C: the inputs that exist
  int64_t out;              // outputs that exist
  int64_t all_out, all_in;  // of weight (all_out, all_in, taps)
  const int32_t* outs;      // (all_out) those that exist ascending, then the others; null: all exist
  const int32_t* ins;       // (all_in) likewise
  const T* z;               // (all_in) multiplies the inputs; null: 1
  const T* x;               // (N * H * W, C)
  const T* w;
  const T* bias;  // (out), null: none
  T* y;           // forward: (N * out_h * out_w, out)
  const T* dy;    // backward, like y
  T* dx;          // null: not wanted
  T* dw;          // like w, null: not wanted
};

// Which pixels each tap reads, and which outputs they reach: tap t has the rows [begin(t), end(t)) of both.
class TapRows {
 public:
  explicit TapRows(const ConvShape& s) {
    begin_.push_back(0);
    for (int64_t u = 0; u < s.kernel_h; ++u)
      for (int64_t v = 0; v < s.kernel_w; ++v) {
        const Span down(s.out_h, s.H, u, s.stride_h, s.pad_h, s.dilation_h);
        const Span across(s.out_w, s.W, v, s.stride_w, s.pad_w, s.dilation_w);
        for (int64_t n = 0; n < s.N; ++n)
          for (int64_t i = down.begin; i < down.end; ++i)
            for (int64_t j = across.begin; j < across.end; ++j) {
              const int64_t h = i * s.stride_h - s.pad_h + u * s.dilation_h;
              const int64_t w = j * s.stride_w - s.pad_w + v * s.dilation_w;
              read_.push_back(int32_t((n * s.H + h) * s.W + w));
              made_.push_back(int32_t((n * s.out_h + i) * s.out_w + j));
            }
        begin_.push_back(int64_t(read_.size()));
      }
  }

  int64_t begin(int64_t tap) const { return begin_[tap]; }
  int64_t end(int64_t tap) const { return begin_[tap + 1]; }
  int64_t size() const { return int64_t(read_.size()); }
  const int32_t* read() const { return read_.data(); }
  const int32_t* made() const { return made_.data(); }

 private:
  std::vector<int64_t> begin_;
  std::vector<int32_t> read_, made_;
};

}  // namespace l0
