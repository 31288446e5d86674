// Between attention and feed-forward of a DiT block: x = residual + gate * y, then norm(x) * (1 + scale) + shift, in 16 bits or, for the
// next product, in 8 with a scale for every row: gated_residual_adaln.
#include "rows.cuh"

struct Adaln {
  Rows residual, y, gate, scale, shift;  // the last three may be null; a stride of 0 shares them
  const float *weight, *bias;            // of the norm, [channels] or null
  void *x, *out;                         // [batch, tokens, channels], dense; out is of x's type, int8 or fp8
  float* row_scale;                      // [batch, tokens] where out has 8 bits
  i64 batch, tokens, channels;
  float eps;
  int rms, bits;                         // bits: 0 x's type, 1 int8, 2 fp8
};

template <typename T, typename M, int V> __device__ void adaln(const Adaln& a, float* sums, u32* peaks) {
#pragma unroll 1
  EACH_ROW(row, a.batch * a.tokens) {
    i64 b = row / a.tokens, t = row - b * a.tokens;
    const T *residual = row_of<T>(a.residual, b, t), *y = row_of<T>(a.y, b, t);
    const M *gate = row_of<M>(a.gate, b, t), *scale = row_of<M>(a.scale, b, t), *shift = row_of<M>(a.shift, b, t);
    T* x = (T*)a.x + row * a.channels;
    Held<V> held;
    auto join = [&](i64 c, float (&v)[V]) {  // rounded, as everyone else will see it
      float w[V];
      load<V>(y + c, w);
      if (a.gate.data) {
        load<V>(gate + c, v);
#pragma unroll
        for (int i = 0; i < V; ++i) w[i] *= v[i];
      }
      load<V>(residual + c, v);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = rounded<T>(v[i] + w[i]);
    };
    float sum = 0.f;
    first_walk<V>(held, a.channels, join, [&](i64 c, float (&v)[V]) {
      store<V>(x + c, v);
#pragma unroll
      for (int i = 0; i < V; ++i) sum += a.rms ? v[i] * v[i] : v[i];
    });
    float mean = reduce(sum, Sum(), sums) / (float)a.channels, variance = mean;
    if (a.rms) {
      mean = 0.f;
    } else {
      sum = 0.f;
      next_walk<V>(held, a.channels, join, [&](i64, float (&v)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) sum += (v[i] - mean) * (v[i] - mean);
      });
      variance = reduce(sum, Sum(), sums) / (float)a.channels;
    }
    float factor = 1.f / sqrtf(variance + a.eps);
    auto modulate = [&](i64 c, float (&v)[V]) {
      float w[V];
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = (v[i] - mean) * factor;
      if (a.weight) {
        load_table<V>(a.weight + c, w);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] *= w[i];
      }
      if (a.bias) {
        load_table<V>(a.bias + c, w);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] += w[i];
      }
      if (a.scale.data) {
        load<V>(scale + c, w);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] *= 1.f + w[i];
      }
      if (a.shift.data) {
        load<V>(shift + c, w);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] += w[i];
      }
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = rounded<T>(v[i]);
    };
    u32 most = 0;
    next_walk<V>(held, a.channels, join, [&](i64 c, float (&v)[V]) {
      modulate(c, v);
      if (!a.bits) store<V>((T*)a.out + row * a.channels + c, v);
#pragma unroll
      for (int i = 0; i < V; ++i) most = Most()(most, magnitude(v[i]));
    });
    if (!a.bits) continue;
    most = reduce(most, Most(), peaks);
    float s = a.bits == 1 ? scale_of<i8>(most) : scale_of<fp8>(most);
    if (threadIdx.x == 0) a.row_scale[row] = s;
    auto again = [&](i64 c, float (&v)[V]) {
      join(c, v);
      modulate(c, v);
    };
    next_walk<V>(held, a.channels, again, [&](i64 c, float (&v)[V]) {
      if (a.bits == 1) quantised<i8, V>(v, s, (i8*)a.out + row * a.channels + c);
      else quantised<fp8, V>(v, s, (fp8*)a.out + row * a.channels + c);
    });
  }
}

#define ADALN(T, M, V)                                                                  \
  KERNEL_WITH_ROOM(adaln_##T##_##M##_##V, Adaln, ROW_THREADS) {                                   \
    __shared__ float sums[32];                                                          \
    __shared__ u32 peaks[32];                                                           \
    adaln<T, M, V>(a, sums, peaks);                                                     \
  }
#define BOTH(T, M, V) ADALN(T, M, V) ADALN(T, M, 1)
BOTH(float, float, 4) BOTH(bf16, bf16, 8) BOTH(bf16, float, 8) BOTH(fp16, fp16, 8) BOTH(fp16, float, 8)
