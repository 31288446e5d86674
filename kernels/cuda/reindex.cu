// Copies chosen rows of many tensors in one launch: reindex.
#include "common.cuh"

#define TENSORS 128

struct Reindex {
  const i64* rows;             // [count] which row of the source each row of the result is
  i64 count, sources;
  int tensors;
  struct { const void* source; void* out; i64 bytes; } table[TENSORS];  // bytes of a row; rows are dense
};

template <typename W> __device__ inline void copy(const void* source, void* out, i64 bytes) {
  const W* __restrict__ from = (const W*)source;
  W* __restrict__ to = (W*)out;
  i64 n = bytes / (i64)sizeof(W);
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) to[i] = from[i];
}

KERNEL(reindex, Reindex, 256) {
#pragma unroll 1
  for (int k = blockIdx.y; k < a.tensors; k += gridDim.y) {
    i64 bytes = a.table[k].bytes;
#pragma unroll 1
    for (i64 i = 0; i < a.count; ++i) {
      i64 row = a.rows[i];
      if (row < 0 || row >= a.sources) __trap();  // as PyTorch's own gathers do
      const char* source = (const char*)a.table[k].source + row * bytes;
      char* out = (char*)a.table[k].out + i * bytes;
      u64 all = (u64)source | (u64)out | (u64)bytes;
      if (all % 16 == 0) copy<Pack<u32, 4>>(source, out, bytes);
      else if (all % 4 == 0) copy<u32>(source, out, bytes);
      else copy<u8>(source, out, bytes);
    }
  }
}
