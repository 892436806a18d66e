// l0kernels._CUDA: kernels on the GPU. Addresses, sizes, strides and a stream come from Python, which
// allocates; torch is not linked. What is wrong with a call is found before it: only CUDA's own errors are
// raised here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "gates.h"
#include "pack.h"
#include "penalty.h"
#include "runtime.h"
#include "small.h"

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

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

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
  const int64_t bytes = is_double ? 8 : 4;
  for (size_t begin = 0; begin < sizes.size(); begin += cuda::kSampleVectors) {
    const int vectors = int(std::min<size_t>(cuda::kSampleVectors, sizes.size() - begin));
    int64_t largest = 0;
    for (int i = 0; i < vectors; ++i) {
      const int64_t size = sizes[begin + i];
      p.vector[i] = {as<const void>(log_alpha[begin + i]), as<void>(z), as<int32_t>(index), int32_t(size),
                     uint32_t(begin + i)};
      z += size * bytes;
      index += padded(size) * sizeof(int32_t);
      largest = std::max(largest, size);
    }
    p.count = as<int32_t>(count) + 2 * begin;
    p.expected = expected ? as<void>(expected + begin * bytes) : nullptr;
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

using Matrix = std::tuple<Address, int64_t, int64_t>;  // data, row stride, column stride
// size, (z, index, count) or None, whether z multiplies, a gradient for every open gate
using Gate = std::tuple<Address, Address, Address>;
using Side = std::tuple<int64_t, std::optional<Gate>, bool, bool>;
using Grid = std::tuple<int32_t, int32_t, int32_t, int32_t>;

cuda::PackSide to_side(const Side& side) {
  const auto& [size, gate, scale, full] = side;
  if (!gate) return {size, nullptr, nullptr, nullptr, false, false};
  const auto& [z, index, count] = *gate;
  return {size, as<const void>(z), as<const int32_t>(index), as<const int32_t>(count), scale, full};
}

cuda::PackGrid to_grid(const Grid& grid) {
  return {std::get<0>(grid), std::get<1>(grid), std::get<2>(grid), std::get<3>(grid)};
}

void pack(const Matrix& full, int full_type, Address packed, int64_t packed_stride, int64_t packed_cols,
          int packed_type, const Side& rows, const Side& cols, bool skip_plain, const Grid& grid,
          const Where& where) {
  const auto& [data, stride_row, stride_col] = full;
  cuda::pack(full_type, packed_type,
             {as<const void>(data), stride_row, stride_col, as<void>(packed), packed_stride, packed_cols,
              to_side(rows), to_side(cols), skip_plain, to_grid(grid)},
             to_stream(where));
}

void unpack(Address packed, int64_t packed_stride, int packed_type, Address full, int64_t full_stride,
            int full_type, const Side& rows, const Side& cols, bool skip_plain, const Matrix& theta,
            Address dz_row, Address dz_col, Address row_sums, Address col_sums, const Grid& grid,
            const Where& where) {
  const auto& [data, stride_row, stride_col] = theta;
  cuda::unpack(packed_type, full_type,
               {as<const void>(packed), packed_stride, as<void>(full), full_stride, to_side(rows),
                to_side(cols), skip_plain, as<const void>(data), stride_row, stride_col, as<void>(dz_row),
                as<void>(dz_col), as<void>(row_sums), as<void>(col_sums), to_grid(grid)},
               to_stream(where));
}

// log_alpha, gradient, size, weight
using PenaltyVector = std::tuple<Address, Address, int64_t, double>;
// theta, its row stride, type, rows, columns, decay; run and number of the columns' gates; log_alpha of rows
// and columns; gradients of theta, of both; scratch for sums of rows and of columns
using PenaltyMatrix = std::tuple<std::tuple<Address, int64_t, int, int64_t, int64_t, double>,
                                 std::tuple<int64_t, int64_t>, std::tuple<Address, Address>,
                                 std::tuple<Address, Address, Address>, std::tuple<Address, Address>>;

int64_t blocks_of(const PenaltyVector& v) { return ceil_div(std::get<2>(v), cuda::kPenaltyChunk); }

std::pair<int64_t, int64_t> tiles_of(const PenaltyMatrix& m) {
  const auto& [theta, stride, type, rows, cols, decay] = std::get<0>(m);
  const int bytes = type == 0 ? 4 : type == 1 ? 8 : 2;
  return {ceil_div(rows, cuda::kPenaltyRows), ceil_div(cols, cuda::kPenaltyColumnBytes / bytes)};
}

// Per launch: the vectors and matrices it takes, and its blocks.
struct PenaltyPart {
  size_t vectors_end, matrices_end;
  int64_t blocks, tickets;
};
PenaltyPart penalty_part(const std::vector<PenaltyVector>& vectors,
                         const std::vector<PenaltyMatrix>& matrices, size_t v, size_t m) {
  PenaltyPart part{std::min(v + cuda::kPenaltyVectors, vectors.size()),
                   std::min(m + cuda::kPenaltyMatrices, matrices.size()), 0, 1};
  for (; v < part.vectors_end; ++v) part.blocks += blocks_of(vectors[v]);
  for (; m < part.matrices_end; ++m) {
    const auto [row_tiles, col_tiles] = tiles_of(matrices[m]);
    part.blocks += row_tiles * col_tiles;
    part.tickets += row_tiles + col_tiles + 1;
  }
  return part;
}

// Blocks and tickets of the largest launch: what penalty needs as scratch.
std::pair<int64_t, int64_t> penalty_scratch(const std::vector<PenaltyVector>& vectors,
                                            const std::vector<PenaltyMatrix>& matrices) {
  int64_t blocks = 0, tickets = 0;
  for (size_t v = 0, m = 0; v < vectors.size() || m < matrices.size();) {
    const PenaltyPart part = penalty_part(vectors, matrices, v, m);
    blocks = std::max(blocks, part.blocks);
    tickets = std::max(tickets, part.tickets);
    v = part.vectors_end;
    m = part.matrices_end;
  }
  return {blocks, tickets};
}

void penalty(const std::vector<PenaltyVector>& vectors, const std::vector<PenaltyMatrix>& matrices,
             bool is_double, const Dist& dist, Address block_sums, Address tickets, Address total,
             Address factor, const Where& where) {
  cuda::PenaltyParams p;
  p.shift = shift(dist);
  p.block_sums = as<void>(block_sums);
  p.ticket = as<unsigned>(tickets);
  p.total = as<void>(total);
  p.factor = as<const void>(factor);
  p.accumulate = false;
  for (size_t v = 0, m = 0; v < vectors.size() || m < matrices.size();) {
    const PenaltyPart part = penalty_part(vectors, matrices, v, m);
    int32_t block = 0;
    p.vectors = int32_t(part.vectors_end - v);
    for (int i = 0; i < p.vectors; ++i, ++v) {
      const auto& [log_alpha, grad, size, weight] = vectors[v];
      p.vector[i] = {as<const void>(log_alpha), as<void>(grad), size, weight, block};
      block += int32_t(blocks_of(vectors[v]));
    }
    p.vector_blocks = block;
    p.matrices = int32_t(part.matrices_end - m);
    unsigned* ticket = p.ticket + 1;
    for (int i = 0; i < p.matrices; ++i, ++m) {
      const auto& [source, gates, log_alphas, grads, sums] = matrices[m];
      const auto& [theta, stride, type, rows, cols, decay] = source;
      const auto [row_tiles, col_tiles] = tiles_of(matrices[m]);
      p.matrix[i] = {as<const void>(theta),
                     as<void>(std::get<0>(grads)),
                     stride,
                     cols,
                     rows,
                     cols,
                     std::get<0>(gates),
                     std::get<1>(gates),
                     as<const void>(std::get<0>(log_alphas)),
                     as<const void>(std::get<1>(log_alphas)),
                     as<void>(std::get<1>(grads)),
                     as<void>(std::get<2>(grads)),
                     as<void>(std::get<0>(sums)),
                     as<void>(std::get<1>(sums)),
                     ticket,
                     decay,
                     type,
                     block};
      ticket += row_tiles + col_tiles + 1;
      block += int32_t(row_tiles * col_tiles);
    }
    p.blocks = block;
    if (block == 0) continue;
    (is_double ? cuda::penalty<double> : cuda::penalty<float>)(p, to_stream(where));
    p.accumulate = true;
  }
}

// size, z, index, count, log_alpha (0: the gate is given), stream
using SmallGate = std::tuple<int32_t, Address, Address, Address, Address, uint32_t>;
using SmallDraw = std::tuple<Address, uint32_t, Dist, float>;  // seed, rank, constants, tau

cuda::SmallGate to_small(const std::optional<SmallGate>& gate) {
  if (!gate) return {};
  const auto& [size, z, index, count, log_alpha, stream] = *gate;
  return {size, stream, as<const void>(log_alpha), as<void>(z), as<int32_t>(index), as<int32_t>(count)};
}

cuda::SmallParams small_params(const std::optional<SmallDraw>& draw,
                               const std::optional<Dist>& to_log_alpha) {
  cuda::SmallParams p{};
  if (draw) {
    p.seed = as<const int64_t>(std::get<0>(*draw));
    p.rank = std::get<1>(*draw);
    std::tie(p.beta, p.gamma, p.zeta) = std::get<2>(*draw);
    p.tau = std::get<3>(*draw);
  }
  if (to_log_alpha) {
    p.to_log_alpha = true;
    std::tie(p.beta, p.gamma, p.zeta) = *to_log_alpha;
  }
  return p;
}

// Both tiles and tickets are counted per product.
void append(cuda::SmallParams& p, cuda::SmallProduct q) {
  q.first_block = p.blocks;
  p.blocks += cuda::small_tiles(q.M) * cuda::small_tiles(q.N);
  p.product[p.products++] = q;
}

void run(int type, const cuda::SmallParams& p, const Where& where) {
  if (p.products) cuda::small_products(type, p, to_stream(where));
}

// Operands by rows and by columns: a matrix as (row, k), or transposed as (column, k).
cuda::SmallOperand rows_of(const Matrix& m, bool gather_row, bool gather_k, bool scale_k = false,
                           int act = 0) {
  return {as<const void>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), gather_row, gather_k, scale_k, act};
}
cuda::SmallOperand columns_of(const Matrix& m, bool gather_column, bool gather_k, int act = 0) {
  return {
      as<const void>(std::get<0>(m)), std::get<2>(m), std::get<1>(m), gather_column, gather_k, false, act};
}

