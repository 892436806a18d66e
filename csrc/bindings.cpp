// Python's door to the CPU kernels: addresses, sizes and strides in, nothing of torch but for tensor.h. Python
// allocates and validates shapes; what only the data tells (counts, indices, NaN) is checked here. Element type:
// is_double chooses between fp32 and fp64.
#include "bindings.h"

#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "gates.h"
#include "isa.h"
#include "linear.h"
#include "masked_linear.h"
#include "mlp.h"
#include "pack.h"
#include "penalty.h"
#include "tensor.h"
#include "workspace.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

using namespace l0::python;

namespace {

using Gate = std::tuple<Address, Address, Address, int64_t, bool>;  // z, index, count, size, full_grad
using Matrix = std::tuple<Address, int64_t, int64_t>;               // data, row stride, column stride

template <typename T>
int64_t checked_open(const T* z, Address index_address, Address count_address, int64_t size) {
  const int64_t open = as<const int32_t>(count_address)[0];
  if (open < 0 || open > size)
    throw std::invalid_argument("gates.count[0] must be in [0, " + std::to_string(size) + "], got " +
                                std::to_string(open));
  const int32_t* index = as<const int32_t>(index_address);
  bool inside = true;
  for (int64_t i = 0; i < size; ++i) inside &= uint32_t(index[i]) < uint64_t(size);
  if (!inside)
    throw std::invalid_argument("gates.index must hold numbers in [0, " + std::to_string(size) + ")");
  bool ascending = true;  // vectors of neighbouring columns are moved at once: order is not a matter of style
  for (int64_t i = 1; i < open; ++i) ascending &= index[i - 1] < index[i];
  if (!ascending) throw std::invalid_argument("gates.index must list the open gates in ascending order");
  int32_t not_zero = 0;  // fewer than `open` is no error: float64 gates may vanish in float32
  for (int64_t i = 0; i < size; ++i) not_zero += z[i] != T(0);
  if (not_zero > open)
    throw std::invalid_argument("gates.count[0] must count the gates that are not 0, " +
                                std::to_string(not_zero) + ", got " + std::to_string(open));
  return open;
}

// Owns a GateView that may be absent. All gates open: no index, so the operand is read in its natural order.
template <typename T>
struct GateArg {
  l0::GateView<T> view;
  bool present = false;

  explicit GateArg(const std::optional<Gate>& gate) {
    if (!gate) return;
    const auto& [z, index, count, size, full_grad] = *gate;
    present = true;
    view = {as<const T>(z), nullptr, size, checked_open(as<const T>(z), index, count, size), full_grad};
    if (view.open < size) view.index = as<const int32_t>(index);
  }
  const l0::GateView<T>* get() const { return present ? &view : nullptr; }
};

std::vector<Gate> given(const std::vector<std::optional<Gate>>& gates) {
  std::vector<Gate> there;
  for (const auto& gate : gates)
    if (gate) there.push_back(*gate);
  return there;
}

using Dist = std::tuple<double, double, double>;  // beta, gamma, zeta
// Where gates are drawn from: seed, rank, constants, log_alpha of each.
using Draw = std::tuple<Address, uint32_t, Dist, std::vector<Address>>;

// Draws the gates, the position of each its stream; returns that of the first with a NaN in log_alpha, or -1.
// expected: (gates,), gets the expected number of open gates of each; null: not wanted.
template <typename T>
int draw_gates(const Draw& draw, const std::vector<Gate>& gates, int num_threads, T* expected = nullptr) {
  const auto& [seed, rank, dist, log_alpha] = draw;
  const auto& [beta, gamma, zeta] = dist;
  int nan_at = -1;
  for (size_t i = 0; i < gates.size(); ++i) {
    const auto& [z, index, count, size, full_grad] = gates[i];
    const T* values = as<const T>(log_alpha[i]);
    if (nan_at < 0 && l0::any_nan(values, size)) nan_at = int(i);
    l0::kernels<T>().sample(
        {values, 0, size, *as<const uint64_t>(seed), uint32_t(i), rank, T(beta), T(gamma), T(zeta), as<T>(z)},
        num_threads);
    l0::compact(as<const T>(z), size, as<int32_t>(index), as<int32_t>(count));
    if (expected) expected[i] = T(l0::expected_open(values, size, T(beta * std::log(-gamma / zeta))));
  }
  return nan_at;
}

int sample(bool is_double, const Draw& draw, const std::vector<Gate>& gates, Address expected,
           int num_threads) {
  int nan_at = -1;
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    nan_at = draw_gates<T>(draw, gates, num_threads, as<T>(expected));
  });
  return nan_at;
}

void compact(Address z, int64_t size, bool is_double, Address index, Address count) {
  dispatch(is_double, [&](auto zero) {
    l0::compact(as<const decltype(zero)>(z), size, as<int32_t>(index), as<int32_t>(count));
  });
}

void gate_grad(Address dz, Address z, Address dlog_alpha, int64_t n, bool is_double, const Dist& dist) {
  const auto& [beta, gamma, zeta] = dist;
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    l0::gate_grad(as<const T>(dz), as<const T>(z), as<T>(dlog_alpha), n, T(beta), T(gamma), T(zeta));
  });
}

