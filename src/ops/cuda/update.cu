// What an update does to all parameters: the sum of squares of the gradients, and AdamW with the averaged weights. A launch
// takes many tensors, so that small ones cost no launch of their own: a table of them comes with the arguments, and each
// block works on a part of one of them. The CPU's twins are `ops/sums.rs` and `ops/adamw.rs`.
#include "device.cuh"

constexpr int UPDATE_THREADS = 256;

/// The n values are those of the blocks from first_block on, in their order.
struct Gradient {
    const void* values;
    long long n, first_block;
};

/// The same of a parameter with all that belongs to it; ema may be null.
struct Parameter {
    float *values, *first, *second, *ema;
    const void* gradient;
    long long n, first_block;
};

template <class Row, int COUNT> struct Table {
    Row rows[COUNT];
};

// As in `update.rs`; with the other arguments less than the 4 kB that a launch takes.
using Gradients = Table<Gradient, 128>;
using Parameters = Table<Parameter, 64>;

/// Calls f(row, i) for this thread's values of this block's `chunk` values of one of the first `count` rows.
template <class Row, int COUNT, class F>
__device__ inline void each_of_block(const Table<Row, COUNT>& table, int count, int chunk, F f) {
    int low = 0, high = count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (table.rows[middle].first_block <= blockIdx.x) low = middle;
        else high = middle - 1;
    }
    const Row& row = table.rows[low];
    long long start = (blockIdx.x - row.first_block) * chunk;
    long long end = start + chunk < row.n ? start + chunk : row.n;
    for (long long i = start + threadIdx.x; i < end; i += UPDATE_THREADS) f(row, i);
}

/// Σ g² of each block's values.
template <class G> __device__ inline void squares(const Gradients& table, int count, int chunk, float* sums) {
    SHARED_BYTES(bytes);
    float* of_warps = reinterpret_cast<float*>(bytes);
    float sum = 0;
    each_of_block(table, count, chunk, [&](const Gradient& row, long long i) {
        float g = to_float(static_cast<const G*>(row.values)[i]);
        sum += g * g;
    });
    sum = sum_of_lanes(sum);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < UPDATE_THREADS / 32; warp++) sum += of_warps[warp];
    sums[blockIdx.x] = sum;
}

/// One update in place.
template <class G>
__device__ inline void adamw(const Parameters& table, int count, int chunk, float gradient_scale, float shrink,
                             float beta1, float beta2, float step_size, float inverse_root, float eps, float ema_decay) {
    each_of_block(table, count, chunk, [&](const Parameter& row, long long i) {
        float g = to_float(static_cast<const G*>(row.gradient)[i]) * gradient_scale;
        float m = beta1 * row.first[i] + (1 - beta1) * g;
        float v = beta2 * row.second[i] + (1 - beta2) * g * g;
        float updated = row.values[i] * shrink - step_size * m / (sqrtf(v) * inverse_root + eps);
        row.first[i] = m;
        row.second[i] = v;
        row.values[i] = updated;
        if (row.ema) row.ema[i] = ema_decay * row.ema[i] + (1 - ema_decay) * updated;
    });
}

#define UPDATE(T, type)                                                                                              \
    extern "C" __global__ void __launch_bounds__(UPDATE_THREADS) squares_##type(                                     \
        const __grid_constant__ Gradients table, int count, int chunk, float* sums) {                                \
        squares<T>(table, count, chunk, sums);                                                                       \
    }                                                                                                                \
    EXPORTED(squares_##type)                                                                                         \
    extern "C" __global__ void __launch_bounds__(UPDATE_THREADS) adamw_##type(                                       \
        const __grid_constant__ Parameters table, int count, int chunk, float gradient_scale, float shrink,          \
        float beta1, float beta2, float step_size, float inverse_root, float eps, float ema_decay) {                 \
        adamw<T>(table, count, chunk, gradient_scale, shrink, beta1, beta2, step_size, inverse_root, eps, ema_decay); \
    }                                                                                                                \
    EXPORTED(adamw_##type)

UPDATE(float, f32)
UPDATE(half_t, f16)
UPDATE(bfloat_t, bf16)
