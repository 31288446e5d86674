// after - before, kept in bf16, or in int8 or fp8 with a scale for every token or every channel: delta_store. And any rows in 8 bits:
// quantise_rows, which is the same with nothing to subtract.
#include "rows.cuh"

struct Store {
  Rows after, before;             // before may be null
  void* values;                   // [batch, tokens, channels], dense
  float* scale;                   // [batch, tokens] or [batch, channels]
  u32* most;                      // by channel: [batch, channels] largest magnitudes, zeros at first
  i64 batch, tokens, channels;
};

template <typename T, int V> __device__ inline void difference(const Store& a, const T* after, const T* before, i64 c, float (&v)[V]) {
  load<V>(after + c, v);
  if (!a.before.data) return;
  float w[V];
  load<V>(before + c, w);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] -= w[i];
}

// Everything once: see(row, b, t, c, v) gets V differences of a row from column c on, and the row's sample and token.
template <typename T, int V, typename See> __device__ inline void each_difference(const Store& a, See see) {
#pragma unroll 1
  EACH_ROW(row, a.batch * a.tokens) {
    i64 b = row / a.tokens, t = row - b * a.tokens;
    const T *after = row_of<T>(a.after, b, t), *before = row_of<T>(a.before, b, t);
#pragma unroll 1
    for (i64 c = ((i64)blockIdx.y * blockDim.x + threadIdx.x) * V; c < a.channels; c += (i64)gridDim.y * blockDim.x * V) {
      float v[V];
      difference<T, V>(a, after, before, c, v);
      see(row, b, t, c, v);
    }
  }
}

template <typename T, int V> __device__ void plain(const Store& a) {
  each_difference<T, V>(a, [&](i64 row, i64, i64, i64 c, float (&v)[V]) { store<V>((bf16*)a.values + row * a.channels + c, v); });
}

template <typename T, typename Q, int V> __device__ void by_token(const Store& a, u32* scratch) {
#pragma unroll 1
  EACH_ROW(row, a.batch * a.tokens) {
    i64 b = row / a.tokens, t = row - b * a.tokens;
    const T *after = row_of<T>(a.after, b, t), *before = row_of<T>(a.before, b, t);
    Held<V> held;
    u32 most = 0;
    auto make = [&](i64 c, float (&v)[V]) { difference<T, V>(a, after, before, c, v); };
    first_walk<V>(held, a.channels, make, [&](i64, float (&v)[V]) {
#pragma unroll
      for (int i = 0; i < V; ++i) most = Most()(most, magnitude(v[i]));
    });
    float scale = scale_of<Q>(reduce(most, Most(), scratch));
    if (threadIdx.x == 0) a.scale[row] = scale;
    Q* values = (Q*)a.values + row * a.channels;
    next_walk<V>(held, a.channels, make, [&](i64 c, float (&v)[V]) {
      quantised<Q, V>(v, scale, values + c);
    });
  }
}

#define PEAK_TOKENS 32

// Pass one of by channel: a thread looks at V channels of some tokens at a time. Blocks in x: pieces of the channels, sample by sample.
template <typename T, int V> __device__ void peaks(const Store& a) {
  i64 across = (a.channels + (i64)blockDim.x * V - 1) / ((i64)blockDim.x * V);
#pragma unroll 1
  for (i64 block = blockIdx.x; block < a.batch * across; block += gridDim.x) {
    i64 b = block / across, c = ((block - b * across) * blockDim.x + threadIdx.x) * V;
    if (c >= a.channels) continue;
    u32 most[V] = {};
#pragma unroll 1
    for (i64 first = (i64)blockIdx.y * PEAK_TOKENS; first < a.tokens; first += (i64)gridDim.y * PEAK_TOKENS) {
      i64 last = first + PEAK_TOKENS < a.tokens ? first + PEAK_TOKENS : a.tokens;
#pragma unroll 2
      for (i64 t = first; t < last; ++t) {
        float v[V];
        difference<T, V>(a, row_of<T>(a.after, b, t), row_of<T>(a.before, b, t), c, v);
#pragma unroll
        for (int i = 0; i < V; ++i) most[i] = Most()(most[i], magnitude(v[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) atomicMax(a.most + b * a.channels + c + i, most[i]);
  }
}

// Pass two.
template <typename T, typename Q, int V> __device__ void by_channel(const Store& a) {
  each_difference<T, V>(a, [&](i64 row, i64 b, i64 t, i64 c, float (&v)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float scale = scale_of<Q>(a.most[b * a.channels + c + i]);
      if (t == 0) a.scale[b * a.channels + c + i] = scale;
      v[i] = on_grid<Q>(v[i], scale);
    }
    store<V>((Q*)a.values + row * a.channels + c, v);
  });
}

#define OF_WIDTH(T, V)                                                                                                       \
  KERNEL(store_plain_##T##_##V, Store, 256) { plain<T, V>(a); }                                                              \
  KERNEL(store_peaks_##T##_##V, Store, 256) { peaks<T, V>(a); }                                                              \
  KERNEL(store_rows_##T##_i8_##V, Store, ROW_THREADS) { __shared__ u32 scratch[32]; by_token<T, i8, V>(a, scratch); }        \
  KERNEL(store_rows_##T##_fp8_##V, Store, ROW_THREADS) { __shared__ u32 scratch[32]; by_token<T, fp8, V>(a, scratch); }      \
  KERNEL(store_columns_##T##_i8_##V, Store, 256) { by_channel<T, i8, V>(a); }                                                \
  KERNEL(store_columns_##T##_fp8_##V, Store, 256) { by_channel<T, fp8, V>(a); }
OF_WIDTH(float, 4) OF_WIDTH(float, 1)
OF_WIDTH(bf16, 8) OF_WIDTH(bf16, 1)
OF_WIDTH(fp16, 8) OF_WIDTH(fp16, 1)