// The gradient of z in place to that of log_alpha; neither need be there.
template <typename T>
void to_log_alpha(const std::optional<Dist>& dist, const l0::GateView<T>* gate, T* dz) {
  if (!dist || !gate || !dz) return;
  const auto& [beta, gamma, zeta] = *dist;
  l0::gate_grad(dz, gate->z, dz, gate->size, T(beta), T(gamma), T(zeta));
}

// Writes the penalty to `total` and its gradient, vector after vector, to `grad`; true if it is NaN, as with
// a NaN in log_alpha.
bool penalty(const std::vector<Address>& log_alpha, const std::vector<int64_t>& sizes,
             const std::vector<double>& weights, bool is_double, double shift, Address total, Address grad) {
  double sum = 0.0;
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    T* out = as<T>(grad);
    for (size_t i = 0; i < sizes.size(); ++i) {
      sum += l0::penalty(as<const T>(log_alpha[i]), sizes[i], weights[i], T(shift), out);
      out += sizes[i];
    }
    *as<T>(total) = T(sum);
  });
  return sum != sum;
}

using PenaltyGates = std::tuple<Address, int64_t, double>;  // log_alpha, size, weight
// theta, its rows, columns, groups and columns of an input; numbers of the output's and the input's gates or
// -1
using PenaltyTerm = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int, int>;

template <typename T>
l0::PenaltyParams<T> penalty_params(const std::vector<PenaltyGates>& gates,
                                    const std::vector<PenaltyTerm>& terms, double decay, double shift) {
  l0::PenaltyParams<T> p{{}, {}, decay, T(shift)};
  for (const auto& [log_alpha, size, weight] : gates)
    p.gates.push_back({as<const T>(log_alpha), size, weight});
  for (const auto& [theta, rows, cols, groups, run, out, in] : terms)
    p.terms.push_back({as<const T>(theta), rows, cols, groups, run, out, in});
  return p;
}

// As penalty, with the L2 terms of weights.
bool coupled_penalty(bool is_double, const std::vector<PenaltyGates>& gates,
                     const std::vector<PenaltyTerm>& terms, double decay, double shift, Address total,
                     Address grad, int num_threads) {
  double sum = 0.0;
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    sum = l0::coupled_penalty(penalty_params<T>(gates, terms, decay, shift), as<T>(grad), num_threads);
    *as<T>(total) = T(sum);
  });
  return sum != sum;
}

// The gradients of the weights, times what `factor` points to.
void coupled_penalty_grad(bool is_double, const std::vector<PenaltyGates>& gates,
                          const std::vector<PenaltyTerm>& terms, double decay, double shift, Address factor,
                          const std::vector<Address>& dtheta, int num_threads) {
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T*> out;
    for (Address address : dtheta) out.push_back(as<T>(address));
    l0::coupled_penalty_grad(penalty_params<T>(gates, terms, decay, shift), *as<const T>(factor), out,
                             num_threads);
  });
}

template <typename T>
l0::LinearParams<T> linear_params(int64_t M, int64_t in, int64_t out, const Matrix& x, const Matrix& weight,
                                  Address bias, const GateArg<T>& in_gate, const GateArg<T>& out_gate,
                                  bool scale_out) {
  return {M,
          in,
          out,
          as<const T>(std::get<0>(x)),
          std::get<1>(x),
          std::get<2>(x),
          as<const T>(std::get<0>(weight)),
          std::get<1>(weight),
          std::get<2>(weight),
          as<const T>(bias),
          in_gate.get(),
          out_gate.get(),
          scale_out};
}

// The gates there are; with a draw they are drawn first, and what draw_gates says of NaN is returned.
int linear_forward(bool is_double, int64_t M, int64_t in, int64_t out, const Matrix& x, const Matrix& weight,
                   Address bias, const std::optional<Gate>& in_gate, const std::optional<Gate>& out_gate,
                   bool scale_out, const std::optional<Draw>& draw, Address y, int num_threads) {
  int nan_at = -1;
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    if (draw) nan_at = draw_gates<T>(*draw, given({in_gate, out_gate}), num_threads);
    if (nan_at >= 0) return;
    const GateArg<T> gi(in_gate), go(out_gate);
    l0::linear_forward(linear_params<T>(M, in, out, x, weight, bias, gi, go, scale_out), as<T>(y),
                       num_threads);
  });
  return nan_at;
}

void linear_backward(bool is_double, int64_t M, int64_t in, int64_t out, const Matrix& x,
                     const Matrix& weight, Address bias, const std::optional<Gate>& in_gate,
                     const std::optional<Gate>& out_gate, bool scale_out, const Matrix& dy, Address dx,
                     Address dw, Address db, Address dz_in, Address dz_out, const std::optional<Dist>& dist,
                     int num_threads) {
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    const GateArg<T> gi(in_gate), go(out_gate);
    const auto& [dy_data, dy_stride_m, dy_stride_n] = dy;
    l0::linear_backward(linear_params<T>(M, in, out, x, weight, bias, gi, go, scale_out),
                        {as<const T>(dy_data), dy_stride_m, dy_stride_n, as<T>(dx), as<T>(dw), as<T>(db),
                         as<T>(dz_in), as<T>(dz_out)},
                        num_threads);
    to_log_alpha(dist, gi.get(), as<T>(dz_in));
    to_log_alpha(dist, go.get(), as<T>(dz_out));
  });
}

