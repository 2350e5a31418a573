// The activations with their first and second derivatives: the formulas of activation/functions.rs.
#pragma once
#include "element.cuh"

// The numbers are those of `function` in arguments.rs.
enum Function { TANH, SIGMOID, SOFTPLUS, SILU, GELU, RELU, ELU, SIN, COS, LOG_COSH, IDENTITY };

// e / (1 + e)², e = exp(-a |x|)
__device__ inline float bell(float x, float a) {
  float e = expf(-a * fabsf(x)), d = 1.0f + e;
  return e / (d * d);
}

__device__ inline float sigmoid(float x) {
  float e = expf(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// φ(x)
__device__ inline float density(float x) { return 0.3989422804f * expf(-0.5f * x * x); }

// x no lower than where exp(x) and Φ(x) are zero, so that no product is zero times infinity. A NaN stays one.
__device__ inline float bounded_below(float x) { return x < -200.0f ? -200.0f : x; }

__device__ inline float value(int function, float alpha, float x) {
  switch (function) {
  case TANH: return tanhf(x);
  case SIGMOID: return sigmoid(x);
  case SOFTPLUS: return (x < 0.0f ? 0.0f : x) + log1pf(expf(-fabsf(x)));
  case SILU: return bounded_below(x) * sigmoid(x);
  case GELU: return bounded_below(x) * (0.5f * erfcf(-0.7071067812f * x));
  case RELU: return x < 0.0f ? 0.0f : x;
  case ELU: return x > 0.0f ? x : alpha * expm1f(x);
  case SIN: return sinf(x);
  case COS: return cosf(x);
  case LOG_COSH: {
    // cosh x = 1 + 2 sinh²(x / 2)
    float size = fabsf(x), s = sinhf(0.5f * (size < 1.0f ? size : 1.0f));
    return size < 1.0f ? log1pf(2.0f * s * s) : size - 0.6931471806f + log1pf(expf(-2.0f * size));
  }
  default: return x;
  }
}

__device__ inline float slope(int function, float alpha, float x) {
  switch (function) {
  case TANH: return 4.0f * bell(x, 2.0f);
  case SIGMOID: return bell(x, 1.0f);
  case SOFTPLUS: return sigmoid(x);
  case SILU: return sigmoid(x) * (1.0f + bounded_below(x) * sigmoid(-bounded_below(x)));
  case GELU: {
    // Φ(x) + x φ(x), which is 1 less its value at -x.
    float size = fabsf(x) > 200.0f ? 200.0f : fabsf(x);
    float below = 0.5f * erfcf(0.7071067812f * size) - size * density(size);
    return x < 0.0f ? below : 1.0f - below;
  }
  case RELU: return x > 0.0f ? 1.0f : 0.0f;
  case ELU: return x > 0.0f ? 1.0f : alpha * expf(x);
  case SIN: return cosf(x);
  case COS: return -sinf(x);
  case LOG_COSH: return tanhf(x);
  default: return 1.0f;
  }
}

__device__ inline float curvature(int function, float alpha, float x) {
  switch (function) {
  case TANH: return -8.0f * tanhf(x) * bell(x, 2.0f);
  case SIGMOID: return -bell(x, 1.0f) * tanhf(0.5f * x);
  case SOFTPLUS: return bell(x, 1.0f);
  case SILU: {
    // Beyond, the bell is zero, and zero times infinity would not be.
    float size = fabsf(x) > 200.0f ? 200.0f : fabsf(x);
    return bell(x, 1.0f) * (2.0f - size * tanhf(0.5f * size));
  }
  case GELU: {
    float square = x * x > 1e4f ? 1e4f : x * x;
    return density(x) * (2.0f - square);
  }
  case ELU: return x > 0.0f ? 0.0f : alpha * expf(x);
  case SIN: return -sinf(x);
  case COS: return -cosf(x);
  case LOG_COSH: return 4.0f * bell(x, 2.0f);
  default: return 0.0f;
  }
}

// f′ from what `Activation::keeps` says: y = f(x), or x itself.
__device__ inline float slope_of_kept(int function, float alpha, float kept) {
  switch (function) {
  case TANH: return (1.0f - kept) * (1.0f + kept);
  case SIGMOID: return kept * (1.0f - kept);
  case SOFTPLUS: return -expm1f(-kept);
  case ELU: return alpha < 0.0f ? slope(function, alpha, kept) : kept > 0.0f ? 1.0f : kept + alpha;
  default: return slope(function, alpha, kept);
  }
}
