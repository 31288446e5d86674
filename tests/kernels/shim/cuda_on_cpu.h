// Runs the kernels' CUDA C++ on the CPU: included in front of a .cu file that g++ compiles.
//
// Every CUDA thread of a block is a fiber, so barriers and warp shuffles work as they stand. What a GPU would forgive or hide is an error
// here: a barrier that some threads do not reach, a shuffle without the whole warp, a block larger than the launch bounds. Shared memory
// holds garbage when a block begins, and threads run in an order that the caller chooses: a missing barrier gives other numbers.
// Tensor cores and asynchronous copies are unknown.
#pragma once
#define CUDA_ON_CPU 1
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

struct dim3 { unsigned x, y, z; };

namespace cuda_on_cpu {
struct Thread { dim3 id; unsigned lane, warp; };
extern Thread* thread;                       // the one that runs
extern dim3 block_index, block_size, grid_size;
void barrier();                              // of the block
uint64_t exchange(uint64_t value, unsigned lane);  // what that lane of the warp put in; a barrier of the warp
[[noreturn]] void fail(const char* why);     // ends the launch with an error

struct Kernel {                              // one of the table by which the driver finds kernels
  const char* name;
  void (*call)(const void* function, const void* args);
  const void* function;
  size_t size;
  unsigned threads;
  Kernel* next;
};
void enter(Kernel*);
template <typename Args> struct Entry : Kernel {
  static void run(const void* function, const void* args) { ((void (*)(const Args))function)(*(const Args*)args); }
  Entry(const char* name, void (*f)(const Args), unsigned threads)
      : Kernel{name, run, (const void*)f, sizeof(Args), threads, nullptr} { enter(this); }
};
}  // namespace cuda_on_cpu

#define KERNEL(name, Args, threads)                                              \
  extern "C" void name(const Args a);                                            \
  static cuda_on_cpu::Entry<Args> entry_of_##name(#name, name, threads);         \
  extern "C" void name(const Args a)
#define KERNEL_WITH_ROOM KERNEL
#define __device__
#define __forceinline__ inline
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static                    // the sanitizer leaves named sections alone
#else
#define __shared__ static __attribute__((section("cuda_shared")))
#endif

#define threadIdx (cuda_on_cpu::thread->id)
#define blockIdx (cuda_on_cpu::block_index)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)
#define __syncthreads() cuda_on_cpu::barrier()
#define __threadfence() ((void)0)
#define __trap() cuda_on_cpu::fail("trap")

template <typename T> T __shfl_sync(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  if (mask != 0xffffffffu) cuda_on_cpu::fail("shuffles need the whole warp");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  word = cuda_on_cpu::exchange(word, lane & 31);
  memcpy(&value, &word, sizeof(T));
  return value;
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, cuda_on_cpu::thread->lane ^ bits);
}
// Threads run one after another: nothing comes in between.
inline unsigned atomicMax(unsigned* p, unsigned v) { unsigned old = *p; *p = v > old ? v : old; return old; }
inline unsigned atomicAdd(unsigned* p, unsigned v) { unsigned old = *p; *p = old + v; return old; }

inline float as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline float half_to_float(uint16_t u) { _Float16 h; memcpy(&h, &u, 2); return (float)h; }
inline uint16_t float_to_half(float f) { _Float16 h = (_Float16)f; uint16_t u; memcpy(&u, &h, 2); return u; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