// in, out, weight, bias, gate on the input, h, pre, dw, db, dz: see MlpLayer.
using Layer = std::tuple<int64_t, int64_t, Matrix, Address, std::optional<Gate>, Address, Address, Address,
                         Address, Address>;

template <typename T, typename F>
void with_mlp(int64_t M, const Matrix& x, int activation, const std::vector<Layer>& layers, F f) {
  std::vector<GateArg<T>> gates;
  gates.reserve(layers.size());
  l0::MlpParams<T> p{
      M, as<const T>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), static_cast<l0::Activation>(activation),
      {}};
  p.layers.reserve(layers.size());
  for (const auto& [in, out, weight, bias, gate, h, pre, dw, db, dz] : layers) {
    gates.emplace_back(gate);
    p.layers.push_back({in, out, as<const T>(std::get<0>(weight)), std::get<1>(weight), std::get<2>(weight),
                        as<const T>(bias), gates.back().get(), as<T>(h), as<T>(pre), as<T>(dw), as<T>(db),
                        as<T>(dz)});
  }
  f(p);
}

int mlp_forward(bool is_double, int64_t M, const Matrix& x, int activation, const std::vector<Layer>& layers,
                const std::optional<Draw>& draw, Address y, int num_threads) {
  int nan_at = -1;
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    if (draw) {
      std::vector<std::optional<Gate>> gates;
      for (const Layer& layer : layers) gates.push_back(std::get<4>(layer));
      nan_at = draw_gates<T>(*draw, given(gates), num_threads);
    }
    if (nan_at >= 0) return;
    with_mlp<T>(M, x, activation, layers,
                [&](const l0::MlpParams<T>& p) { l0::mlp_forward(p, as<T>(y), num_threads); });
  });
  return nan_at;
}

void mlp_backward(bool is_double, int64_t M, const Matrix& x, int activation,
                  const std::vector<Layer>& layers, const Matrix& dy, Address dx,
                  const std::optional<Dist>& dist, int num_threads) {
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    with_mlp<T>(M, x, activation, layers, [&](const l0::MlpParams<T>& p) {
      l0::mlp_backward(p, as<const T>(std::get<0>(dy)), std::get<1>(dy), std::get<2>(dy), as<T>(dx),
                       num_threads);
      for (const l0::MlpLayer<T>& layer : p.layers) to_log_alpha(dist, layer.in_gate, layer.dz);
    });
  });
}

template <typename T>
l0::MaskedWeightParams<T> masked_params(Address weight, Address log_alpha, int64_t n, Address seed,
                                        double beta, double gamma, double zeta) {
  return {
      as<const T>(weight),
      {as<const T>(log_alpha), 0, n, *as<const uint64_t>(seed), 0, 0, T(beta), T(gamma), T(zeta), nullptr}};
}

bool masked_weight_forward(bool is_double, Address weight, Address log_alpha, int64_t n, Address seed,
                           double beta, double gamma, double zeta, Address wz, int num_threads) {
  bool nan = false;
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    nan = l0::any_nan(as<const T>(log_alpha), n);
    if (!nan)
      l0::masked_weight_forward(masked_params<T>(weight, log_alpha, n, seed, beta, gamma, zeta), as<T>(wz),
                                num_threads);
  });
  return nan;
}

void masked_weight_backward(bool is_double, Address weight, Address log_alpha, int64_t n, Address seed,
                            double beta, double gamma, double zeta, Address g, Address dw, Address dlog_alpha,
                            int num_threads) {
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    l0::masked_weight_backward(masked_params<T>(weight, log_alpha, n, seed, beta, gamma, zeta),
                               as<const T>(g), as<T>(dw), as<T>(dlog_alpha), num_threads);
  });
}

template <typename T>
l0::BlockLinearParams<T> block_params(int64_t M, int64_t in, int64_t out, int64_t b_out, int64_t b_in,
                                      const Matrix& x, const Matrix& weight, Address bias, Address z,
                                      bool full_grad) {
  return {M,
          in,
          out,
          b_out,
          b_in,
          as<const T>(std::get<0>(x)),
          std::get<1>(x),
          std::get<2>(x),
          as<const T>(std::get<0>(weight)),
          std::get<1>(weight),
          std::get<2>(weight),
          as<const T>(bias),
          as<const T>(z),
          full_grad};
}

void block_linear_forward(bool is_double, int64_t M, int64_t in, int64_t out, int64_t b_out, int64_t b_in,
                          const Matrix& x, const Matrix& weight, Address bias, Address z, Address y,
                          int num_threads) {
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    l0::block_linear_forward(block_params<T>(M, in, out, b_out, b_in, x, weight, bias, z, false), as<T>(y),
                             num_threads);
  });
}

