// Normalisations and their pullback: y = x̂ w + b with x̂ = (x − mean) / sqrt(var + ε) over groups of elements.
#include "element.cuh"

// What the elements of a group are normalised with. They are counted from its first one, so that a large mean costs no
// digits.
struct Standard {
  float origin, mean, scale;

  // x̂
  __device__ float of(float x) const { return (x - origin - mean) * scale; }
};

// x, its cotangent `grad`, y and of_x are (samples, per_sample, channels, inner), a group is one (channels, inner).
// Weight and bias are (per_sample, channels); either may be null. `partial` is (chunks, 2, per_sample, channels), the
// sums over chunks of `chunk` samples; `standards`, one for each group, are written by pull_groups if they are not
// null.
struct NormGroups {
  const void *x, *weight, *bias, *grad;
  void *y, *of_x;
  Standard *standards;
  float *partial;
  unsigned samples, per_sample, channels, inner, chunk;
  int remove_mean, weight_is_f32, bias_is_f32;
  float eps;
};

// The group that a row of threads works on. Beyond the last one it has no elements.
template <class T> struct Group {
  const NormGroups &a;
  unsigned n, size, first, parameters;

  __device__ explicit Group(const NormGroups &a) : a(a), n(blockIdx.x * blockDim.y + threadIdx.y) {
    size = n < a.samples * a.per_sample ? a.channels * a.inner : 0;
    first = n * size;
    parameters = n % a.per_sample * a.channels;
  }

  __device__ float x(unsigned i) const { return load<T>(a.x, first + i); }

  __device__ float weight(unsigned i) const { return parameter(a.weight, a.weight_is_f32, i); }

  __device__ float bias(unsigned i) const { return parameter(a.bias, a.bias_is_f32, i); }

  // The cotangent of x̂.
  __device__ float grad(unsigned i) const {
    float g = load<T>(a.grad, first + i);
    return a.weight ? g * weight(i) : g;
  }

  __device__ Standard standard() const {
    Standard standard = {a.remove_mean && size ? x(0) : 0.0f, 0.0f, 1.0f};
    if (a.remove_mean) {
      float sum = 0.0f;
      for (unsigned i = threadIdx.x; i < size; i += blockDim.x) sum += standard.of(x(i));
      standard.mean = sum_of_row(sum) / size;
    }
    float sum = 0.0f;
    for (unsigned i = threadIdx.x; i < size; i += blockDim.x) {
      float rest = standard.of(x(i));
      sum += rest * rest;
    }
    standard.scale = 1.0f / sqrtf(sum_of_row(sum) / size + a.eps);
    return standard;
  }

private:
  __device__ float parameter(const void *of, int is_f32, unsigned i) const {
    unsigned p = parameters + i / a.inner;
    return is_f32 ? load<float>(of, p) : load<T>(of, p);
  }
};

// y. Here and in pull_groups a row of threads of a block takes a group.
template <class T> __device__ void normalise(const NormGroups &a) {
  Group<T> group(a);
  Standard standard = group.standard();
  for (unsigned i = threadIdx.x; i < group.size; i += blockDim.x) {
    float y = standard.of(group.x(i));
    if (a.weight) y *= group.weight(i);
    if (a.bias) y += group.bias(i);
    store<T>(a.y, group.first + i, y);
  }
}
KERNELS(normalise, NormGroups)

// of_x = s (g − mean(g) − x̂ mean(g x̂)), where g is the cotangent of x̂ and s = 1 / sqrt(var + ε); without mean(g)
// where the mean was not removed.
template <class T> __device__ void pull_groups(const NormGroups &a) {
  Group<T> group(a);
  Standard standard = group.standard();
  float mean = 0.0f, along = 0.0f;
  for (unsigned i = threadIdx.x; i < group.size; i += blockDim.x) {
    float g = group.grad(i);
    mean += g;
    along += g * standard.of(group.x(i));
  }
  mean = a.remove_mean ? sum_of_row(mean) / group.size : 0.0f;
  along = sum_of_row(along) / group.size;
  for (unsigned i = threadIdx.x; i < group.size; i += blockDim.x) {
    float rest = group.grad(i) - mean - standard.of(group.x(i)) * along;
    store<T>(a.of_x, group.first + i, standard.scale * rest);
  }
  if (a.standards && group.size && threadIdx.x == 0) a.standards[group.n] = standard;
}
KERNELS(pull_groups, NormGroups)

// partial: Σ grad x̂ and Σ grad for each parameter. Blocks of as many parameters as they have columns of threads, on a
// chunk of samples each.
template <class T> __device__ void sum_parameters(const NormGroups &a) {
  __shared__ float of_weight[256], of_bias[256];
  unsigned parameters = a.per_sample * a.channels, p = blockIdx.x * blockDim.x + threadIdx.x;
  unsigned begin = blockIdx.y * a.chunk;
  unsigned samples = begin + a.chunk < a.samples ? a.chunk : a.samples - begin;
  unsigned count = p < parameters ? samples * a.inner : 0;
  unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  of_weight[thread] = of_bias[thread] = 0.0f;
  for (unsigned k = threadIdx.y; k < count; k += blockDim.y) {
    unsigned sample = begin + k / a.inner, i = (sample * parameters + p) * a.inner + k % a.inner;
    float g = load<T>(a.grad, i);
    of_weight[thread] += g * a.standards[sample * a.per_sample + p / a.channels].of(load<T>(a.x, i));
    of_bias[thread] += g;
  }
  __syncthreads();
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
      of_weight[thread] += of_weight[thread + half * blockDim.x];
      of_bias[thread] += of_bias[thread + half * blockDim.x];
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && p < parameters) {
    a.partial[2 * blockIdx.y * parameters + p] = of_weight[thread];
    a.partial[(2 * blockIdx.y + 1) * parameters + p] = of_bias[thread];
  }
}
KERNELS(sum_parameters, NormGroups)
