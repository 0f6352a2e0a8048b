// What the norms share: sums over rows that thread by thread belong to columns, so that neighbours in memory are read
// together and every sum has one order.
#pragma once

#include "device.cuh"

constexpr int NORM_THREADS = 256;
constexpr int NORM_WARPS = NORM_THREADS / 32;

/// How a block goes through rows of c values: columns by thread, several rows side by side where columns are few.
struct Walk {
    int c, columns, rows, row, column;

    __device__ explicit Walk(int c) : c(c), columns(min(c, NORM_THREADS)), rows(NORM_THREADS / columns) {
        row = threadIdx.x / columns;
        column = threadIdx.x % columns;
    }

    /// f(column) for each of this thread's columns; none for threads that are left over.
    template <class F> __device__ void each_column(F f) const {
        if (row >= rows) return;
        for (int at = column; at < c; at += columns) f(at);
    }

    /// f(row) for each of this thread's rows of 0..n.
    template <class F> __device__ void each_row(int n, F f) const {
        for (int at = row; at < n; at += rows) f(at);
    }
};

/// Σ over this block's rows of first(row, column) and second(row, column), into sums[column] and sums[c + column]. `room`
/// holds 2·rows·c values, the sums come first; ends with a barrier.
template <class F> __device__ inline void column_sums(const Walk& walk, int n, float* room, F both) {
    walk.each_column([&](int column) {
        float first = 0, second = 0;
        walk.each_row(n, [&](int row) { both(row, column, first, second); });
        room[2 * walk.row * walk.c + column] = first;
        room[(2 * walk.row + 1) * walk.c + column] = second;
    });
    __syncthreads();
    for (int column = threadIdx.x; column < 2 * walk.c; column += NORM_THREADS) {
        float sum = room[column];
        for (int row = 1; row < walk.rows; row++) sum += room[2 * row * walk.c + column];
        room[column] = sum;
    }
    __syncthreads();
}

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

__device__ inline float silu(float x) { return x * sigmoid(x); }

__device__ inline float silu_slope(float x) {
    float s = sigmoid(x);
    return s * (1 + x * (1 - s));
}

/// dw = Σ slopes[i][1], db = Σ slopes[i][0] over n rows of 2·c sums.
template <class T> __device__ inline void sum_slopes(const float* slopes, T* dw, T* db, int n, int c) {
    int column = blockIdx.x * NORM_THREADS + threadIdx.x;
    if (column >= c) return;
    float of_bias = 0, of_weight = 0;
#pragma unroll 8
    for (int i = 0; i < n; i++) {
        of_bias += slopes[(size_t)2 * i * c + column];
        of_weight += slopes[((size_t)2 * i + 1) * c + column];
    }
    dw[column] = from_float<T>(of_weight);
    db[column] = from_float<T>(of_bias);
}
