// Convolutions of channels-last images (N, H, W, C) as products of matrices: im2col makes rows of what each
// output position reads, col2im adds rows up where they came from. Depthwise ones are computed as they are.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace l0 {

// The output has the height (H + 2 pad_h - dilation_h (kernel_h - 1) - 1) / stride_h + 1, its width likewise.
struct ConvShape {
  int64_t N, H, W, C;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t out_h, out_w;

  int64_t taps() const { return kernel_h * kernel_w; }
};

// Of col2im and depthwise convolutions.
constexpr int64_t kMostTaps = 64;

// Along one dimension of an image, what each position meets: the entries from begin(i) to end(i), each a tap
// and a position on the other side.
class Reach {
 public:
  int64_t begin(int64_t i) const { return first_[i]; }
  int64_t end(int64_t i) const { return first_[i + 1]; }
  int64_t tap(int64_t entry) const { return tap_[entry]; }
  int64_t at(int64_t entry) const { return at_[entry]; }

  // How many positions from i on meet, through the same taps, the next one each.
  int64_t run(int64_t i) const { return run_[i]; }

  // What each of n_out output positions reads.
  static Reach inputs(int64_t n_out, int64_t n, int64_t kernel, int64_t stride, int64_t pad,
                      int64_t dilation) {
    return Reach(n_out, kernel, [=](int64_t i, int64_t k) {
      const int64_t at = i * stride - pad + k * dilation;
      return at < n ? at : -1;
    });
  }

  // Who reads each of n positions.
  static Reach outputs(int64_t n_out, int64_t n, int64_t kernel, int64_t stride, int64_t pad,
                       int64_t dilation) {
    return Reach(n, kernel, [=](int64_t i, int64_t k) {
      const int64_t at = i + pad - k * dilation;
      return at >= 0 && at % stride == 0 && at / stride < n_out ? at / stride : -1;
    });
  }

 private:
  template <typename F>
  Reach(int64_t n, int64_t kernel, F position) {
    first_.reserve(n + 1);
    tap_.reserve(n * kernel);
    at_.reserve(n * kernel);
    for (int64_t i = 0; i < n; ++i) {
      first_.push_back(tap_.size());
      for (int64_t k = 0; k < kernel; ++k) {
        const int64_t found = position(i, k);
        if (found < 0) continue;
        tap_.push_back(k);
        at_.push_back(found);
      }
    }
    first_.push_back(tap_.size());
    run_.assign(n, 1);
    for (int64_t i = n - 2; i >= 0; --i)
      if (goes_on(i)) run_[i] = run_[i + 1] + 1;
  }

  bool goes_on(int64_t i) const {
    const int64_t n = end(i) - begin(i);
    if (end(i + 1) - begin(i + 1) != n) return false;
    for (int64_t j = 0; j < n; ++j)
      if (tap(begin(i + 1) + j) != tap(begin(i) + j) || at(begin(i + 1) + j) != at(begin(i) + j) + 1)
        return false;
    return true;
  }

  std::vector<int64_t> first_, tap_, at_, run_;
};

// Along both dimensions; the other side is `width` wide.
struct Window {
  Reach rows, cols;
  int64_t kernel_w, width;

  static Window inputs(const ConvShape& s) {
    return {Reach::inputs(s.out_h, s.H, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h),
            Reach::inputs(s.out_w, s.W, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w), s.kernel_w, s.W};
  }

  static Window outputs(const ConvShape& s) {
    return {Reach::outputs(s.out_h, s.H, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h),
            Reach::outputs(s.out_w, s.W, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w), s.kernel_w, s.out_w};
  }
};

// The output positions [begin, end) along one dimension that read through tap k.
struct Span {
  int64_t begin, end;

  Span(int64_t n_out, int64_t n, int64_t k, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t before = pad - k * dilation, last = n - 1 + before;
    begin = before > 0 ? (before + stride - 1) / stride : 0;
    end = last < 0 ? 0 : std::min(n_out, last / stride + 1);
  }
};

