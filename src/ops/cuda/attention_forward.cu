// The forward pass of attention for each head width and number format.
#include "attention.cuh"

#define FORWARD(T, type, D)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_forward_##type##_##D(                             \
        const T* q, const T* k, const T* v, const float* bias, T* out, float* lse, int l, int s, int heads, int groups, \
        int is_causal, float scale) {                                                                                 \
        attention_forward<T, D>(q, k, v, bias, out, lse, {l, s, heads, groups, is_causal != 0, scale});               \
    }                                                                                                                 \
    EXPORTED(attention_forward_##type##_##D)

#define FORWARDS(D) FORWARD(float, f32, D) FORWARD(half_t, f16, D) FORWARD(bfloat_t, bf16, D)

FORWARDS(32)
FORWARDS(40)
FORWARDS(64)
FORWARDS(80)
FORWARDS(128)
FORWARDS(160)
