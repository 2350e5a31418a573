// Sums over a batch in F32, in two passes of fixed order: blocks leave partial sums, which are then added up.
#include "functions.cuh"

// pulled = grad · f′, where f′ is of what was kept (1 without it), and by blocks of `chunk` rows the sums of pulled
// over the rows: partial (chunks, columns). Blocks of 32 × 8 threads, on 32 columns of a chunk each.
struct PullColumns {
  const void *grad, *kept;
  void *pulled;
  float *partial;
  unsigned rows, columns, chunk;
  int function;
  float alpha;
};

template <class T> __device__ void pull_columns(const PullColumns &a) {
  __shared__ float sums[8][32];
  unsigned column = blockIdx.x * 32 + threadIdx.x;
  unsigned end = (blockIdx.y + 1) * a.chunk;
  float sum = 0.0f;
  if (column < a.columns) {
    for (unsigned row = blockIdx.y * a.chunk + threadIdx.y; row < end && row < a.rows; row += 8) {
      unsigned i = row * a.columns + column;
      float g = load<T>(a.grad, i);
      if (a.kept) g *= slope_of_kept(a.function, a.alpha, load<T>(a.kept, i));
      if (a.pulled) {
        store<T>(a.pulled, i, g);
        g = load<T>(a.pulled, i);
      }
      sum += g;
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (a.partial && threadIdx.y == 0 && column < a.columns) {
    for (int row = 1; row < 8; row++) sum += sums[row][threadIdx.x];
    a.partial[blockIdx.y * a.columns + column] = sum;
  }
}
KERNELS(pull_columns, PullColumns)

// By blocks of `chunk` rows, the sums of x (rows, channels, inner) over rows and inner: partial (chunks, channels).
// Blocks of 256 threads, on one channel of a chunk each.
struct SumChannels {
  const void *x;
  float *partial;
  unsigned rows, channels, inner, chunk;
};

template <class T> __device__ void sum_channels(const SumChannels &a) {
  __shared__ float sums[256];
  unsigned begin = blockIdx.y * a.chunk;
  unsigned rows = begin + a.chunk < a.rows ? a.chunk : a.rows - begin;
  float sum = 0.0f;
  for (unsigned i = threadIdx.x; i < rows * a.inner; i += 256) {
    unsigned row = begin + i / a.inner;
    sum += load<T>(a.x, (row * a.channels + blockIdx.x) * a.inner + i % a.inner);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned half = 128; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) a.partial[blockIdx.y * a.channels + blockIdx.x] = sums[0];
}
KERNELS(sum_channels, SumChannels)

// sum += factor · by · also · Σ rows of x (rows, count), the factors on the device where they are not null. Element j
// goes to row j / width, column j % width of a matrix whose rows are `pitch` apart. The flag becomes NaN if what is
// added is not finite.
struct AddRows {
  const void *x;
  const float *by, *also;
  float *sum, *flag;
  unsigned rows, count, width, pitch;
  float factor;
};

template <class T> __device__ void add_rows(const AddRows &a) {
  float factor = a.factor * (a.by ? *a.by : 1.0f) * (a.also ? *a.also : 1.0f);
  for (unsigned j = first(); j < a.count; j += stride()) {
    float total = 0.0f;
    for (unsigned row = 0; row < a.rows; row++) total += load<T>(a.x, row * a.count + j);
    total *= factor;
    if (a.flag && !isfinite(total)) *a.flag = NAN;
    if (a.sum) a.sum[j / a.width * a.pitch + j % a.width] += total;
  }
}
KERNELS(add_rows, AddRows)
