// The activation of a feed-forward layer and its rows in 8 bits, one scale for each: gelu_quant.
#include "elementary.cuh"
#include "rows.cuh"

struct Gelu {
  Rows x;                      // [batch, tokens, channels], or twice as many: values, then gates
  void* values;                // [batch, tokens, channels], dense
  float* scale;                // [batch, tokens]
  i64 batch, tokens, channels;
  int activation, gated, bits; // activation: see elementary.cuh; bits: 1 int8, 2 fp8
};

template <typename T, int V> __device__ void gelu_quant(const Gelu& a, u32* scratch) {
#pragma unroll 1
  EACH_ROW(row, a.batch * a.tokens) {
    i64 b = row / a.tokens, t = row - b * a.tokens;
    const T* x = row_of<T>(a.x, b, t);
    Held<V> held;
    u32 most = 0;
    auto make = [&](i64 c, float (&v)[V]) {
      float g[V];
      load<V>(x + c + (a.gated ? a.channels : 0), g);
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] = activate(g[i], a.activation);
      if (a.gated) {
        load<V>(x + c, v);
#pragma unroll
        for (int i = 0; i < V; ++i) g[i] = v[i] * g[i];
      }
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = rounded<T>(g[i]);
    };
    first_walk<V>(held, a.channels, make, [&](i64, float (&v)[V]) {
#pragma unroll
      for (int i = 0; i < V; ++i) most = Most()(most, magnitude(v[i]));
    });
    most = reduce(most, Most(), scratch);
    float scale = a.bits == 1 ? scale_of<i8>(most) : scale_of<fp8>(most);
    if (threadIdx.x == 0) a.scale[row] = scale;
    next_walk<V>(held, a.channels, make, [&](i64 c, float (&v)[V]) {
      if (a.bits == 1) quantised<i8, V>(v, scale, (i8*)a.values + row * a.channels + c);
      else quantised<fp8, V>(v, scale, (fp8*)a.values + row * a.channels + c);
    });
  }
}

#define QUANT(T, V) KERNEL(gelu_##T##_##V, Gelu, ROW_THREADS) { __shared__ u32 scratch[32]; gelu_quant<T, V>(a, scratch); }
QUANT(float, 4) QUANT(float, 1) QUANT(bf16, 8) QUANT(bf16, 1) QUANT(fp16, 8) QUANT(fp16, 1)
