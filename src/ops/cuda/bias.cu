// The bias of a matrix product's columns. The CPU adds it in the product itself.
#include "device.cuh"

constexpr int BIAS_THREADS = 256;

/// y [.., c] = x + bias [c]. Here c counts Fews; n is their number in all.
template <class T, int N> __device__ inline void add_bias(const T* x, const T* bias, T* y, int n, int c) {
    int i = blockIdx.x * BIAS_THREADS + threadIdx.x;
    if (i >= n) return;
    Few<T, N> few = reinterpret_cast<const Few<T, N>*>(x)[i], more = reinterpret_cast<const Few<T, N>*>(bias)[i % c];
    for (int j = 0; j < N; j++) few.values[j] = from_float<T>(to_float(few.values[j]) + to_float(more.values[j]));
    reinterpret_cast<Few<T, N>*>(y)[i] = few;
}

#define BIAS(T, N, type)                                                                                                \
    extern "C" __global__ void __launch_bounds__(BIAS_THREADS) bias_##type(const T* x, const T* bias, T* y, int n, int c) { \
        add_bias<T, N>(x, bias, y, n, c);                                                                              \
    }                                                                                                                  \
    EXPORTED(bias_##type)

BIAS(float, 1, f32)
BIAS(half_t, 1, f16)
BIAS(bfloat_t, 1, bf16)
BIAS(float, 4, f32_by_4)
BIAS(half_t, 8, f16_by_8)
BIAS(bfloat_t, 8, bf16_by_8)
