// Images as columns of windows, so that a convolution is a product of matrices.
#include "element.cuh"

// x (images, channels, height, width); columns (images, channels · kernel_height · kernel_width, out_height ·
// out_width).
struct Windows {
  const void *from;
  void *to;
  unsigned images, channels, height, width, kernel_height, kernel_width, out_height, out_width, step, padding, dilation;
};

// columns[k, p] = the pixel that k of the kernel meets at the place p; 0 in the padding.
template <class T> __device__ void to_columns(const Windows &a) {
  unsigned places = a.out_height * a.out_width, depth = a.channels * a.kernel_height * a.kernel_width;
  for (unsigned i = first(); i < a.images * depth * places; i += stride()) {
    unsigned place = i % places, k = i / places % depth, image = i / places / depth;
    unsigned channel = k / a.kernel_width / a.kernel_height;
    // Counted from the first row and column of the padding.
    unsigned y = place / a.out_width * a.step + k / a.kernel_width % a.kernel_height * a.dilation;
    unsigned x = place % a.out_width * a.step + k % a.kernel_width * a.dilation;
    bool inside = y >= a.padding && y - a.padding < a.height && x >= a.padding && x - a.padding < a.width;
    unsigned pixel = ((image * a.channels + channel) * a.height + y - a.padding) * a.width + x - a.padding;
    store<T>(a.to, i, inside ? load<T>(a.from, pixel) : 0.0f);
  }
}
KERNELS(to_columns, Windows)

// The place along one dimension from which `offset` of the kernel meets the coordinate, counted from the padding; not
// less than `places` if there is none.
__device__ inline unsigned place_of(unsigned coordinate, unsigned offset, unsigned step, unsigned places) {
  bool meets = coordinate >= offset && (coordinate - offset) % step == 0;
  return meets ? (coordinate - offset) / step : places;
}

// x[pixel] = Σ over all entries of columns that it went to, in F32.
template <class T> __device__ void from_columns(const Windows &a) {
  unsigned places = a.out_height * a.out_width;
  for (unsigned i = first(); i < a.images * a.channels * a.height * a.width; i += stride()) {
    unsigned x = i % a.width + a.padding, y = i / a.width % a.height + a.padding, plane = i / a.width / a.height;
    float sum = 0.0f;
    for (unsigned row = 0; row < a.kernel_height; row++) {
      unsigned out_y = place_of(y, row * a.dilation, a.step, a.out_height);
      for (unsigned column = 0; column < a.kernel_width && out_y < a.out_height; column++) {
        unsigned out_x = place_of(x, column * a.dilation, a.step, a.out_width);
        if (out_x >= a.out_width) continue;
        unsigned k = (plane * a.kernel_height + row) * a.kernel_width + column;
        sum += load<T>(a.from, k * places + out_y * a.out_width + out_x);
      }
    }
    store<T>(a.to, i, sum);
  }
}
KERNELS(from_columns, Windows)
