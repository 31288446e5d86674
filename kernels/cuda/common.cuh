// What every kernel shares: element types, 16-byte accesses, reductions. No header of CUDA's is needed, so that NVRTC finds all it reads.
// Each operation rounds once (compiled with --fmad=false; fmaf is written where a fused one is meant): numbers agree with PyTorch's.
#pragma once

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef signed char i8;
struct bf16 { u16 bits; };
struct fp16 { u16 bits; };
struct fp8 { u8 bits; };  // e4m3, no infinities

#ifndef CUDA_ON_CPU
// Every kernel takes one struct, which the launcher fills; it stays in constant memory. 64 registers, or 128 where a kernel needs ROOM.
#define KERNEL(name, Args, threads) extern "C" __global__ void __launch_bounds__(threads, 1024 / threads) name(const __grid_constant__ Args a)
#define KERNEL_WITH_ROOM(name, Args, threads) extern "C" __global__ void __launch_bounds__(threads, 512 / threads) name(const __grid_constant__ Args a)
__device__ inline float as_float(u32 u) { return __uint_as_float(u); }
__device__ inline u32 as_bits(float f) { return __float_as_uint(f); }
__device__ inline float half_to_float(u16 u) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(u)); return f; }
__device__ inline u16 float_to_half(float f) { u16 u; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(u) : "f"(f)); return u; }
#endif

#define INFINITE as_float(0x7f800000u)
#define LARGEST as_float(0x7f7fffffu)

// ---------------------------------------------------------------------------------------------------------- numbers

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bf16 v) { return as_float((u32)v.bits << 16); }
__device__ inline float to_float(fp16 v) { return half_to_float(v.bits); }
__device__ inline float to_float(i8 v) { return (float)v; }
__device__ inline float to_float(fp8 v) {
  // The same bits stand for 2^-8 of the value in a half, whose exponent is biased by 15 and not by 7.
  float f = half_to_float((u16)((v.bits & 0x80u) << 8 | (v.bits & 0x7fu) << 7)) * 256.f;
  return (v.bits & 0x7fu) == 0x7fu ? as_float(0x7fc00000u) : f;
}

__device__ inline void from_float(float f, float& v) { v = f; }
__device__ inline void from_float(float f, bf16& v) {
  u32 u = as_bits(f);
  v.bits = f != f ? 0x7fc0 : (u16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
__device__ inline void from_float(float f, fp16& v) { v.bits = float_to_half(f); }
// Whole numbers from -128 to 127, and values of at most 448: whoever quantises clamps first.
__device__ inline void from_float(float f, i8& v) { v = (i8)(int)f; }
__device__ inline void from_float(float f, fp8& v) {
  u32 u = as_bits(f), magnitude = u & 0x7fffffffu;
  u32 code;
  if (magnitude < 0x3c800000u) {                            // below 2^-6: subnormal, units of 2^-9
    code = (u32)rintf(as_float(magnitude) * 512.f);
  } else {
    code = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u) - 0x3c000000u) >> 20;
  }
  v.bits = (u8)(code | ((u >> 24) & 0x80u));
}

template <typename T> __device__ inline float rounded(float f) { T v; from_float(f, v); return to_float(v); }

// ---------------------------------------------------------------------------------------------------------- memory

template <typename T, int V> struct alignas(sizeof(T) * V) Pack { T e[V]; };

template <int V, typename T> __device__ inline void load(const T* p, float (&v)[V]) {
  Pack<T, V> pack = *(const Pack<T, V>*)p;
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = to_float(pack.e[i]);
}
template <int V, typename T> __device__ inline void store(T* p, const float (&v)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) from_float(v[i], pack.e[i]);
  *(Pack<T, V>*)p = pack;
}

// Of a float32 table of which a vector takes more than 16 bytes.
template <int V> __device__ inline void load_table(const float* p, float (&v)[V]) {
  constexpr int W = V < 4 ? V : 4;
#pragma unroll
  for (int j = 0; j < V; j += W) {
    float part[W];
    load<W>(p + j, part);
#pragma unroll
    for (int i = 0; i < W; ++i) v[j + i] = part[i];
  }
}

// A tensor [batch, tokens, channels] whose channels lie next to each other; strides in elements.
struct Rows {
  const void* data;
  i64 batch, token;
};
template <typename T> __device__ inline const T* row_of(const Rows& rows, i64 b, i64 t) {
  return (const T*)rows.data + b * rows.batch + t * rows.token;
}

// ---------------------------------------------------------------------------------------------------------- reductions

struct Sum { __device__ float operator()(float a, float b) const { return a + b; } };
// Of magnitudes, as bits: their order is that of the numbers, and what is not a number beats all.
struct Most { __device__ u32 operator()(u32 a, u32 b) const { return a > b ? a : b; } };

__device__ inline u32 magnitude(float f) { return as_bits(f) & 0x7fffffffu; }

// Over the blockDim.x threads of a row, in an order that depends on nothing else; every thread gets the result. blockDim.x is a
// multiple of 32; a block of several rows (blockDim.y) has one warp for each. `scratch` has 32 entries.
template <typename F, typename T> __device__ inline T reduce(T v, F f, T* scratch) {
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) v = f(v, __shfl_xor_sync(0xffffffffu, v, lane));
  if (blockDim.x == 32) return v;
  int warps = blockDim.x >> 5;
  __syncthreads();  // whoever reads the scratch of the last call is done
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  v = scratch[0];
  for (int i = 1; i < warps; ++i) v = f(v, scratch[i]);
  return v;
}

// ---------------------------------------------------------------------------------------------------------- quantisation

// The scale of a row whose largest magnitude is known; not finite where the row is not.
template <typename Q> struct Grid;
template <> struct Grid<i8> { static __device__ float most() { return 127.f; } };
template <> struct Grid<fp8> { static __device__ float most() { return 448.f; } };
template <typename Q> __device__ inline float scale_of(u32 most) {
  float s = as_float(most) / Grid<Q>::most();
  return s < 1e-12f ? 1e-12f : s;
}
// What is not a number becomes 0: the scale tells of it.
template <typename Q> __device__ inline float on_grid(float v, float scale);
template <> __device__ inline float on_grid<i8>(float v, float scale) {
  float q = rintf(v / scale);
  return q != q ? 0.f : fminf(fmaxf(q, -127.f), 127.f);
}
template <> __device__ inline float on_grid<fp8>(float v, float scale) {
  float q = v / scale;
  return q != q ? 0.f : fminf(fmaxf(q, -448.f), 448.f);
}
template <typename Q, int V> __device__ inline void quantised(const float (&v)[V], float scale, Q* p) {
  float q[V];
#pragma unroll
  for (int i = 0; i < V; ++i) q[i] = on_grid<Q>(v[i], scale);
  store<V>(p, q);
}