// y[c] = sum over channel c's kernel; w (taps, C). Backward: dx and dw_parts (N, taps, C), whose sum over the
// images is left to the caller: one order, however many threads.
template <typename T>
struct DepthwiseParams {
  ConvShape shape;
  const T* x;
  const T* w;
  T* y;         // forward
  const T* dy;  // backward
  T* dx;        // null: not wanted
  T* dw_parts;  // null: not wanted
};

// A convolution of all channels. Images lie channels last (N, H, W, C), or as planes (N, C, H, W), x with dx
// and y with dy; w (out, C, kernel_h, kernel_w). Backward where there is dy: dx, dw and db, each null where it
// is not wanted.
template <typename T>
struct ConvParams {
  ConvShape shape;
  int64_t out;
  bool x_channels_last, y_channels_last;
  const T* x;
  const T* w;
  const T* bias;  // (out), null: none
  T* y;           // forward
  const T* dy;    // backward, like y
  T* dx;
  T* dw;
  T* db;  // comes with dw
};

// Images as planes with zeros around, of which columns that are a multiple of the stride apart lie side by
// side: whatever the stride, neighbouring outputs read neighbours.
struct Planes {
  int64_t rows, phase, row, plane, image;  // sizes; `phase` of the columns that lie side by side

  explicit Planes(const ConvShape& s)
      : rows(s.H + 2 * s.pad_h),
        phase((s.W + 2 * s.pad_w + s.stride_w - 1) / s.stride_w),
        row(phase * s.stride_w),
        plane(rows * row),
        image(plane * s.C),
        stride_(s.stride_w) {}

  int64_t column(int64_t w) const { return w % stride_ * phase + w / stride_; }

 private:
  int64_t stride_;
};

// Images with zeros around, channels last.
struct Pixels {
  int64_t rows, row, image;

  explicit Pixels(const ConvShape& s)
      : rows(s.H + 2 * s.pad_h), row((s.W + 2 * s.pad_w) * s.C), image(rows * row) {}
};

// Columns of a panel of patches: runs of `length` neighbours, the i-th from at()[i] on. What column and row
// of the panel are read from is the sum of both their offsets.
class Runs {
 public:
  const int64_t* at() const { return at_.data(); }
  int64_t size() const { return int64_t(at_.size()); }
  int64_t length() const { return length_; }

  // Of the output positions of n images, from planes.
  static Runs positions(const ConvShape& s, int64_t n) {
    const Planes planes(s);
    Runs runs(s.out_w);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t h = 0; h < s.out_h; ++h)
        runs.at_.push_back(i * planes.image + h * s.stride_h * planes.row);
    return runs;
  }

  // Of the entries of a kernel in the order (kernel_h, kernel_w, C), from pixels.
  static Runs entries(const ConvShape& s) {
    const Pixels pixels(s);
    const bool side_by_side = s.dilation_w == 1;
    Runs runs(side_by_side ? s.kernel_w * s.C : s.C);
    for (int64_t u = 0; u < s.kernel_h; ++u)
      for (int64_t v = 0; v < (side_by_side ? 1 : s.kernel_w); ++v)
        runs.at_.push_back(u * s.dilation_h * pixels.row + v * s.dilation_w * s.C);
    return runs;
  }

  // Offsets one by one: of the entries in the order (C, kernel_h, kernel_w), from planes.
  static Runs planar_entries(const ConvShape& s) {
    const Planes planes(s);
    Runs runs(1);
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t u = 0; u < s.kernel_h; ++u)
        for (int64_t v = 0; v < s.kernel_w; ++v)
          runs.at_.push_back(c * planes.plane + u * s.dilation_h * planes.row +
                             planes.column(v * s.dilation_w));
    return runs;
  }

  // Of the output positions of n images, from pixels.
  static Runs pixel_positions(const ConvShape& s, int64_t n) {
    const Pixels pixels(s);
    Runs runs(1);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t h = 0; h < s.out_h; ++h)
        for (int64_t w = 0; w < s.out_w; ++w)
          runs.at_.push_back(i * pixels.image + h * s.stride_h * pixels.row + w * s.stride_w * s.C);
    return runs;
  }

 private:
  explicit Runs(int64_t length) : length_(length) {}
  std::vector<int64_t> at_;
  int64_t length_;
};

}  // namespace l0
