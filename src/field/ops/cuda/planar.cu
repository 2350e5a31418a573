// Planar units with their divergence, and their pullback: the formulas of planar.rs.
#include "functions.cuh"

// z is (rows, dim), units (count, 2 dim + 1), a row w, b, u for each. `both` and its cotangent `grad` are (rows, dim)
// and, behind it, (rows). `partial` is (chunks, count, 2 dim + 1), the sums over chunks of `chunk` rows.
struct PlanarUnits {
  const void *z, *units, *grad;
  void *both, *of_z;
  float *partial;
  unsigned rows, dim, count, chunk;
  int function;
  float alpha;
};

template <class T, int DIM> struct Unit {
  float w[DIM], b, u[DIM], along;

  __device__ Unit(const PlanarUnits &a, unsigned n) : b(load<T>(a.units, n * (2 * DIM + 1) + DIM)), along(0.0f) {
    for (int d = 0; d < DIM; d++) {
      w[d] = load<T>(a.units, n * (2 * DIM + 1) + d);
      u[d] = load<T>(a.units, n * (2 * DIM + 1) + DIM + 1 + d);
      along += w[d] * u[d];
    }
  }

  // w·z + b
  __device__ float at(const float *z) const {
    float p = b;
    for (int d = 0; d < DIM; d++) p += w[d] * z[d];
    return p;
  }

  // The cotangent of w·z + b.
  __device__ float pull(const PlanarUnits &a, float p, float slope, const float *g, float t) const {
    // Where the divergence has no cotangent, u·w may be infinite.
    float sum = t == 0.0f ? 0.0f : along * t * curvature(a.function, a.alpha, p);
    for (int d = 0; d < DIM; d++) sum += u[d] * g[d] * slope;
    return sum;
  }
};

template <class T, int DIM> __device__ void load_row(const void *x, unsigned row, float factor, float *to) {
  for (int d = 0; d < DIM; d++) to[d] = factor * load<T>(x, row * DIM + d);
}

// Blocks of 8 rows, 32 threads for the units of each.
template <class T, int DIM> __device__ void planar_of(const PlanarUnits &a) {
  unsigned row = blockIdx.x * 8 + threadIdx.y;
  bool is_row = row < a.rows;
  float z[DIM], f[DIM] = {}, divergence = 0.0f;
  if (is_row) {
    load_row<T, DIM>(a.z, row, 1.0f, z);
    for (unsigned n = threadIdx.x; n < a.count; n += 32) {
      Unit<T, DIM> unit(a, n);
      float p = unit.at(z), y = value(a.function, a.alpha, p);
      for (int d = 0; d < DIM; d++) f[d] += unit.u[d] * y;
      divergence += unit.along * slope(a.function, a.alpha, p);
    }
  }
  for (int d = 0; d < DIM; d++) f[d] = sum_of_row(f[d]) / a.count;
  divergence = sum_of_row(divergence) / a.count;
  if (is_row && threadIdx.x == 0) {
    for (int d = 0; d < DIM; d++) store<T>(a.both, row * DIM + d, f[d]);
    store<T>(a.both, a.rows * DIM + row, divergence);
  }
}

// of_z, in blocks as above.
template <class T, int DIM> __device__ void pull_points_of(const PlanarUnits &a) {
  unsigned row = blockIdx.x * 8 + threadIdx.y;
  bool is_row = row < a.rows;
  float z[DIM], g[DIM], of_z[DIM] = {};
  if (is_row) {
    load_row<T, DIM>(a.z, row, 1.0f, z);
    load_row<T, DIM>(a.grad, row, 1.0f / a.count, g);
    float t = load<T>(a.grad, a.rows * DIM + row) / a.count;
    for (unsigned n = threadIdx.x; n < a.count; n += 32) {
      Unit<T, DIM> unit(a, n);
      float p = unit.at(z), pulled = unit.pull(a, p, slope(a.function, a.alpha, p), g, t);
      for (int d = 0; d < DIM; d++) of_z[d] += unit.w[d] * pulled;
    }
  }
  for (int d = 0; d < DIM; d++) {
    float sum = sum_of_row(of_z[d]);
    if (is_row && threadIdx.x == 0) store<T>(a.of_z, row * DIM + d, sum);
  }
}

// partial: blocks of 32 units × 8 rows, on a chunk of rows each.
template <class T, int DIM> __device__ void pull_units_of(const PlanarUnits &a) {
  __shared__ float sums[8][32];
  unsigned n = blockIdx.x * 32 + threadIdx.x, end = (blockIdx.y + 1) * a.chunk;
  float of_unit[2 * DIM + 1] = {};
  if (n < a.count) {
    Unit<T, DIM> unit(a, n);
    for (unsigned row = blockIdx.y * a.chunk + threadIdx.y; row < end && row < a.rows; row += 8) {
      float z[DIM], g[DIM], t = load<T>(a.grad, a.rows * DIM + row) / a.count;
      load_row<T, DIM>(a.z, row, 1.0f, z);
      load_row<T, DIM>(a.grad, row, 1.0f / a.count, g);
      float p = unit.at(z), y = value(a.function, a.alpha, p), s = slope(a.function, a.alpha, p);
      float pulled = unit.pull(a, p, s, g, t);
      for (int d = 0; d < DIM; d++) {
        of_unit[d] += pulled * z[d] + unit.u[d] * (s * t);
        of_unit[DIM + 1 + d] += y * g[d] + unit.w[d] * (s * t);
      }
      of_unit[DIM] += pulled;
    }
  }
  for (int k = 0; k < 2 * DIM + 1; k++) {
    sums[threadIdx.y][threadIdx.x] = of_unit[k];
    __syncthreads();
    if (threadIdx.y == 0 && n < a.count) {
      float sum = of_unit[k];
      for (int row = 1; row < 8; row++) sum += sums[row][threadIdx.x];
      a.partial[(blockIdx.y * a.count + n) * (2 * DIM + 1) + k] = sum;
    }
    __syncthreads();
  }
}

// A kernel for the dimensions that fit into registers: `PlanarUnits::MOST` in arguments.rs.
#define FOR_EACH_DIM(name)                                                                                               \
  template <class T> __device__ void name(const PlanarUnits &a) {                                                             \
    switch (a.dim) {                                                                                                     \
    case 1: return name##_of<T, 1>(a);                                                                                   \
    case 2: return name##_of<T, 2>(a);                                                                                   \
    case 3: return name##_of<T, 3>(a);                                                                                   \
    case 4: return name##_of<T, 4>(a);                                                                                   \
    case 5: return name##_of<T, 5>(a);                                                                                   \
    case 6: return name##_of<T, 6>(a);                                                                                   \
    case 7: return name##_of<T, 7>(a);                                                                                   \
    case 8: return name##_of<T, 8>(a);                                                                                   \
    }                                                                                                                    \
  }                                                                                                                      \
  KERNELS(name, PlanarUnits)
FOR_EACH_DIM(planar)
FOR_EACH_DIM(pull_points)
FOR_EACH_DIM(pull_units)
