// exp, log and erf that the compiler can vectorise without -ffast-math; fp64 takes the standard library's.
// Largest error against fp64 over the range the gates and activations use: exp and log 2 ulp, erf 8 ulp
// (tests/ops/test_native.py).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define L0_HOST_DEVICE __host__ __device__
#else
#define L0_HOST_DEVICE
#endif

namespace l0 {
namespace math {

L0_HOST_DEVICE inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
L0_HOST_DEVICE inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

L0_HOST_DEVICE inline double exp(double x) { return std::exp(x); }
L0_HOST_DEVICE inline double log(double x) { return std::log(x); }
L0_HOST_DEVICE inline double erf(double x) { return std::erf(x); }

// x within [-limit, limit], limit > 0; x no NaN. Floats are in order as integers are, negative ones backwards
// as unsigned ones: two instructions, where the compiler makes six of comparisons that a NaN might reach.
L0_HOST_DEVICE inline double bounded(double x, double limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}
L0_HOST_DEVICE inline float bounded(float x, float limit) {
  const int32_t highest = int32_t(to_bits(limit)), at = int32_t(to_bits(x));
  const uint32_t lowest = to_bits(-limit), below = uint32_t(at < highest ? at : highest);
  return from_bits(below < lowest ? below : lowest);
}

// 2^n * e^r, |r| <= ln(2)/2; x in [-87, 88].
L0_HOST_DEVICE inline float exp_within(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * from_bits((to_bits(shifted) + 127u) << 23);
}
L0_HOST_DEVICE inline double exp_within(double x) { return std::exp(x); }

// Clamped to the normal range, so never 0 or inf; NaN stays NaN.
L0_HOST_DEVICE inline float exp(float x) {
  x = x > 88.0f ? 88.0f : x;
  return exp_within(x < -87.0f ? -87.0f : x);
}

// e^x for x <= 0 and the logistic function, exactly 0 where exp stops at its smallest: times an x of 1e38
// even that would be seen.
L0_HOST_DEVICE inline double decay(double x) { return exp(x); }
L0_HOST_DEVICE inline float decay(float x) {
  const float y = exp(x);
  return x < -87.0f ? 0.0f : y;
}
L0_HOST_DEVICE inline double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
L0_HOST_DEVICE inline float sigmoid(float x) {
  const float y = 1.0f / (1.0f + exp(-x));
  return x < -87.0f ? 0.0f : y;
}

// For x > 0 normal. x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
L0_HOST_DEVICE inline float log(float x) {
  const uint32_t bits = to_bits(x) + (0x3f800000u - 0x3f3504f3u);
  const float e = float(int32_t(bits >> 23) - 127);
  const float f = from_bits((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float f2 = f * f;
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * f2 - 2.12194440e-4f * e - 0.5f * f2;
  return f + y + 0.693359375f * e;
}

L0_HOST_DEVICE inline float erf(float x) {
  x = x > 4.0f ? 4.0f : x;
  x = x < -4.0f ? -4.0f : x;
  const float t = x * x;
  float p = -2.72614225801306e-10f;
  p = p * t + 2.77068142495902e-08f;
  p = p * t - 2.10102402082508e-06f;
  p = p * t - 5.69250639462346e-05f;
  p = p * t - 7.34990630326855e-04f;
  p = p * t - 2.95459980854025e-03f;
  p = p * t - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * t - 2.13374055278905e-04f;
  q = q * t - 1.68282697438203e-03f;
  q = q * t - 7.37332916720468e-03f;
  q = q * t - 1.42647390514189e-02f;
  return x * p / q;
}

}  // namespace math
}  // namespace l0
