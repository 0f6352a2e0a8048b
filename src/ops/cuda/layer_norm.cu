// Layer norm of rows of c values, a warp for each. kept: (mean, 1/deviation) of each row, f32. The CPU's twin is
// `ops/layer_norm.rs`.
#include "norms.cuh"

/// Σ f(column) over this warp's row.
template <class F> __device__ inline float row_sum(int c, F f) {
    float sum = 0;
    for (int column = threadIdx.x % 32; column < c; column += 32) sum += f(column);
    return sum_of_lanes(sum);
}

template <class T>
__device__ inline void layer_norm_forward(const T* x, const T* w, const T* b, T* y, float* kept, int n, int c, float eps) {
    int row = blockIdx.x * NORM_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= n) return; // whole warps
    x += (size_t)row * c;
    y += (size_t)row * c;
    float mean = row_sum(c, [&](int i) { return to_float(x[i]); }) / c;
    float variance = row_sum(c, [&](int i) {
        float centred = to_float(x[i]) - mean;
        return centred * centred;
    }) / c;
    float rstd = 1 / sqrtf(variance + eps);
    for (int i = lane; i < c; i += 32) {
        y[i] = from_float<T>((to_float(x[i]) - mean) * rstd * to_float(w[i]) + to_float(b[i]));
    }
    if (lane == 0) {
        kept[2 * row] = mean;
        kept[2 * row + 1] = rstd;
    }
}

/// With x̂ the normalised input and g = dy·w: dx = (g − mean(g) − x̂·mean(g·x̂)) / deviation.
template <class T>
__device__ inline void layer_norm_dx(const T* x, const T* w, const float* kept, const T* dy, T* dx, int n, int c) {
    int row = blockIdx.x * NORM_WARPS + threadIdx.x / 32;
    if (row >= n) return; // whole warps
    x += (size_t)row * c;
    dy += (size_t)row * c;
    dx += (size_t)row * c;
    float mean = kept[2 * row], rstd = kept[2 * row + 1];
    auto g = [&](int i) { return to_float(dy[i]) * to_float(w[i]); };
    auto normed = [&](int i) { return (to_float(x[i]) - mean) * rstd; };
    float mean_g = row_sum(c, g) / c;
    float mean_gx = row_sum(c, [&](int i) { return g(i) * normed(i); }) / c;
    for (int i = threadIdx.x % 32; i < c; i += 32) {
        dx[i] = from_float<T>(rstd * (g(i) - mean_g - normed(i) * mean_gx));
    }
}

/// Σ dy and Σ dy·x̂ of each column over `chunk` rows a block, [blocks, 2, c].
template <class T>
__device__ inline void layer_norm_slopes(const T* x, const float* kept, const T* dy, float* partial, int n, int c,
                                         int chunk) {
    SHARED_BYTES(bytes);
    float* sums = reinterpret_cast<float*>(bytes);
    int first = blockIdx.x * chunk;
    column_sums(Walk(c), min(chunk, n - first), sums, [&](int row, int column, float& sum, float& with_normed) {
        row += first;
        float own = to_float(dy[(size_t)row * c + column]);
        sum += own;
        with_normed += own * (to_float(x[(size_t)row * c + column]) - kept[2 * row]) * kept[2 * row + 1];
    });
    partial += (size_t)blockIdx.x * 2 * c;
    for (int i = threadIdx.x; i < 2 * c; i += NORM_THREADS) partial[i] = sums[i];
}

#define LAYER_NORM(T, type)                                                                                        \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS) layer_norm_forward_##type(                          \
        const T* x, const T* w, const T* b, T* y, float* kept, int n, int c, float eps) {                          \
        layer_norm_forward(x, w, b, y, kept, n, c, eps);                                                           \
    }                                                                                                              \
    EXPORTED(layer_norm_forward_##type)                                                                            \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS) layer_norm_dx_##type(                               \
        const T* x, const T* w, const float* kept, const T* dy, T* dx, int n, int c) {                             \
        layer_norm_dx(x, w, kept, dy, dx, n, c);                                                                   \
    }                                                                                                              \
    EXPORTED(layer_norm_dx_##type)                                                                                 \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS) layer_norm_slopes_##type(                           \
        const T* x, const float* kept, const T* dy, float* partial, int n, int c, int chunk) {                     \
        layer_norm_slopes(x, kept, dy, partial, n, c, chunk);                                                      \
    }                                                                                                              \
    EXPORTED(layer_norm_slopes_##type)                                                                             \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS) layer_norm_affine_##type(const float* partial, T* dw, \
                                                                                      T* db, int n, int c) {       \
        sum_slopes(partial, dw, db, n, c);                                                                         \
    }                                                                                                              \
    EXPORTED(layer_norm_affine_##type)

LAYER_NORM(float, f32)
LAYER_NORM(half_t, f16)
LAYER_NORM(bfloat_t, bf16)
