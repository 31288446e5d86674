// x + correction(sum of weighted offsets), offsets in the stream's type, bf16, int8 or fp8: delta_apply and forecast_apply.
#include "common.cuh"

struct Apply {
  Rows x, offset[3];
  void* out;                             // [batch, tokens, channels], dense
  const float* scale[3];                 // of an offset: [batch, tokens] or [batch, channels]
  const float *fix_scale, *fix_shift;    // [groups, channels] or null
  i64 batch, tokens, channels, group;    // group: samples that share a correction
  float weight[3];
  int terms, scaled;                     // scaled: 0 not, 1 by token, 2 by channel
};

template <typename T, typename D, int V> __device__ void apply(const Apply& a) {
  i64 rows = a.batch * a.tokens;
#pragma unroll 1
  for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += (i64)gridDim.x * blockDim.y) {
    i64 b = row / a.tokens, t = row - b * a.tokens;
    const T* __restrict__ x = row_of<T>(a.x, b, t);
    T* __restrict__ out = (T*)a.out + row * a.channels;
    i64 fix = b / a.group * a.channels;
#pragma unroll 1
    for (i64 c = ((i64)blockIdx.y * blockDim.x + threadIdx.x) * V; c < a.channels; c += (i64)gridDim.y * blockDim.x * V) {
      float v[V], total[V] = {};
      load<V>(x + c, v);
#pragma unroll 1
      for (int k = 0; k < a.terms; ++k) {
        float d[V];
        load<V>(row_of<D>(a.offset[k], b, t) + c, d);
        if (a.scaled == 1) {
          float s = a.scale[k][row];
#pragma unroll
          for (int i = 0; i < V; ++i) d[i] *= s;
        } else if (a.scaled == 2) {
          float s[V];
          load_table<V>(a.scale[k] + b * a.channels + c, s);
#pragma unroll
          for (int i = 0; i < V; ++i) d[i] *= s[i];
        }
#pragma unroll
        for (int i = 0; i < V; ++i) total[i] += a.weight[k] * d[i];
      }
      if (a.fix_scale) {
        float scale[V], shift[V];
        load_table<V>(a.fix_scale + fix + c, scale);
        load_table<V>(a.fix_shift + fix + c, shift);
#pragma unroll
        for (int i = 0; i < V; ++i) total[i] = total[i] * scale[i] + shift[i];
      }
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] += total[i];
      store<V>(out + c, v);
    }
  }
}

#define APPLY(T, D, V) KERNEL(apply_##T##_##D##_##V, Apply, 256) { apply<T, D, V>(a); }
#define BOTH(T, D, V) APPLY(T, D, V) APPLY(T, D, 1)
BOTH(float, float, 4) BOTH(float, bf16, 4) BOTH(float, i8, 4) BOTH(float, fp8, 4)
BOTH(bf16, bf16, 8) BOTH(bf16, i8, 8) BOTH(bf16, fp8, 8)
BOTH(fp16, fp16, 8) BOTH(fp16, bf16, 8) BOTH(fp16, i8, 8) BOTH(fp16, fp8, 8)