void block_linear_backward(bool is_double, int64_t M, int64_t in, int64_t out, int64_t b_out, int64_t b_in,
                           const Matrix& x, const Matrix& weight, Address z, bool full_grad, const Matrix& dy,
                           Address dx, Address dw, Address db, Address dz, int num_threads) {
  dispatch(is_double, [&](auto zero) {
    using T = decltype(zero);
    const auto& [dy_data, dy_stride_m, dy_stride_n] = dy;
    l0::block_linear_backward(
        block_params<T>(M, in, out, b_out, b_in, x, weight, 0, z, full_grad),
        {as<const T>(dy_data), dy_stride_m, dy_stride_n, as<T>(dx), as<T>(dw), as<T>(db), as<T>(dz)},
        num_threads);
  });
}

// One side of pack and unpack: its gates (absent: all open), the size, the packed extent, whether z
// multiplies.
l0::PackAxis pack_axis(const std::optional<Gate>& gate, int64_t size, int64_t extent, bool scale,
                       bool z_is_double, int64_t run = 1, bool apart = false) {
  if (!gate) {
    if (extent < size)
      throw std::invalid_argument("extent must hold " + std::to_string(size) + " units, got " +
                                  std::to_string(extent));
    return {nullptr, nullptr, size, size, extent, false, run, apart};
  }
  const auto& [z, index, count, gate_size, full_grad] = *gate;
  const int64_t open = z_is_double ? checked_open(as<const double>(z), index, count, gate_size)
                                   : checked_open(as<const float>(z), index, count, gate_size);
  if (open > extent)
    throw std::invalid_argument("extent must hold the " + std::to_string(open) + " open gates, got " +
                                std::to_string(extent));
  return {open < size ? as<const int32_t>(index) : nullptr,
          scale ? as<const void>(z) : nullptr,
          size,
          open,
          extent,
          full_grad,
          run,
          apart};
}

// Columns that are runs of entries lie one behind the other.
void check_run(int64_t run, int64_t stride_col) {
  if (run < 1 || (run > 1 && stride_col != 1))
    throw std::invalid_argument("run must be positive, and 1 where columns do not follow each other, got " +
                                std::to_string(run));
}

void pack(const Matrix& full, int full_type, int64_t rows, int64_t cols, Address packed, int packed_type,
          int64_t packed_rows, int64_t packed_cols, const std::optional<Gate>& row_gate,
          const std::optional<Gate>& col_gate, bool scale_rows, bool scale_cols, bool z_is_double,
          int64_t run, bool apart, int num_threads) {
  py::gil_scoped_release nogil;
  const auto& [data, stride_row, stride_col] = full;
  check_run(run, stride_col);
  l0::pack({as<const void>(data), static_cast<l0::DType>(full_type), stride_row, stride_col, as<void>(packed),
            static_cast<l0::DType>(packed_type), packed_cols * run,
            pack_axis(row_gate, rows, packed_rows, scale_rows, z_is_double),
            pack_axis(col_gate, cols, packed_cols, scale_cols, z_is_double, run, apart), z_is_double},
           num_threads);
}

void unpack(const Matrix& packed, int packed_type, int64_t packed_rows, int64_t packed_cols, Address full,
            int full_type, int64_t rows, int64_t cols, const std::optional<Gate>& row_gate,
            const std::optional<Gate>& col_gate, bool scale_rows, bool scale_cols, bool z_is_double,
            const Matrix& theta, int theta_type, Address dz_row, Address dz_col, int64_t run,
            bool apart, int num_threads) {
  py::gil_scoped_release nogil;
  const auto& [data, stride_row, stride_col] = packed;
  if (stride_col != 1)
    throw std::invalid_argument("packed must have unit column stride, got " + std::to_string(stride_col));
  if ((dz_row && !(row_gate && scale_rows)) || (dz_col && !(col_gate && scale_cols)))
    throw std::invalid_argument("a gate gradient needs the side's gate, and the gate to scale");
  const auto& [theta_data, theta_row, theta_col] = theta;
  check_run(run, theta_data ? theta_col : 1);
  if ((dz_row || dz_col) && !theta_data && rows && cols)
    throw std::invalid_argument("a gate gradient needs theta, got none");
  l0::unpack(
      {as<const void>(data), static_cast<l0::DType>(packed_type), stride_row, as<void>(full),
       static_cast<l0::DType>(full_type), pack_axis(row_gate, rows, packed_rows, scale_rows, z_is_double),
       pack_axis(col_gate, cols, packed_cols, scale_cols, z_is_double, run, apart), z_is_double,
       as<const void>(theta_data), static_cast<l0::DType>(theta_type), theta_row, theta_col, as<void>(dz_row),
       as<void>(dz_col)},
      num_threads);
}

using Shape = std::array<int64_t, 14>;

l0::ConvShape conv_shape(const Shape& s) {
  const l0::ConvShape shape = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13]};
  const auto size = [](int64_t n, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    return (n + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
  };
  for (int64_t i = 0; i < 14; ++i) {
    const bool may_be_zero = i < 4 || i == 8 || i == 9 || i > 11;
    if (s[i] < (may_be_zero ? 0 : 1) || s[i] > (int64_t(1) << 40))
      throw std::invalid_argument("shape: number " + std::to_string(i) + " is " + std::to_string(s[i]));
  }
  if (shape.out_h != size(shape.H, shape.kernel_h, shape.stride_h, shape.pad_h, shape.dilation_h) ||
      shape.out_w != size(shape.W, shape.kernel_w, shape.stride_w, shape.pad_w, shape.dilation_w))
    throw std::invalid_argument("shape: the output is not that of the convolution");
  return shape;
}