void small_linear_forward(int type, int32_t M, int32_t in, int32_t out, const Matrix& x, const Matrix& weight,
                          Address bias, const std::optional<SmallGate>& in_gate,
                          const std::optional<SmallGate>& out_gate, bool scale_out, Address y,
                          const std::optional<SmallDraw>& draw, const Where& where) {
  cuda::SmallParams p = small_params(draw, std::nullopt);
  cuda::SmallProduct q{};
  q.M = M, q.N = out, q.K = in;
  q.n = to_small(out_gate), q.k = to_small(in_gate);
  q.a = rows_of(x, false, true, true);
  q.b = rows_of(weight, true, true);
  q.c = as<void>(y), q.c_stride = out;
  q.scatter_m = q.scatter_n = true;
  q.scale_n = scale_out;
  q.bias = as<const void>(bias);
  append(p, q);
  run(type, p, where);
}

// Gradients and scratch: null where not wanted.
void small_linear_backward(int type, int32_t M, int32_t in, int32_t out, const Matrix& x,
                           const Matrix& weight, Address bias, const std::optional<SmallGate>& in_gate,
                           const std::optional<SmallGate>& out_gate, bool scale_out, bool full_in,
                           bool full_out, const Matrix& dy, Address dx, Address dw, Address db, Address dz_in,
                           Address dz_out, Address in_sums, Address out_sums, Address db_sums,
                           Address tickets, const std::optional<Dist>& to_log_alpha, const Where& where) {
  cuda::SmallParams p = small_params(std::nullopt, to_log_alpha);
  if (dx) {
    cuda::SmallProduct q{};
    q.M = M, q.N = in, q.K = out;
    q.n = to_small(in_gate), q.k = to_small(out_gate);
    q.a = rows_of(dy, false, true, scale_out);
    q.b = columns_of(weight, true, true);
    q.c = as<void>(dx), q.c_stride = in;
    q.scatter_m = q.scatter_n = q.scale_n = true;
    append(p, q);
  }
  if (dw || db || dz_in || dz_out) {
    cuda::SmallProduct q{};
    q.M = out, q.N = in, q.K = M;
    q.m = to_small(out_gate), q.n = to_small(in_gate);
    q.a = columns_of(dy, true, false);
    q.b = columns_of(x, true, false);
    q.c = as<void>(dw), q.c_stride = in;
    q.scatter_m = q.scatter_n = q.scale_n = true;
    q.scale_m = scale_out;
    q.theta = as<const void>(std::get<0>(weight));
    q.theta_stride_m = std::get<1>(weight), q.theta_stride_n = std::get<2>(weight);
    q.theta_bias = as<const void>(bias);
    q.db = as<void>(db), q.db_sums = as<void>(db_sums);
    q.grad_n = {as<void>(dz_in), as<void>(in_sums), full_in};
    q.grad_m = {as<void>(dz_out), as<void>(out_sums), full_out};
    q.ticket = as<unsigned>(tickets);
    append(p, q);
  }
  run(type, p, where);
}

