// Group norm with SiLU behind it, or without. x, y: [b, positions, c]; kept: (mean, 1/deviation) of each group of each
// image, f32. The positions of an image are shared out over blocks in chunks of `chunk`. Means are taken in two passes over
// a chunk and the chunks' put together by Chan's formula, so that a large common offset does not eat the precision. The
// CPU's twin is `ops/group_norm.rs`.
#include "norms.cuh"

struct Plane {
    int positions, c, groups, chunk;

    __device__ int size() const { return c / groups; }
    __device__ int chunks() const { return (positions + chunk - 1) / chunk; }
    /// Positions in a chunk, the last being shorter.
    __device__ int in_chunk(int i) const { return min(chunk, positions - i * chunk); }
    /// The first value of this block's chunk.
    __device__ size_t start() const { return ((size_t)blockIdx.y * positions + (size_t)blockIdx.x * chunk) * c; }
};

/// (mean, Σ (x − mean)²) of each group of this block's chunk.
template <class T> __device__ inline void group_norm_partial(const T* x, float* partial, Plane plane) {
    SHARED_BYTES(bytes);
    Walk walk(plane.c);
    float* sums = reinterpret_cast<float*>(bytes);
    float* means = sums + walk.rows * plane.c;
    int n = plane.in_chunk(blockIdx.x), size = plane.size();
    x += plane.start();
    // The sum of each thread's column, then of each group by a warp.
    auto pooled = [&](auto value, auto finish) {
        walk.each_column([&](int column) {
            float sum = 0;
            walk.each_row(n, [&](int row) { sum += value(row, column); });
            sums[walk.row * plane.c + column] = sum;
        });
        __syncthreads();
        for (int group = threadIdx.x / 32; group < plane.groups; group += NORM_WARPS) {
            float sum = 0;
            for (int i = threadIdx.x % 32; i < walk.rows * size; i += 32) {
                sum += sums[i / size * plane.c + group * size + i % size];
            }
            sum = sum_of_lanes(sum);
            if (threadIdx.x % 32 == 0) finish(group, sum);
        }
        __syncthreads();
    };
    auto at = [&](int row, int column) { return to_float(x[(size_t)row * plane.c + column]); };
    pooled(at, [&](int group, float sum) { means[group] = sum / (n * size); });
    pooled(
        [&](int row, int column) {
            float centred = at(row, column) - means[column / size];
            return centred * centred;
        },
        [&](int group, float sum) {
            float* own = partial + (((size_t)blockIdx.y * gridDim.x + blockIdx.x) * plane.groups + group) * 2;
            own[0] = means[group];
            own[1] = sum;
        });
}

/// The chunks of a group put together; a warp for each group of each image.
__device__ inline void group_norm_finish(const float* partial, float* kept, Plane plane, int n, float eps) {
    int item = blockIdx.x * NORM_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (item >= n) return; // whole warps
    int image = item / plane.groups, group = item % plane.groups, chunks = plane.chunks();
    const float* own = partial + ((size_t)image * chunks * plane.groups + group) * 2;
    float count = (float)plane.positions * plane.size();
    float sum = 0;
    for (int i = lane; i < chunks; i += 32) {
        sum += own[(size_t)i * plane.groups * 2] * (plane.in_chunk(i) * plane.size());
    }
    float mean = sum_of_lanes(sum) / count;
    float squares = 0;
    for (int i = lane; i < chunks; i += 32) {
        float apart = own[(size_t)i * plane.groups * 2] - mean;
        squares += own[(size_t)i * plane.groups * 2 + 1] + apart * apart * (plane.in_chunk(i) * plane.size());
    }
    float variance = sum_of_lanes(squares) / count;
    if (lane == 0) {
        kept[2 * item] = mean;
        kept[2 * item + 1] = 1 / sqrtf(variance + eps);
    }
}

template <class T>
__device__ inline void group_norm_apply(const T* x, const T* w, const T* b, const float* kept, T* y, Plane plane,
                                        bool is_silu) {
    Walk walk(plane.c);
    size_t start = plane.start();
    walk.each_column([&](int column) {
        const float* own = kept + 2 * ((size_t)blockIdx.y * plane.groups + column / plane.size());
        float scale = own[1] * to_float(w[column]), shift = to_float(b[column]) - own[0] * scale;
        walk.each_row(plane.in_chunk(blockIdx.x), [&](int row) {
            size_t at = start + (size_t)row * plane.c + column;
            float z = to_float(x[at]) * scale + shift;
            y[at] = from_float<T>(is_silu ? silu(z) : z);
        });
    });
}

/// The gradient behind the scale and shift of one value.
__device__ inline float before_silu(float dy, float normed, float w, float b, bool is_silu) {
    return is_silu ? dy * silu_slope(normed * w + b) : dy;
}

/// With g the gradient before SiLU and x̂ the normalised input: Σ g and Σ g·x̂ of each channel over this block's chunk.
template <class T>
__device__ inline void group_norm_slopes(const T* x, const T* w, const T* b, const float* kept, const T* dy,
                                         float* partial, Plane plane, bool is_silu) {
    SHARED_BYTES(bytes);
    Walk walk(plane.c);
    float* sums = reinterpret_cast<float*>(bytes);
    size_t start = plane.start();
    column_sums(walk, plane.in_chunk(blockIdx.x), sums, [&](int row, int column, float& sum, float& with_normed) {
        const float* own = kept + 2 * ((size_t)blockIdx.y * plane.groups + column / plane.size());
        size_t at = start + (size_t)row * plane.c + column;
        float normed = (to_float(x[at]) - own[0]) * own[1];
        float g = before_silu(to_float(dy[at]), normed, to_float(w[column]), to_float(b[column]), is_silu);
        sum += g;
        with_normed += g * normed;
    });
    partial += ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * 2 * plane.c;
    for (int i = threadIdx.x; i < 2 * plane.c; i += NORM_THREADS) partial[i] = sums[i];
}

