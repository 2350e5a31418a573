// Bias, activation and products with it, element by element.
#include "functions.cuh"

// y = f⁽ⁿ⁾(z) · v · w with z = x + b[c] + t · beyond[c], where x is (…, channels, inner) and c the channel. What is
// null is left out. y may be x; z, where it is wanted, is rounded before f is taken of it.
struct Activate {
  const void *x, *bias, *beyond, *v, *w;
  void *z, *y;
  unsigned count, channels, inner, pitch;
  int function, order, bias_is_f32;
  float alpha, t;
};

template <class T> __device__ void activate(const Activate &a) {
  for (unsigned i = first(); i < a.count; i += stride()) {
    float z = load<T>(a.x, i);
    if (a.bias || a.beyond) {
      unsigned c = i / a.inner % a.channels;
      if (a.bias) z += a.bias_is_f32 ? load<float>(a.bias, c) : load<T>(a.bias, c);
      if (a.beyond) z += a.t * load<T>(a.beyond, c * a.pitch);
    }
    if (a.z) {
      store<T>(a.z, i, z);
      z = load<T>(a.z, i);
    }
    float y = a.order == 0   ? value(a.function, a.alpha, z)
              : a.order == 1 ? slope(a.function, a.alpha, z)
                             : curvature(a.function, a.alpha, z);
    if (a.v) y *= load<T>(a.v, i);
    if (a.w) y *= load<T>(a.w, i);
    store<T>(a.y, i, y);
  }
}
KERNELS(activate, Activate)