void im2col(bool is_double, const Shape& shape, Address x, Address col, int num_threads) {
  py::gil_scoped_release nogil;
  const l0::ConvShape s = conv_shape(shape);
  if (is_double)
    l0::kernels<double>().im2col(s, as<const double>(x), as<double>(col), num_threads);
  else
    l0::kernels<float>().im2col(s, as<const float>(x), as<float>(col), num_threads);
}

void check_taps(const l0::ConvShape& s) {
  if (s.taps() > l0::kMostTaps)
    throw std::invalid_argument("shape: at most " + std::to_string(l0::kMostTaps) + " taps, got " +
                                std::to_string(s.taps()));
}

void col2im(bool is_double, const Shape& shape, Address col, Address x, int num_threads) {
  py::gil_scoped_release nogil;
  const l0::ConvShape s = conv_shape(shape);
  check_taps(s);
  if (is_double)
    l0::kernels<double>().col2im(s, as<const double>(col), as<double>(x), num_threads);
  else
    l0::kernels<float>().col2im(s, as<const float>(col), as<float>(x), num_threads);
}

template <typename T>
void depthwise_as(const l0::ConvShape& s, Address x, Address w, Address y, Address dy, Address dx,
                  Address dw_parts, int num_threads) {
  const l0::DepthwiseParams<T> p = {s,           as<const T>(x), as<const T>(w), as<T>(y),
                                    as<const T>(dy), as<T>(dx),      as<T>(dw_parts)};
  (dy ? l0::kernels<T>().depthwise_grad : l0::kernels<T>().depthwise)(p, num_threads);
}

template <typename T>
void conv_as(const l0::ConvShape& s, int64_t out, bool channels_last, Address x, Address w, Address bias,
             Address y, Address dy, Address dx, Address dw, Address db, int num_threads) {
  const l0::ConvParams<T> p = {s,
                               out,
                               channels_last,
                               channels_last,
                               as<const T>(x),
                               as<const T>(w),
                               as<const T>(bias),
                               as<T>(y),
                               as<const T>(dy),
                               as<T>(dx),
                               as<T>(dw),
                               as<T>(db)};
  (dy ? l0::kernels<T>().conv_grad : l0::kernels<T>().conv)(p, num_threads);
}

// Forward where there is no dy.
void conv(bool is_double, const Shape& shape, int64_t out, bool channels_last, Address x, Address w,
          Address bias, Address y, Address dy, Address dx, Address dw, Address db, int num_threads) {
  py::gil_scoped_release nogil;
  const l0::ConvShape s = conv_shape(shape);
  if (dx) check_taps(s);
  if (out < 0) throw std::invalid_argument("out: " + std::to_string(out));
  (is_double ? conv_as<double> : conv_as<float>)(s, out, channels_last, x, w, bias, y, dy, dx, dw, db,
                                                 num_threads);
}

// A convolution of the inputs that exist to the outputs that exist, by the weight of all. Channels are runs of
// the matrix that the weight is.
template <typename T>
struct OpenConv {
  const GateArg<T> rows, cols;
  bool scale;
  int64_t all_out, all_in, taps;

  int64_t out() const { return rows.present ? rows.view.open : all_out; }
  int64_t in() const { return cols.present ? cols.view.open : all_in; }
  const T* z() const { return scale && cols.present ? cols.view.z : nullptr; }

  static constexpr l0::DType kType = std::is_same_v<T, double> ? l0::DType::kDouble : l0::DType::kFloat;
  static constexpr bool kIsDouble = std::is_same_v<T, double>;

  l0::PackAxis row_axis() const { return {rows.view.index, nullptr, all_out, out(), out(), false}; }
  l0::PackAxis col_axis() const { return {cols.view.index, z(), all_in, in(), in(), false, taps}; }

  void pack(const T* w, T* packed, int num_threads) const {
    l0::pack({w, kType, all_in * taps, 1, packed, kType, in() * taps, row_axis(), col_axis(), kIsDouble},
             num_threads);
  }
  // dz = sum x dx / z of fractional gates: there are fewer activations than weights to read it off.
  void gate_grads(const T* x, const T* dx, int64_t pixels, T* dz) const {
    std::vector<int64_t> at;
    for (int64_t c = 0; c < all_in; ++c) dz[c] = T(0);
    const auto gate = [&](int64_t c) { return cols.view.index ? int64_t(cols.view.index[c]) : c; };
    for (int64_t c = 0; c < in(); ++c)
      if (z()[gate(c)] > T(0) && z()[gate(c)] < T(1)) at.push_back(c);
    std::vector<double> sums(at.size());
    for (int64_t i = 0; i < pixels; ++i, x += in(), dx += in())
      for (size_t j = 0; j < at.size(); ++j) sums[j] += double(x[at[j]]) * double(dx[at[j]]);
    for (size_t j = 0; j < at.size(); ++j) dz[gate(at[j])] = T(sums[j] / double(z()[gate(at[j])]));
  }
  void unpack(const T* packed, T* dw, const T* w, T* dz, int num_threads) const {
    l0::unpack({packed, kType, in() * taps, dw, kType, row_axis(), col_axis(), kIsDouble, w, kType,
                all_in * taps, 1, nullptr, dz},
               num_threads);
  }
};

