// The gradients of attention for each head width and number format.
#include "attention.cuh"

#define BACKWARD(T, type, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_dot_##type##_##D(                                 \
        const T* out, const T* dout, float* dot, int l, int heads, int n) {                                           \
        attention_dot<T, D>(out, dout, dot, l, heads, n);                                                             \
    }                                                                                                                 \
    EXPORTED(attention_dot_##type##_##D)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_dq_##type##_##D(                                  \
        const T* q, const T* k, const T* v, const float* bias, const T* dout, const float* lse, const float* dot, T* dq, \
        int l, int s, int heads, int groups, int is_causal, float scale) {                                            \
        attention_dq<T, D>(q, k, v, bias, dout, lse, dot, dq, {l, s, heads, groups, is_causal != 0, scale});          \
    }                                                                                                                 \
    EXPORTED(attention_dq_##type##_##D)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_dkv_##type##_##D(                                 \
        const T* q, const T* k, const T* v, const float* bias, const T* dout, const float* lse, const float* dot, T* dk, \
        T* dv, int l, int s, int heads, int groups, int is_causal, float scale) {                                     \
        attention_dkv<T, D>(q, k, v, bias, dout, lse, dot, dk, dv, {l, s, heads, groups, is_causal != 0, scale});     \
    }                                                                                                                 \
    EXPORTED(attention_dkv_##type##_##D)

#define BACKWARDS(D) BACKWARD(float, f32, D) BACKWARD(half_t, f16, D) BACKWARD(bfloat_t, bf16, D)

BACKWARDS(32)
BACKWARDS(40)
BACKWARDS(64)
BACKWARDS(80)
BACKWARDS(128)
BACKWARDS(160)