// in, out, weight, bias, gate of the input, its packed pre-activations (M, in) (0 for the first layer)
using SmallLayer = std::tuple<int32_t, int32_t, Matrix, Address, std::optional<SmallGate>, Address>;
// dw, db, dz, (M, in) buffer for the gradient of the pre-activations, scratch of dz
using SmallLayerGrad = std::tuple<Address, Address, Address, Address, Address>;

Matrix packed_matrix(Address data, int64_t stride) { return {data, stride, 1}; }

// A launch per layer. A gate with a log_alpha is drawn by the first launch that meets it and given to the
// others.
void small_mlp_forward(int type, int32_t M, const Matrix& x, int act, std::vector<SmallLayer> layers,
                       Address y, const std::optional<SmallDraw>& draw, const Where& where) {
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto& [in, out, weight, bias, gate, pre] = layers[l];
    cuda::SmallParams p = small_params(draw, std::nullopt);
    cuda::SmallProduct q{};
    q.M = M, q.N = out, q.K = in;
    q.k = to_small(gate);
    q.a = l ? rows_of(packed_matrix(pre, in), false, false, true, act) : rows_of(x, false, true, true);
    q.b = rows_of(weight, true, true);
    q.bias = as<const void>(bias);
    q.c = as<void>(y), q.c_stride = out;
    q.scatter_m = true;
    if (l + 1 < layers.size()) {
      auto& next = layers[l + 1];
      q.n = to_small(std::get<4>(next));
      q.c = as<void>(std::get<5>(next));
      if (std::get<4>(next)) std::get<4>(*std::get<4>(next)) = 0;
    }
    append(p, q);
    run(type, p, where);
  }
}

