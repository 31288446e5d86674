// What stands before and after an int8 product: activations on a grid that was fixed beforehand, and sums of products brought back to
// floats with bias, correction and activation: int8_linear.
#include "elementary.cuh"

struct Grid8 {
  Rows x;                      // [batch, tokens, channels]
  i8* values;                  // dense
  const float *scale, *zero;   // one number each: x is near scale * (value - zero)
  const float* smooth;         // [channels] by which inputs are divided before, or null
  i64 batch, tokens, channels;
};

template <typename T, int V> __device__ void fixed_grid(const Grid8& a) {
  float scale = *a.scale, zero = *a.zero;
  i64 rows = a.batch * a.tokens;
#pragma unroll 1
  for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += (i64)gridDim.x * blockDim.y) {
    i64 b = row / a.tokens, t = row - b * a.tokens;
    const T* x = row_of<T>(a.x, b, t);
#pragma unroll 1
    for (i64 c = ((i64)blockIdx.y * blockDim.x + threadIdx.x) * V; c < a.channels; c += (i64)gridDim.y * blockDim.x * V) {
      float v[V], s[V];
      load<V>(x + c, v);
      if (a.smooth) load_table<V>(a.smooth + c, s);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float q = rintf(v[i] * (1.f / (a.smooth ? scale * s[i] : scale)) + zero);
        v[i] = q != q ? 0.f : fminf(fmaxf(q, -128.f), 127.f);
      }
      store<V>(a.values + row * a.channels + c, v);
    }
  }
}

struct Linear {
  const int* products;                        // [rows, columns], rows `stride` apart
  void* out;                                  // [rows, columns], dense
  const float* row_scale;                     // [rows], or null: then scale and zero are those of all rows
  const float *scale, *zero;
  const float* weight_scale;                  // [columns]
  const int* sums;                            // [columns] of the weight's entries; with zero
  const void* bias;                           // [columns] or null: float32, or of the output's type
  const float *fix_scale, *fix_shift;         // [columns] or null
  i64 rows, columns, stride;
  int bias_is_float, activation;              // activation: see elementary.cuh
};

template <int V> __device__ inline void load_ints(const int* p, int (&v)[V]) {
  constexpr int W = V < 4 ? V : 4;
#pragma unroll
  for (int j = 0; j < V; j += W) {
    Pack<int, W> part = *(const Pack<int, W>*)(p + j);
#pragma unroll
    for (int i = 0; i < W; ++i) v[j + i] = part.e[i];
  }
}

template <typename T, int V> __device__ void dequantise(const Linear& a) {
#pragma unroll 1
  for (i64 c = ((i64)blockIdx.y * blockDim.x + threadIdx.x) * V; c < a.columns; c += (i64)gridDim.y * blockDim.x * V) {
    float scale[V], shift[V], w[V];
    load_table<V>(a.weight_scale + c, scale);
#pragma unroll
    for (int i = 0; i < V; ++i) shift[i] = 0.f;
    if (!a.row_scale) {
      int sums[V];
      load_ints<V>(a.sums + c, sums);
      float s = *a.scale, zero = *a.zero;
#pragma unroll
      for (int i = 0; i < V; ++i) scale[i] = s * scale[i], shift[i] = -scale[i] * zero * (float)sums[i];
    }
    if (a.bias) {
      if (a.bias_is_float) load_table<V>((const float*)a.bias + c, w);
      else load<V>((const T*)a.bias + c, w);
#pragma unroll
      for (int i = 0; i < V; ++i) shift[i] += w[i];
    }
    if (a.fix_scale) {
      load_table<V>(a.fix_scale + c, w);
#pragma unroll
      for (int i = 0; i < V; ++i) scale[i] *= w[i], shift[i] *= w[i];
      load_table<V>(a.fix_shift + c, w);
#pragma unroll
      for (int i = 0; i < V; ++i) shift[i] += w[i];
    }
#pragma unroll 1
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < a.rows; row += (i64)gridDim.x * blockDim.y) {
      int n[V];
      load_ints<V>(a.products + row * a.stride + c, n);
      float r = a.row_scale ? a.row_scale[row] : 1.f;
#pragma unroll
      for (int i = 0; i < V; ++i) w[i] = (float)n[i] * scale[i] * r + shift[i];
      if (a.activation) {
#pragma unroll
        for (int i = 0; i < V; ++i) w[i] = activate(w[i], a.activation);
      }
      store<V>((T*)a.out + row * a.columns + c, w);
    }
  }
}

#define LINEAR(T, V)                                                         \
  KERNEL(grid_##T##_##V, Grid8, 256) { fixed_grid<T, V>(a); }                \
  KERNEL(linear_##T##_##V, Linear, 256) { dequantise<T, V>(a); }
LINEAR(float, 4) LINEAR(float, 1) LINEAR(bf16, 8) LINEAR(bf16, 1) LINEAR(fp16, 8) LINEAR(fp16, 1)
