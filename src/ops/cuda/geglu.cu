// GEGLU and its gradient. The CPU's twin is `ops/activation.rs`.
#include "device.cuh"

constexpr int GEGLU_THREADS = 256;

__device__ inline float normal_cdf(float x) { return 0.5f * (1 + erff(x * 0.70710678118654752f)); }

/// Of x·Φ(x): Φ(x) + x·φ(x).
__device__ inline float gelu_slope(float x) { return normal_cdf(x) + x * 0.3989422804014327f * expf(-0.5f * x * x); }

/// y [n/d, d] = value·gelu(gate), the halves of x's rows.
template <class T> __device__ inline void geglu_forward(const T* x, T* y, int n, int d) {
    int i = blockIdx.x * GEGLU_THREADS + threadIdx.x;
    if (i >= n) return;
    const T* row = x + (size_t)(i / d) * 2 * d + i % d;
    float gate = to_float(row[d]);
    y[i] = from_float<T>(to_float(row[0]) * gate * normal_cdf(gate));
}

template <class T> __device__ inline void geglu_backward(const T* x, const T* dy, T* dx, int n, int d) {
    int i = blockIdx.x * GEGLU_THREADS + threadIdx.x;
    if (i >= n) return;
    size_t at = (size_t)(i / d) * 2 * d + i % d;
    float value = to_float(x[at]), gate = to_float(x[at + d]), slope = to_float(dy[i]);
    dx[at] = from_float<T>(slope * gate * normal_cdf(gate));
    dx[at + d] = from_float<T>(slope * value * gelu_slope(gate));
}

#define GEGLU(T, type)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(GEGLU_THREADS) geglu_forward_##type(const T* x, T* y, int n, int d) { \
        geglu_forward(x, y, n, d);                                                                                     \
    }                                                                                                                  \
    EXPORTED(geglu_forward_##type)                                                                                     \
    extern "C" __global__ void __launch_bounds__(GEGLU_THREADS) geglu_backward_##type(const T* x, const T* dy, T* dx,  \
                                                                                      int n, int d) {                  \
        geglu_backward(x, dy, dx, n, d);                                                                               \
    }                                                                                                                  \
    EXPORTED(geglu_backward_##type)

GEGLU(float, f32)
GEGLU(half_t, f16)
GEGLU(bfloat_t, bf16)
