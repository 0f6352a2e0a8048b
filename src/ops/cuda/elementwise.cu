// What goes value by value: GEGLU and its gradient, and AdamW with the averaged weights in one pass over a parameter. The
// CPU's twins are `ops/activation.rs` and `ops/adamw.rs`.
#include "device.cuh"

constexpr int ELEMENT_THREADS = 256;

__device__ inline float normal_cdf(float x) { return 0.5f * (1 + erff(x * 0.70710678118654752f)); }

/// Of x·Φ(x): Φ(x) + x·φ(x).
__device__ inline float gelu_slope(float x) { return normal_cdf(x) + x * 0.3989422804014327f * expf(-0.5f * x * x); }

/// y [n/d, d] = value·gelu(gate), the halves of x's rows.
template <class T> __device__ inline void geglu_forward(const T* x, T* y, int n, int d) {
    int i = blockIdx.x * ELEMENT_THREADS + threadIdx.x;
    if (i >= n) return;
    const T* row = x + (size_t)(i / d) * 2 * d + i % d;
    float gate = to_float(row[d]);
    y[i] = from_float<T>(to_float(row[0]) * gate * normal_cdf(gate));
}

template <class T> __device__ inline void geglu_backward(const T* x, const T* dy, T* dx, int n, int d) {
    int i = blockIdx.x * ELEMENT_THREADS + threadIdx.x;
    if (i >= n) return;
    size_t at = (size_t)(i / d) * 2 * d + i % d;
    float value = to_float(x[at]), gate = to_float(x[at + d]), slope = to_float(dy[i]);
    dx[at] = from_float<T>(slope * gate * normal_cdf(gate));
    dx[at + d] = from_float<T>(slope * value * gelu_slope(gate));
}

/// One update in place; `ema` may be null.
template <class G>
__device__ inline void adamw(float* p, float* first, float* second, float* ema, const G* gradient, int n,
                             float gradient_scale, float shrink, float beta1, float beta2, float step_size,
                             float inverse_root, float eps, float ema_decay) {
    int i = blockIdx.x * ELEMENT_THREADS + threadIdx.x;
    if (i >= n) return;
    float g = to_float(gradient[i]) * gradient_scale;
    float m = beta1 * first[i] + (1 - beta1) * g;
    float v = beta2 * second[i] + (1 - beta2) * g * g;
    float updated = p[i] * shrink - step_size * m / (sqrtf(v) * inverse_root + eps);
    first[i] = m;
    second[i] = v;
    p[i] = updated;
    if (ema) ema[i] = ema_decay * ema[i] + (1 - ema_decay) * updated;
}

#define ELEMENTWISE(T, type)                                                                                           \
    extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS) geglu_forward_##type(const T* x, T* y, int n, int d) { \
        geglu_forward(x, y, n, d);                                                                                     \
    }                                                                                                                  \
    EXPORTED(geglu_forward_##type)                                                                                     \
    extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS) geglu_backward_##type(const T* x, const T* dy, T* dx, \
                                                                                      int n, int d) {                  \
        geglu_backward(x, dy, dx, n, d);                                                                               \
    }                                                                                                                  \
    EXPORTED(geglu_backward_##type)                                                                                    \
    extern "C" __global__ void __launch_bounds__(ELEMENT_THREADS) adamw_##type(                                        \
        float* p, float* first, float* second, float* ema, const T* gradient, int n, float gradient_scale, float shrink, \
        float beta1, float beta2, float step_size, float inverse_root, float eps, float ema_decay) {                   \
        adamw(p, first, second, ema, gradient, n, gradient_scale, shrink, beta1, beta2, step_size, inverse_root, eps,  \
              ema_decay);                                                                                              \
    }                                                                                                                  \
    EXPORTED(adamw_##type)

ELEMENTWISE(float, f32)
ELEMENTWISE(half_t, f16)
ELEMENTWISE(bfloat_t, bf16)