/// The chunks' sums put together, [b, 2, c], and the means of g·w and g·w·x̂ over each group, [b, groups, 2]; a warp for
/// each group of each image.
template <class T>
__device__ inline void group_norm_pool(const float* partial, const T* w, float* sums, float* pooled, Plane plane, int n) {
    int item = blockIdx.x * NORM_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (item >= n) return; // whole warps
    int image = item / plane.groups, group = item % plane.groups, chunks = plane.chunks(), size = plane.size();
    float means[2] = {};
    for (int column = group * size + lane; column < (group + 1) * size; column += 32) {
        for (int which = 0; which < 2; which++) {
            float sum = 0;
            const float* own = partial + ((size_t)image * chunks * 2 + which) * plane.c + column;
#pragma unroll 8
            for (int i = 0; i < chunks; i++) sum += own[(size_t)i * 2 * plane.c];
            sums[((size_t)image * 2 + which) * plane.c + column] = sum;
            means[which] += sum * to_float(w[column]);
        }
    }
    for (int which = 0; which < 2; which++) {
        float mean = sum_of_lanes(means[which]) / ((float)plane.positions * size);
        if (lane == 0) pooled[2 * item + which] = mean;
    }
}

/// dx = (g·w − mean(g·w) − x̂·mean(g·w·x̂)) / deviation.
template <class T>
__device__ inline void group_norm_dx(const T* x, const T* w, const T* b, const float* kept, const T* dy,
                                     const float* pooled, T* dx, Plane plane, bool is_silu) {
    Walk walk(plane.c);
    size_t start = plane.start();
    walk.each_column([&](int column) {
        size_t group = (size_t)blockIdx.y * plane.groups + column / plane.size();
        float mean = kept[2 * group], rstd = kept[2 * group + 1];
        float mean_g = pooled[2 * group], mean_gx = pooled[2 * group + 1];
        float scale = to_float(w[column]), shift = to_float(b[column]);
        walk.each_row(plane.in_chunk(blockIdx.x), [&](int row) {
            size_t at = start + (size_t)row * plane.c + column;
            float normed = (to_float(x[at]) - mean) * rstd;
            float g = before_silu(to_float(dy[at]), normed, scale, shift, is_silu);
            dx[at] = from_float<T>(rstd * (g * scale - mean_g - normed * mean_gx));
        });
    });
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS) group_norm_finish_all(
    const float* partial, float* kept, int positions, int c, int groups, int chunk, int n, float eps) {
    group_norm_finish(partial, kept, {positions, c, groups, chunk}, n, eps);
}
EXPORTED(group_norm_finish_all)

#define GROUP_NORM(T, type)                                                                                          \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS) group_norm_partial_##type(                            \
        const T* x, float* partial, int positions, int c, int groups, int chunk) {                                   \
        group_norm_partial(x, partial, {positions, c, groups, chunk});                                               \
    }                                                                                                                \
    EXPORTED(group_norm_partial_##type)                                                                              \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS) group_norm_apply_##type(                              \
        const T* x, const T* w, const T* b, const float* kept, T* y, int positions, int c, int groups, int chunk,    \
        int is_silu) {                                                                                               \
        group_norm_apply(x, w, b, kept, y, {positions, c, groups, chunk}, is_silu != 0);                             \
    }                                                                                                                \
    EXPORTED(group_norm_apply_##type)                                                                                \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS) group_norm_slopes_##type(                             \
        const T* x, const T* w, const T* b, const float* kept, const T* dy, float* partial, int positions, int c,    \
        int groups, int chunk, int is_silu) {                                                                        \
        group_norm_slopes(x, w, b, kept, dy, partial, {positions, c, groups, chunk}, is_silu != 0);                  \
    }                                                                                                                \
    EXPORTED(group_norm_slopes_##type)                                                                               \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS) group_norm_pool_##type(                               \
        const float* partial, const T* w, float* sums, float* pooled, int positions, int c, int groups, int chunk,   \
        int n) {                                                                                                     \
        group_norm_pool(partial, w, sums, pooled, {positions, c, groups, chunk}, n);                                 \
    }                                                                                                                \
    EXPORTED(group_norm_pool_##type)                                                                                 \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS) group_norm_dx_##type(                                 \
        const T* x, const T* w, const T* b, const float* kept, const T* dy, const float* pooled, T* dx, int positions, \
        int c, int groups, int chunk, int is_silu) {                                                                 \
        group_norm_dx(x, w, b, kept, dy, pooled, dx, {positions, c, groups, chunk}, is_silu != 0);                   \
    }                                                                                                                \
    EXPORTED(group_norm_dx_##type)                                                                                   \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS) group_norm_affine_##type(const float* sums, T* dw, T* db, \
                                                                                      int n, int c) {                \
        sum_slopes(sums, dw, db, n, c);                                                                              \
    }                                                                                                                \
    EXPORTED(group_norm_affine_##type)

GROUP_NORM(float, f32)
GROUP_NORM(half_t, f16)
GROUP_NORM(bfloat_t, bf16)