// A launch per layer, the last one first: the gradients of a layer's weight and of its input side by side.
void small_mlp_backward(int type, int32_t M, const Matrix& x, int act, const std::vector<SmallLayer>& layers,
                        const std::vector<SmallLayerGrad>& grads, const std::vector<bool>& full,
                        const Matrix& dy, Address dx, Address tickets,
                        const std::optional<Dist>& to_log_alpha, const Where& where) {
  // first: the first layer whose pre-activations need a gradient's way through
  size_t first = 0;
  if (!dx)
    while (first < layers.size() && !std::get<0>(grads[first]) && !std::get<1>(grads[first]) &&
           !std::get<2>(grads[first]))
      ++first;
  Matrix grad = dy;
  for (size_t l = layers.size(); l-- > first;) {
    const auto& [in, out, weight, bias, gate, pre] = layers[l];
    const auto& [dw, db, dz, da, sums] = grads[l];
    const cuda::SmallGate next =
        l + 1 < layers.size() ? to_small(std::get<4>(layers[l + 1])) : cuda::SmallGate{};
    cuda::SmallParams p = small_params(std::nullopt, to_log_alpha);
    const bool upstream = l > first || (l == 0 && dx);
    if (upstream) {
      cuda::SmallProduct q{};
      q.M = M, q.N = in, q.K = out;
      q.n = to_small(gate), q.k = next;
      q.a = rows_of(grad, false, false);
      q.b = columns_of(weight, true, true);
      q.c = as<void>(l ? da : dx), q.c_stride = in;
      q.scatter_m = q.scale_n = true;
      q.scatter_n = l == 0;
      q.pre = as<const void>(l ? pre : 0), q.pre_stride = in;
      q.act = act;
      append(p, q);
    }
    if (dw || db || dz) {
      cuda::SmallProduct q{};
      q.M = out, q.N = in, q.K = M;
      q.m = next, q.n = to_small(gate);
      q.a = columns_of(grad, false, false);
      q.b = l ? columns_of(packed_matrix(pre, in), false, false, act) : columns_of(x, true, false);
      q.c = as<void>(dw), q.c_stride = in;
      q.scatter_m = q.scatter_n = q.scale_n = true;
      q.theta = as<const void>(std::get<0>(weight));
      q.theta_stride_m = std::get<1>(weight), q.theta_stride_n = std::get<2>(weight);
      q.db = as<void>(db);
      q.grad_n = {as<void>(dz), as<void>(sums), bool(full[l])};
      q.ticket = as<unsigned>(tickets);
      append(p, q);
    }
    run(type, p, where);
    grad = packed_matrix(da, in);
  }
}

}  // namespace

#ifndef L0_MODULE
#define L0_MODULE _CUDA
#endif

PYBIND11_MODULE(L0_MODULE, m) {
  m.doc() =
      "l0kernels' CUDA kernels: raw addresses, no checks of shape or type; use the public functions instead";
  m.attr("architectures") = L0_ARCHITECTURES;
  m.attr("penalty_rows") = cuda::kPenaltyRows;
  m.attr("penalty_column_bytes") = cuda::kPenaltyColumnBytes;
  m.def("device_error", &cuda::device_error);
  m.def("sample", &sample);
  m.def("gate_grad", &gate_grad);
  m.def("pack", &pack);
  m.def("unpack", &unpack);
  m.def("penalty_scratch", &penalty_scratch);
  m.def("penalty", &penalty);
  m.attr("small_gates") = cuda::kSmallGates;
  m.attr("small_tile") = cuda::kSmallTile;
  m.def("small_linear_forward", &small_linear_forward);
  m.def("small_linear_backward", &small_linear_backward);
  m.def("small_mlp_forward", &small_mlp_forward);
  m.def("small_mlp_backward", &small_mlp_backward);
#ifdef L0_EMULATED
  m.def("emulator_seed", &l0::emulator::set_seed);
  m.def("emulator_launches", &l0::emulator::launches);
#endif
}
