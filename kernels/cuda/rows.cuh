// Rows that are walked over more than once: blockDim.x threads share a row (one warp for each row where they are 32, else one block), and
// each keeps the first entries that it computes in registers. What does not fit is computed again.
#pragma once
#include "common.cuh"

#define ROW_THREADS 512

template <int V> struct Held {
  static const int N = V == 1 ? 4 : 16 / V;
  float v[N][V];
};

// make(c, v) computes the V entries from column c on; see(c, v) looks at them, may change them, and is not told again where they are held.
template <int V, typename Make, typename See> __device__ inline void first_walk(Held<V>& held, i64 channels, Make make, See see) {
#pragma unroll
  for (int k = 0; k < Held<V>::N; ++k) {
    i64 c = ((i64)k * blockDim.x + threadIdx.x) * V;
    if (c < channels) {
      make(c, held.v[k]);
      see(c, held.v[k]);
    }
  }
#pragma unroll 1
  for (i64 c = ((i64)Held<V>::N * blockDim.x + threadIdx.x) * V; c < channels; c += (i64)blockDim.x * V) {
    float v[V];
    make(c, v);
    see(c, v);
  }
}
template <int V, typename Make, typename See> __device__ inline void next_walk(Held<V>& held, i64 channels, Make make, See see) {
#pragma unroll
  for (int k = 0; k < Held<V>::N; ++k) {
    i64 c = ((i64)k * blockDim.x + threadIdx.x) * V;
    if (c < channels) see(c, held.v[k]);
  }
#pragma unroll 1
  for (i64 c = ((i64)Held<V>::N * blockDim.x + threadIdx.x) * V; c < channels; c += (i64)blockDim.x * V) {
    float v[V];
    make(c, v);
    see(c, v);
  }
}

#define EACH_ROW(row, rows)                                                                                      \
  for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < (rows); row += (i64)gridDim.x * blockDim.y)