template <typename T>
void open_conv_as(const l0::ConvShape& s, bool by_tap, bool planar, int64_t out, const OpenConv<T>& of,
                  const T* x, const T* w, T* packed, const T* bias, T* y, const T* dy, T* dx, T* dw, T* dz,
                  int num_threads) {
  if ((of.rows.present && of.rows.view.size != of.all_out) ||
      (of.cols.present && of.cols.view.size != of.all_in) || s.C != of.in())
    throw std::invalid_argument("gates: must be those of the weight's rows and columns");
  if (of.out() != out)
    throw std::invalid_argument("plan: must be of the " + std::to_string(of.out()) + " outputs that exist, got " +
                                std::to_string(out));
  if (by_tap && planar) throw std::invalid_argument("x: must lie channels last where taps are products");
  if (dz && !(of.z() && w)) throw std::invalid_argument("a gate gradient needs the gate, and the gate to scale");
  const bool backward = dx || dw || dz;
  const l0::Kernels<T>& kernels = l0::kernels<T>();
  if (by_tap) {
    if (dz && !dx) throw std::invalid_argument("a gate gradient by_tap needs dx");
    const l0::TapsParams<T> p = {s, out, of.all_out, of.all_in, of.rows.view.index, of.cols.view.index,
                                 of.z(), x, w, bias, y, dy, dx, dw};
    (backward ? kernels.taps_grad : kernels.taps)(p, num_threads);
    if (dz) of.gate_grads(x, dx, s.N * s.H * s.W, dz);
    return;
  }
  static thread_local l0::Workspace workspace;
  const int64_t size = of.out() * of.in() * of.taps;
  T* const scratch = static_cast<T*>(workspace.get(sizeof(T) * 2 * (size + 16)));
  T* const grad = dw || dz ? scratch + size + 16 : nullptr;
  if (!packed) packed = scratch;
  if (!backward || (dx && packed == scratch)) of.pack(w, packed, num_threads);
  const l0::ConvParams<T> p = {s, out, !planar, true, x, packed, bias, y, dy, dx, grad, nullptr};
  (backward ? kernels.conv_grad : kernels.conv)(p, num_threads);
  if (grad) of.unpack(grad, dw, w, dz, num_threads);
}

// Backward where dx, dw or dz is wanted. by_tap: see csrc/taps.h, else as conv. planar: x and dx lie (N, C, H,
// W). out: outputs that exist. scale: z of the columns multiplies them. packed (out, inputs that exist, taps):
// what exists of the weight, which forward writes and backward reads; 0: nobody keeps it.
void open_conv(bool is_double, const Shape& shape, bool by_tap, bool planar, int64_t out,
               const std::optional<Gate>& rows, const std::optional<Gate>& cols, bool scale, int64_t all_out,
               int64_t all_in, Address x, Address w, Address packed, Address bias, Address y, Address dy,
               Address dx, Address dw, Address dz, int num_threads) {
  py::gil_scoped_release nogil;
  const l0::ConvShape s = conv_shape(shape);
  check_taps(s);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (all_out < 0 || all_in < 0 || double(s.N) * s.H * s.W > kMost || double(s.N) * s.out_h * s.out_w > kMost)
    throw std::invalid_argument("sizes: " + std::to_string(all_out) + ", " + std::to_string(all_in) +
                                ", or too many pixels");
  const auto run = [&](auto type) {
    using T = decltype(type);
    const OpenConv<T> of{GateArg<T>(rows), GateArg<T>(cols), scale, all_out, all_in, s.taps()};
    open_conv_as<T>(s, by_tap, planar, out, of, as<const T>(x), as<const T>(w), as<T>(packed),
                    as<const T>(bias), as<T>(y), as<const T>(dy), as<T>(dx), as<T>(dw), as<T>(dz), num_threads);
  };
  if (is_double)
    run(double{});
  else
    run(float{});
}

// Forward where there is no dy.
void depthwise(bool is_double, const Shape& shape, Address x, Address w, Address y, Address dy, Address dx,
               Address dw_parts, int num_threads) {
  py::gil_scoped_release nogil;
  const l0::ConvShape s = conv_shape(shape);
  check_taps(s);
  (is_double ? depthwise_as<double> : depthwise_as<float>)(s, x, w, y, dy, dx, dw_parts, num_threads);
}

