// What the kernels share: elements in three dtypes that are calculated with in F32, sums over a row of threads, and one
// struct of arguments for each kernel. Compiled by nvcc for a GPU, and by any C++ compiler, with host.h, for the tests.
#pragma once
#ifdef __CUDACC__
#include <cfloat>
#include <cmath>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KERNEL(name, Arguments) extern "C" __global__ void name(const Arguments a)
#else
#include "host.h"
#endif

// The kernel of a template for each dtype.
#define KERNELS(name, Arguments)                                                                                         \
  KERNEL(name##_f32, Arguments) { name<float>(a); }                                                                      \
  KERNEL(name##_f16, Arguments) { name<__half>(a); }                                                                     \
  KERNEL(name##_bf16, Arguments) { name<__nv_bfloat16>(a); }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest; too large a number becomes infinity.
template <class T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <class T> __device__ inline float load(const void *x, unsigned i) {
  return widen(static_cast<const T *>(x)[i]);
}
template <class T> __device__ inline void store(void *y, unsigned i, float value) {
  static_cast<T *>(y)[i] = narrow<T>(value);
}

// A dtype that is known when the kernel runs: the numbers are those of `Element` in arguments.rs.
enum Element { F32, F16, BF16 };

__device__ inline float load(const void *x, int element, unsigned i) {
  switch (element) {
  case F16: return load<__half>(x, i);
  case BF16: return load<__nv_bfloat16>(x, i);
  default: return load<float>(x, i);
  }
}
// The value as it was rounded.
__device__ inline float store(void *y, int element, unsigned i, float value) {
  switch (element) {
  case F16: store<__half>(y, i, value); break;
  case BF16: store<__nv_bfloat16>(y, i, value); break;
  default: store<float>(y, i, value);
  }
  return load(y, element, i);
}

// Where a thread begins with the elements, and how far it goes to its next one. Indices have 32 bits, since 64 are slow
// to divide: no tensor here has more than 2³¹ elements.
__device__ inline unsigned first() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline unsigned stride() { return gridDim.x * blockDim.x; }

// A number that is not negative, or a NaN of any sign, as an integer: those have the order of the numbers, and NaN above
// them.
__device__ inline int rank(float x) { return __float_as_int(x) & 0x7fffffff; }

// The larger of two numbers that are not negative; NaN if either is.
__device__ inline float larger(float a, float b) { return rank(a) > rank(b) ? a : b; }

// *at = larger(*at, value), whoever else does the same.
__device__ inline void raise(float *at, float value) { atomicMax(reinterpret_cast<int *>(at), rank(value)); }

__device__ inline float plus(float a, float b) { return a + b; }

// What `fold` makes of a row of threads, as many as a power of two, in a block of at most 256, for all of them. Every
// thread of the block must call it.
template <float (*fold)(float, float)> __device__ inline float of_row(float value) {
  __shared__ float values[256];
  float *row = values + threadIdx.y * blockDim.x;
  row[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) row[threadIdx.x] = fold(row[threadIdx.x], row[threadIdx.x + half]);
    __syncthreads();
  }
  float folded = row[0];
  __syncthreads();
  return folded;
}
__device__ inline float sum_of_row(float value) { return of_row<plus>(value); }
__device__ inline float largest_of_row(float value) { return of_row<larger>(value); }
