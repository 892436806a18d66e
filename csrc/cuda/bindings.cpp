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
  p.z = as<void>(z);
  p.index = as<int32_t>(index);
  int64_t z_at = 0, index_at = 0;
  for (size_t begin = 0; begin < sizes.size(); begin += cuda::kSampleVectors) {
    const int vectors = int(std::min<size_t>(cuda::kSampleVectors, sizes.size() - begin));
    int64_t largest = 0;
    for (int i = 0; i < vectors; ++i) {
      const int64_t size = sizes[begin + i];
      p.vector[i] = {as<const void>(log_alpha[begin + i]), z_at, index_at, int32_t(size),
                     uint32_t(begin + i)};
      z_at += size;
      index_at += padded(size);
      largest = std::max(largest, size);
    }
    p.count = as<int32_t>(count) + 2 * begin;
    p.expected = expected ? as<void>(expected + begin * (is_double ? 8 : 4)) : nullptr;
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
            Address dz_row, Address dz_col, Address row_sums, Address col_sums, Address tickets,
            const Grid& grid, const Where& where) {
  const auto& [data, stride_row, stride_col] = theta;
  cuda::unpack(
      packed_type, full_type,
      {as<const void>(packed), packed_stride, as<void>(full), full_stride, to_side(rows), to_side(cols),
       skip_plain, as<const void>(data), stride_row, stride_col, as<void>(dz_row), as<void>(dz_col),
       as<void>(row_sums), as<void>(col_sums), as<unsigned>(tickets), to_grid(grid)},
      to_stream(where));
}

// log_alpha, gradient, size, weight
using PenaltyVector = std::tuple<Address, Address, int64_t, double>;
// theta, its row stride, type, rows, columns, decay; log_alpha of rows and columns; gradients of theta, of
// both; scratch for sums of rows and of columns
using PenaltyMatrix =
    std::tuple<std::tuple<Address, int64_t, int, int64_t, int64_t, double>, std::tuple<Address, Address>,
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
    part.tickets += row_tiles + col_tiles;
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
             const Where& where) {
  cuda::PenaltyParams p;
  p.shift = shift(dist);
  p.block_sums = as<void>(block_sums);
  p.ticket = as<unsigned>(tickets);
  p.total = as<void>(total);
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
      const auto& [source, log_alphas, grads, sums] = matrices[m];
      const auto& [theta, stride, type, rows, cols, decay] = source;
      const auto [row_tiles, col_tiles] = tiles_of(matrices[m]);
      p.matrix[i] = {as<const void>(theta),
                     as<void>(std::get<0>(grads)),
                     stride,
                     cols,
                     rows,
                     cols,
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
      ticket += row_tiles + col_tiles;
      block += int32_t(row_tiles * col_tiles);
    }
    p.blocks = block;
    if (block == 0) continue;
    (is_double ? cuda::penalty<double> : cuda::penalty<float>)(p, to_stream(where));
    p.accumulate = true;
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
#ifdef L0_EMULATED
  m.def("emulator_seed", &l0::emulator::set_seed);
  m.def("emulator_launches", &l0::emulator::launches);
#endif
}
