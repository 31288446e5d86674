// Sums of |now - before| and of |before| for every sample, and whether their ratio is below a threshold, decided on the device: drift.
// A sample is cut into pieces whose size depends on its own size only: what else is in the batch changes nothing.
#include "common.cuh"

#define TURNS 8

struct Drift {
  const void *now, *before;   // [batch, entries]
  i64 now_stride, before_stride;
  float* sums;                // [batch, 2]
  bool* still;                // [batch]
  float* parts;               // [batch, pieces, 2]
  u32* arrived;               // [batch], zeros before and after
  i64 batch, entries, pieces;
  float threshold;
};

template <typename T, int V> __device__ void drift(const Drift& a, float* scratch, u32* ticket) {
#pragma unroll 1
  for (i64 b = blockIdx.y; b < a.batch; b += gridDim.y) {
    const T *now = (const T*)a.now + b * a.now_stride, *before = (const T*)a.before + b * a.before_stride;
    float change = 0.f, size = 0.f;
#pragma unroll 1
    for (int turn = 0; turn < TURNS; ++turn) {
      i64 c = (((i64)blockIdx.x * TURNS + turn) * blockDim.x + threadIdx.x) * V;
      if (c >= a.entries) break;
      float v[V], w[V];
      load<V>(now + c, v);
      load<V>(before + c, w);
#pragma unroll
      for (int i = 0; i < V; ++i) change += fabsf(v[i] - w[i]), size += fabsf(w[i]);
    }
    change = reduce(change, Sum(), scratch);
    size = reduce(size, Sum(), scratch);
    volatile float* parts = a.parts + b * a.pieces * 2;  // written by other blocks: not to be kept in a cache of this one's
    if (threadIdx.x == 0) {
      parts[blockIdx.x * 2] = change;
      parts[blockIdx.x * 2 + 1] = size;
      __threadfence();
      *ticket = atomicAdd(a.arrived + b, 1u);
    }
    __syncthreads();
    if (*ticket != a.pieces - 1) continue;  // the last piece to arrive adds them up, always in the same order
    __threadfence();
    change = size = 0.f;
#pragma unroll 1
    for (i64 piece = threadIdx.x; piece < a.pieces; piece += blockDim.x) change += parts[piece * 2], size += parts[piece * 2 + 1];
    change = reduce(change, Sum(), scratch);
    size = reduce(size, Sum(), scratch);
    if (threadIdx.x == 0) {
      a.sums[b * 2] = change;
      a.sums[b * 2 + 1] = size;
      float mean = size / (float)a.entries;
      a.still[b] = change / (float)a.entries / (mean < 1e-12f ? 1e-12f : mean) < a.threshold;
      a.arrived[b] = 0;
    }
  }
}

#define DRIFT(T, V)                                        \
  KERNEL(drift_##T##_##V, Drift, 256) {                    \
    __shared__ float scratch[32];                          \
    __shared__ u32 ticket;                                 \
    drift<T, V>(a, scratch, &ticket);                      \
  }
DRIFT(float, 4) DRIFT(float, 1) DRIFT(bf16, 8) DRIFT(bf16, 1) DRIFT(fp16, 8) DRIFT(fp16, 1)
