// Rows in few bits with one scale each, and the increments that are kept so. The kernels of ops/rows.rs, to the bit where
// all is finite: with exact divisions and with subnormal numbers, as nvcc is told to.
#include "element.cuh"

// What an element becomes: the numbers are those of `Code` in ops/rows.rs.
enum Code { HALF, BYTE, NIBBLE };

// Rows of `width` elements in F32. What is encoded is after − before + left, without what is null; it is written to
// `sums` where that is not null, and may be `after` where nothing is added to it. `largest` is 0 at first, one for each
// row. `codes` are (rows, columns), two elements to a column of nibbles. `next`, before + q, and `left_over`, what is
// encoded less q, are written where they are not null, for q as it is decoded; `left_over` may be `sums`. The flag
// becomes NaN if an element is not finite.
struct CodedRows {
  const float *before, *after, *left;
  float *sums, *largest;
  void *codes;
  float *scales, *next, *left_over, *flag;
  unsigned rows, width, chunk;
  int code;
  float most;

  __device__ unsigned per_column() const { return code == NIBBLE ? 2 : 1; }
  __device__ unsigned columns() const { return (width + per_column() - 1) / per_column(); }
};

// The row of a thread, and its part of `count` things in it, one after another. Beyond the last row there is nothing.
struct Part {
  unsigned row, begin, end;

  __device__ Part(const CodedRows &a, unsigned count) : row(blockIdx.x * blockDim.y + threadIdx.y) {
    unsigned first = blockIdx.y * a.chunk, last = first + a.chunk;
    begin = first + threadIdx.x;
    end = row >= a.rows ? 0 : last < count ? last : count;
  }
};

KERNEL(sum_rows, CodedRows) {
  Part part(a, a.width);
  float largest = 0.0f;
  for (unsigned column = part.begin; column < part.end; column += blockDim.x) {
    unsigned i = part.row * a.width + column;
    float sum = a.before ? a.after[i] - a.before[i] : a.after[i];
    if (a.left) sum += a.left[i];
    if (a.sums) a.sums[i] = sum;
    largest = larger(largest, fabsf(sum));
  }
  largest = largest_of_row(largest);
  if (threadIdx.x == 0 && part.row < a.rows) raise(a.largest + part.row, largest);
}

// A quantum of a row: no less than the smallest number there is, unless all of the row is zero.
__device__ inline float quantum(const CodedRows &a, unsigned row) {
  float largest = a.largest[row], scale = largest / a.most;
  return scale == 0.0f && largest > 0.0f ? FLT_TRUE_MIN : scale;
}

// The nearest integer, moved up so that none is negative.
__device__ inline unsigned char integer(float scaled, float most) {
  return (unsigned char)(fminf(fmaxf(rintf(scaled), -most), most) + most);
}

// q of a code. A product that is rounded before anything is added to it: decoding has to give the same.
__device__ inline float decoded(const void *codes, int code, unsigned at, unsigned half, float scale) {
  const unsigned char *bytes = static_cast<const unsigned char *>(codes);
  switch (code) {
  case HALF: return __fmul_rn(load<__half>(codes, at), scale);
  case BYTE: return __fmul_rn((float)bytes[at] - 127.0f, scale);
  default: return __fmul_rn((float)(half ? bytes[at] >> 4 : bytes[at] & 15) - 7.0f, scale);
  }
}

KERNEL(encode_rows, CodedRows) {
  unsigned per_column = a.per_column(), columns = a.columns();
  Part part(a, columns);
  const float *x = a.sums ? a.sums : a.after;
  float scale = part.row < a.rows ? quantum(a, part.row) : 0.0f;
  if (part.begin == 0 && part.row < a.rows) {
    a.scales[part.row] = scale;
    if (!isfinite(scale)) *a.flag = NAN;
  }
  // A row of zeros.
  float by = scale == 0.0f ? INFINITY : scale;
  for (unsigned column = part.begin; column < part.end; column += blockDim.x) {
    unsigned at = part.row * columns + column, from = column * per_column;
    unsigned count = a.width - from < per_column ? a.width - from : per_column;
    unsigned i = part.row * a.width + from;
    unsigned char *byte = static_cast<unsigned char *>(a.codes) + at;
    switch (a.code) {
    case HALF: store<__half>(a.codes, at, x[i] / by); break;
    case BYTE: *byte = integer(x[i] / by, a.most); break;
    default: *byte = integer(x[i] / by, a.most) | (count > 1 ? integer(x[i + 1] / by, a.most) << 4 : 0);
    }
    for (unsigned n = 0; n < count; n++) {
      float q = decoded(a.codes, a.code, at, n, scale), whole = x[i + n];
      if (a.next) a.next[i + n] = a.before[i + n] + q;
      if (a.left_over) a.left_over[i + n] = whole - q;
    }
  }
}

// next = q, for codes and scales that were made before.
KERNEL(decode_rows, CodedRows) {
  Part part(a, a.width);
  unsigned per_column = a.per_column(), columns = a.columns();
  for (unsigned column = part.begin; column < part.end; column += blockDim.x) {
    unsigned at = part.row * columns + column / per_column;
    a.next[part.row * a.width + column] = decoded(a.codes, a.code, at, column % per_column, a.scales[part.row]);
  }
}
