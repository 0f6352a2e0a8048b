// Around a convolution's matrix products: pictures [images, h, w, c] to rows of patches [positions, k·k·c] and back, weights
// between [out, c, k·k] and [out, k·k, c]. Neighbouring threads are at neighbouring channels, N of which one
// thread takes at a time. The CPU's twin is `ops/conv.rs`.
#include "device.cuh"

constexpr int CONV_THREADS = 256;

/// Number of this thread over the grid.
__device__ inline int own_index() { return blockIdx.x * CONV_THREADS + threadIdx.x; }

/// Rows of patches for the output rows from first_row on, n_rows of each image. Here c counts Fews; n is their number in
/// all.
template <class T, int N>
__device__ inline void unfold(const T* x, T* patches, int n, int h, int w, int c, int w_out, int first_row, int n_rows,
                              int k, int stride, int top, int left) {
    int i = own_index();
    if (i >= n) return;
    int channel = i % c, tap = i / c % (k * k), position = i / c / (k * k);
    int column = position % w_out, row = position / w_out % n_rows, image = position / w_out / n_rows;
    int at_y = (first_row + row) * stride - top + tap / k, at_x = column * stride - left + tap % k;
    Few<T, N> few;
    if (at_y >= 0 && at_y < h && at_x >= 0 && at_x < w) {
        few = reinterpret_cast<const Few<T, N>*>(x)[(((size_t)image * h + at_y) * w + at_x) * c + channel];
    } else {
        for (int j = 0; j < N; j++) few.values[j] = from_float<T>(0);
    }
    reinterpret_cast<Few<T, N>*>(patches)[i] = few;
}

/// The adjoint: each value of x's rows from first_row on, n_rows of each image, is the sum of what the patches hold of it.
/// They are those of the output rows from first_patch_row on, n_patch_rows of each image, and all that touch these rows.
template <class T, int N>
__device__ inline void fold(const T* patches, T* x, int n, int first_row, int n_rows, int w, int c, int first_patch_row,
                            int n_patch_rows, int h_out, int w_out, int k, int stride, int top, int left) {
    int i = own_index();
    if (i >= n) return;
    int channel = i % c, column = i / c % w, row = i / c / w % n_rows, image = i / c / w / n_rows;
    float sums[N] = {};
    for (int tap_y = 0; tap_y < k; tap_y++) {
        int at_y = first_row + row + top - tap_y;
        if (at_y < 0 || at_y % stride != 0 || at_y / stride >= h_out) continue;
        int patch_row = at_y / stride - first_patch_row;
        for (int tap_x = 0; tap_x < k; tap_x++) {
            int at_x = column + left - tap_x;
            if (at_x < 0 || at_x % stride != 0 || at_x / stride >= w_out) continue;
            size_t position = ((size_t)image * n_patch_rows + patch_row) * w_out + at_x / stride;
            size_t at = (position * k * k + tap_y * k + tap_x) * c + channel;
            Few<T, N> few = reinterpret_cast<const Few<T, N>*>(patches)[at];
            for (int j = 0; j < N; j++) sums[j] += to_float(few.values[j]);
        }
    }
    Few<T, N> few;
    for (int j = 0; j < N; j++) few.values[j] = from_float<T>(sums[j]);
    reinterpret_cast<Few<T, N>*>(x)[i] = few;
}

/// weight [out, c, taps] to packed [out, taps, c], a thread for each pair of channels.
template <class T> __device__ inline void pack(const T* weight, T* packed, int n, int c, int taps) {
    int i = own_index();
    if (i >= n) return;
    weight += (size_t)i * taps;
    packed += (size_t)(i / c) * taps * c + i % c;
    for (int tap = 0; tap < taps; tap++) packed[(size_t)tap * c] = weight[tap];
}

/// And back.
template <class T> __device__ inline void unpack(const T* packed, T* weight, int n, int c, int taps) {
    int i = own_index();
    if (i >= n) return;
    weight += (size_t)i * taps;
    packed += (size_t)(i / c) * taps * c + i % c;
    for (int tap = 0; tap < taps; tap++) weight[tap] = packed[(size_t)tap * c];
}

#define CONV_KERNEL extern "C" __global__ void __launch_bounds__(CONV_THREADS)

#define CONV_BY_FEW(T, N, type)                                                                                        \
    CONV_KERNEL conv_unfold_##type(const T* x, T* patches, int n, int h, int w, int c, int w_out, int first_row,       \
                                   int n_rows, int k, int stride, int top, int left) {                                 \
        unfold<T, N>(x, patches, n, h, w, c, w_out, first_row, n_rows, k, stride, top, left);                          \
    }                                                                                                                  \
    EXPORTED(conv_unfold_##type)                                                                                       \
    CONV_KERNEL conv_fold_##type(const T* patches, T* x, int n, int first_row, int n_rows, int w, int c,               \
                                 int first_patch_row, int n_patch_rows, int h_out, int w_out, int k, int stride,       \
                                 int top, int left) {                                                                  \
        fold<T, N>(patches, x, n, first_row, n_rows, w, c, first_patch_row, n_patch_rows, h_out, w_out, k, stride, top, \
                   left);                                                                                              \
    }                                                                                                                  \
    EXPORTED(conv_fold_##type)

#define CONV(T, type, wide)                                                                                            \
    CONV_BY_FEW(T, 1, type)                                                                                            \
    CONV_BY_FEW(T, 16 / sizeof(T), wide)                                                                               \
    CONV_KERNEL conv_pack_##type(const T* weight, T* packed, int n, int c, int taps) {                                 \
        pack(weight, packed, n, c, taps);                                                                              \
    }                                                                                                                  \
    EXPORTED(conv_pack_##type)                                                                                         \
    CONV_KERNEL conv_unpack_##type(const T* packed, T* weight, int n, int c, int taps) {                               \
        unpack(packed, weight, n, c, taps);                                                                            \
    }                                                                                                                  \
    EXPORTED(conv_unpack_##type)

CONV(float, f32, f32_by_4)
CONV(half_t, f16, f16_by_8)
CONV(bfloat_t, bf16, bf16_by_8)
