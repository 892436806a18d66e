// Batch normalisation of rows (pixels, examples) whose columns are those channels that exist.
#pragma once
#include <cstdint>

namespace l0 {

// y = (x - mean) * rstd * weight + bias. Vectors of all channels have `size` entries, those of the channels
// that exist `channels`.
template <typename T>
struct BatchNormParams {
  int64_t rows, channels, size;
  const int64_t* index;    // (channels): which of all channels these are; null: all
  bool training;           // statistics of these rows; else the running ones
  const T* x;              // (rows, channels)
  const T* weight;         // (size), null: 1
  const T* bias;           // (size), null: 0
  T* mean;                 // (channels), written by the forward
  T* rstd;                 // likewise: 1 / sqrt(variance + eps)
  double eps;
  // Forward. In training `updated` lists which of these channels move their running statistics; null: the first.
  T* y;                    // (rows, channels)
  T* running_mean;         // (size), null where there are none
  T* running_var;
  double momentum;
  const int64_t* updated;
  int64_t n_updated;
  // Backward.
  const T* dy;             // (rows, channels); null: this is the forward
  T* dx;                   // null: not wanted
  T* dweight;              // (size), zeros where no channel exists; null: not wanted
  T* dbias;

  int64_t at(int64_t c) const { return index ? index[c] : c; }
};

}  // namespace l0
