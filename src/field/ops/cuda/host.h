// Lets the kernels run on the host, for the tests: a block is as many coroutines as it has threads, each of which runs
// to its next __syncthreads() before the others do.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

using std::isfinite;

#define __device__
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
};
static thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

struct Block {
  ucontext_t scheduler;
  std::vector<ucontext_t> threads;
  std::vector<bool> done;
  size_t current;
  const std::function<void()> *work;
};
static thread_local Block block;

static inline void thread_begins() {
  (*block.work)();
  block.done[block.current] = true;
}

static inline void __syncthreads() { swapcontext(&block.threads[block.current], &block.scheduler); }

static inline void run_block(const std::function<void()> &work) {
  const size_t stack = 64 * 1024, count = (size_t)blockDim.x * blockDim.y * blockDim.z;
  static thread_local std::vector<char> stacks;
  stacks.resize(count * stack);
  block.threads.assign(count, ucontext_t());
  block.done.assign(count, false);
  block.work = &work;
  for (size_t n = 0; n < count; n++) {
    ucontext_t &thread = block.threads[n];
    getcontext(&thread);
    thread.uc_stack.ss_sp = &stacks[n * stack];
    thread.uc_stack.ss_size = stack;
    thread.uc_link = &block.scheduler;
    makecontext(&thread, thread_begins, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (size_t n = 0; n < count; n++) {
      if (block.done[n]) continue;
      block.current = n;
      threadIdx = {(unsigned)(n % blockDim.x), (unsigned)(n / blockDim.x % blockDim.y),
                   (unsigned)(n / blockDim.x / blockDim.y)};
      swapcontext(&block.scheduler, &block.threads[n]);
      alive = alive || !block.done[n];
    }
  }
}

static inline void run(const std::function<void()> &work, const unsigned *blocks, const unsigned *threads) {
  gridDim = {blocks[0], blocks[1], blocks[2]};
  blockDim = {threads[0], threads[1], threads[2]};
  for (unsigned z = 0; z < gridDim.z; z++)
    for (unsigned y = 0; y < gridDim.y; y++)
      for (unsigned x = 0; x < gridDim.x; x++) {
        blockIdx = {x, y, z};
        run_block(work);
      }
}

#define KERNEL(name, Arguments)                                                                                          \
  static void name##_thread(const Arguments &a);                                                                         \
  extern "C" void name(const void *a, const unsigned *blocks, const unsigned *threads) {                                 \
    run([=] { name##_thread(*static_cast<const Arguments *>(a)); }, blocks, threads);                                    \
  }                                                                                                                      \
  static void name##_thread(const Arguments &a)

static inline int __float_as_int(float x) {
  int bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline int atomicMax(int *at, int value) {
  int old = *at;
  *at = value > old ? value : old;
  return old;
}

struct __half {
  uint16_t bits;
};
static inline float __half2float(__half x) {
  uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, size = x.bits & 0x7fff;
  if (size >= 0x7c00) return as_float(sign | 0x7f800000 | (size & 0x3ff) << 13);
  return as_float(sign | (uint32_t)__float_as_int(as_float(size << 13) * 0x1p112f));
}
static inline __half __float2half_rn(float x) {
  uint32_t bits = (uint32_t)__float_as_int(x), size = bits & 0x7fffffff, half;
  if (size > 0x7f800000) half = 0x7e00;
  else if (size >= 0x47800000) half = 0x7c00;
  // Below 2⁻¹⁴ the last place is 2⁻²⁴, as it is for numbers from ½ to 1 in F32.
  else if (size < 0x38800000) half = (uint32_t)__float_as_int(as_float(size) + 0.5f) - 0x3f000000;
  else half = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
  return {(uint16_t)(bits >> 16 & 0x8000 | half)};
}

struct __nv_bfloat16 {
  uint16_t bits;
};
static inline float __bfloat162float(__nv_bfloat16 x) { return as_float((uint32_t)x.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits = (uint32_t)__float_as_int(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