// Of gate vectors (index, size, open, exist), what of each exists, the open entries and the first closed ones:
// places gets for each which exist, ascending (exist), where the open ones are among those (open), and which
// are open (open); orders gets (padded) which exist, then the others.
void present(const std::vector<std::tuple<Address, int64_t, int64_t, int64_t, int64_t>>& vectors,
             Address places, Address orders) {
  int64_t* to = as<int64_t>(places);
  int32_t* order = as<int32_t>(orders);
  for (const auto& [address, size, open, exist, padded] : vectors) {
    const int32_t* index = as<const int32_t>(address);
    if (open < 0 || open > exist || exist > size || size > padded)
      throw std::invalid_argument("counts must be in [0, " + std::to_string(size) + "], got " +
                                  std::to_string(open) + " and " + std::to_string(exist));
    for (int64_t i = 0; i < size; ++i)
      if (uint32_t(index[i]) >= uint64_t(size))
        throw std::invalid_argument("gates.index must hold numbers in [0, " + std::to_string(size) + ")");
    int64_t *exists = to, *within = to + exist, *opened = within + open;
    int64_t i = 0, j = open;
    for (int64_t k = 0; k < exist; ++k) {
      const bool is_open = i < open && (j == exist || index[i] < index[j]);
      if (is_open) within[i] = k, opened[i] = index[i];
      exists[k] = order[k] = index[is_open ? i++ : j++];
    }
    for (int64_t k = exist; k < size; ++k) order[k] = index[k];
    for (int64_t k = size; k < padded; ++k) order[k] = 0;
    to = opened + open;
    order += padded;
  }
}

// The same of entries by the numbers of their gates: three rows of places, each as long as there are entries.
std::pair<int64_t, int64_t> present_among(int64_t gates, Address is_open, Address exists, int64_t size,
                                          Address labels, Address places, Address order, int64_t padded) {
  const uint8_t *open = as<const uint8_t>(is_open), *exist = as<const uint8_t>(exists);
  const int64_t* label = as<const int64_t>(labels);
  for (int64_t i = 0; i < size; ++i)
    if (uint64_t(label[i]) >= uint64_t(gates))
      throw std::invalid_argument("labels must be in [0, " + std::to_string(gates) + "), got " +
                                  std::to_string(label[i]));
  if (size > padded || size > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("order must hold " + std::to_string(size) + " entries");
  int64_t *there = as<int64_t>(places), *within = there + size, *opened = within + size;
  int32_t* to = as<int32_t>(order);
  int64_t n = 0, n_open = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (!exist[label[i]]) continue;
    if (open[label[i]]) within[n_open] = n, opened[n_open++] = i;
    there[n] = i, to[n++] = int32_t(i);
  }
  int64_t at = n;
  for (int64_t i = 0; i < size; ++i)
    if (!exist[label[i]]) to[at++] = int32_t(i);
  std::fill(to + at, to + padded, 0);
  return {n, n_open};
}

// Numbers of a vector of `size` entries.
void check_index(const char* name, Address index, int64_t n, int64_t size) {
  bool inside = true;
  for (int64_t i = 0; index && i < n; ++i) inside &= uint64_t(as<const int64_t>(index)[i]) < uint64_t(size);
  if (!inside)
    throw std::invalid_argument(std::string(name) + " must hold numbers in [0, " + std::to_string(size) + ")");
}

template <typename T>
void batch_norm_as(int64_t rows, int64_t channels, int64_t size, Address index, bool training, Address x,
                   Address weight, Address bias, Address mean, Address rstd, double eps, Address y,
                   Address running_mean, Address running_var, double momentum, Address updated,
                   int64_t n_updated, Address dy, Address dx, Address dweight, Address dbias,
                   int num_threads) {
  const l0::BatchNormParams<T> p = {rows,
                                    channels,
                                    size,
                                    as<const int64_t>(index),
                                    training,
                                    as<const T>(x),
                                    as<const T>(weight),
                                    as<const T>(bias),
                                    as<T>(mean),
                                    as<T>(rstd),
                                    eps,
                                    as<T>(y),
                                    as<T>(running_mean),
                                    as<T>(running_var),
                                    momentum,
                                    as<const int64_t>(updated),
                                    n_updated,
                                    as<const T>(dy),
                                    as<T>(dx),
                                    as<T>(dweight),
                                    as<T>(dbias)};
  (dy ? l0::kernels<T>().batch_norm_grad : l0::kernels<T>().batch_norm)(p, num_threads);
}

// Forward where there is no dy.
void batch_norm(bool is_double, int64_t rows, int64_t channels, int64_t size, Address index, bool training,
                Address x, Address weight, Address bias, Address mean, Address rstd, double eps, Address y,
                Address running_mean, Address running_var, double momentum, Address updated,
                int64_t n_updated, Address dy, Address dx, Address dweight, Address dbias, int num_threads) {
  py::gil_scoped_release nogil;
  if (rows < 1 || channels < 1 || size < channels || n_updated < 0 || n_updated > channels)
    throw std::invalid_argument("sizes: rows, channels and all channels are " + std::to_string(rows) + ", " +
                                std::to_string(channels) + " and " + std::to_string(size));
  check_index("index", index, channels, size);
  check_index("updated", updated, n_updated, channels);
  (is_double ? batch_norm_as<double> : batch_norm_as<float>)(
      rows, channels, size, index, training, x, weight, bias, mean, rstd, eps, y, running_mean, running_var,
      momentum, updated, n_updated, dy, dx, dweight, dbias, num_threads);
}

using ProxStage = std::tuple<int, double, double>;
// x, y, element type, step, group_step, (outer, groups, inner), before, group, lam, after: see ProxParams.
using ProxTensor = std::tuple<Address, Address, int, Address, Address, std::array<int64_t, 3>, ProxStage, int,
                              double, ProxStage>;

