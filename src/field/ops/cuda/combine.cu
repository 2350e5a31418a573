// Sums of tensors in mixed dtypes, and what is looked for in them. The kernels of ops/combine.rs.
#include "element.cuh"

struct Term {
  const void *x;
  int element;
  float c;
};

// y = base + by · Σ cᵢ xᵢ, rounded once; the terms are summed first. `base` and `by`, a number on the device, are left
// out where they are null. The flag, where it is wanted, becomes NaN if a rounded element is not finite.
struct Combine {
  Term terms[16];
  const void *base;
  const float *by;
  void *y;
  float *flag;
  unsigned count;
  int length, base_element, element;
};

KERNEL(combine, Combine) {
  float by = a.by ? *a.by : 1.0f;
  for (unsigned i = first(); i < a.count; i += stride()) {
    float sum = 0.0f;
    for (int n = 0; n < a.length; n++) sum += a.terms[n].c * load(a.terms[n].x, a.terms[n].element, i);
    sum *= by;
    if (a.base) sum += load(a.base, a.base_element, i);
    float rounded = store(a.y, a.element, i, sum);
    if (a.flag && !isfinite(rounded)) *a.flag = NAN;
  }
}

// flag: 0 becomes NaN if an element of x is not finite.
// largest: a number ≥ 0 becomes max |x| if that is larger, NaN if an element is.
struct Look {
  const void *x;
  float *result;
  unsigned count;
  int element;
};

KERNEL(find_non_finite, Look) {
  for (unsigned i = first(); i < a.count; i += stride()) {
    if (!isfinite(load(a.x, a.element, i))) *a.result = NAN;
  }
}

KERNEL(max_abs, Look) {
  float largest = 0.0f;
  for (unsigned i = first(); i < a.count; i += stride()) largest = larger(largest, fabsf(load(a.x, a.element, i)));
  largest = largest_of_row(largest);
  if (threadIdx.x == 0) raise(a.result, largest);
}

// The power of two S with ½ < S · largest ≤ 1, shifted down by the headroom, and 1/S; 1 if largest is zero or not
// finite.
struct PowerOfTwo {
  const float *largest;
  float *scale, *inverse;
  int headroom, lowest, highest;
};

KERNEL(power_of_two, PowerOfTwo) {
  float largest = *a.largest, scale = 1.0f;
  if (largest > 0.0f && largest <= FLT_MAX) {
    int exponent;
    if (frexpf(largest, &exponent) == 0.5f) exponent--;
    exponent = exponent < a.lowest ? a.lowest : exponent > a.highest ? a.highest : exponent;
    scale = ldexpf(1.0f, -exponent - a.headroom);
  }
  *a.scale = scale;
  *a.inverse = 1.0f / scale;
}