l0::ProxStage prox_stage(const ProxStage& stage) {
  const auto& [kind, first, second] = stage;
  if (kind < 0 || kind > 3) throw std::invalid_argument("kind: expected 0..3, got " + std::to_string(kind));
  return {static_cast<l0::Prox>(kind), first, second, 0.0, 0.0};
}

template <typename T>
void prox_as(const ProxTensor& tensor, int num_threads) {
  const auto& [x, y, type, step, group_step, sizes, before, group, lam, after] = tensor;
  if (type < 0 || type > 3 || group < 0 || group > 3)
    throw std::invalid_argument("type and group: expected 0..3, got " + std::to_string(type) + " and " +
                                std::to_string(group));
  const bool is_top = group == static_cast<int>(l0::ProxGroup::kTop);
  const bool is_alone = sizes[0] == 1 && sizes[1] == 1 && !step && !std::get<0>(before) && !std::get<0>(after);
  if (is_top && !(is_alone && lam >= 0 && lam <= double(sizes[2])))
    throw std::invalid_argument("the k largest are at most all elements, without groups, stages and steps");
  l0::kernels<T>().prox(
      {as<const void>(x), as<void>(y), static_cast<l0::DType>(type), as<const T>(step),
       as<const double>(group_step), sizes[0], sizes[1], sizes[2], prox_stage(before), prox_stage(after),
       static_cast<l0::ProxGroup>(group), lam},
      num_threads);
}

// The tensors one after the other.
void prox(const std::vector<ProxTensor>& tensors, int num_threads) {
  py::gil_scoped_release nogil;
  for (const ProxTensor& tensor : tensors)
    (std::get<2>(tensor) == 1 ? prox_as<double> : prox_as<float>)(tensor, num_threads);
}

// Asks for 2 MB pages under an allocation that nobody has written yet; the allocation stays whose it is.
// Where the system has none, nothing happens.
void advise_huge_pages(Address address, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(as<void>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

// glibc gives freed memory back to the system, which clears it before the next step, in amounts that follow the
// largest block that was ever freed, up to 32 MB: it is told of one, which nobody has touched. Other
// allocators do not mind.
void keep_freed_memory() {
  void* volatile block = std::malloc((32 << 20) - 8192);
  std::free(block);
}

void know(py::handle exchange_api, py::handle plain, py::handle samples, py::handle otherwise) {
  if (!l0::know_tensors(exchange_api.ptr(), plain.ptr(), samples.ptr(), otherwise.ptr()))
    throw py::error_already_set();
}

// (tensor, dtype, n, layout, device): asked ten times a call, and pybind's way in takes as long as the answer.
PyObject* address(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 4 && n != 5) {
    PyErr_Format(PyExc_TypeError, "address takes 4 or 5 arguments, got %zd", n);
    return nullptr;
  }
  const l0::Asked asked{args[1], PyLong_AsLongLong(args[2]), l0::Layout(PyLong_AsLong(args[3])),
                        n == 5 ? args[4] : nullptr};
  if (PyErr_Occurred()) return nullptr;
  const uintptr_t found = l0::address_of(args[0], asked);
  return PyErr_Occurred() ? nullptr : PyLong_FromUnsignedLongLong(found);
}

PyMethodDef with_tensors[] = {
    {"address", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(address)), METH_FASTCALL,
     "address(arg0: object, arg1: object, arg2: int, arg3: int, arg4: object) -> int"},
    {nullptr, nullptr, 0, nullptr}};

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown compiler";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "l0kernels' native CPU kernels: raw addresses, no checks of shape or type; use the public functions "
      "instead";
  m.attr("compiler") = compiler();
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  if (PyModule_AddFunctions(m.ptr(), with_tensors) != 0) throw py::error_already_set();
  m.def("know_tensors", &know);
  m.def("isa", &l0::isa_name);
  m.def("set_isa", &l0::set_isa);
  m.def("sample", &sample);
  m.def("compact", &compact);
  m.def("gate_grad", &gate_grad);
  m.def("penalty", &penalty);
  m.def("coupled_penalty", &coupled_penalty);
  m.def("coupled_penalty_grad", &coupled_penalty_grad);
  m.def("linear_forward", &linear_forward);
  m.def("linear_backward", &linear_backward);
  m.def("mlp_forward", &mlp_forward);
  m.def("mlp_backward", &mlp_backward);
  m.def("masked_weight_forward", &masked_weight_forward);
  m.def("masked_weight_backward", &masked_weight_backward);
  m.def("block_linear_forward", &block_linear_forward);
  m.def("block_linear_backward", &block_linear_backward);
  m.def("pack", &pack);
  m.def("unpack", &unpack);
  m.def("im2col", &im2col);
  m.def("col2im", &col2im);
  m.def("conv", &conv);
  m.def("open_conv", &open_conv);
  m.def("present", &present);
  m.def("present_among", &present_among);
  m.def("depthwise", &depthwise);
  m.def("batch_norm", &batch_norm);
  m.def("prox", &prox);
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("keep_freed_memory", &keep_freed_memory);
  bind_budget(m);
}
