// What a decoding schedule sees of logits, in one pass over the vocabulary, and optionally which positions commit: token_stats.
// A block looks at 8,192 logits of a position; the last block of a row to finish puts the row together, always in the same order.
#include "common.cuh"

#define PIECE 8192
#define THREADS 256
#define SUPPRESSED 32
#define MOST_NOISE 22.9f  // the largest Gumbel number that 32 bits make is 22.87

struct Tokens {
  const void* logits;                     // [rows, width, vocabulary], its entries next to each other
  i64 row_stride, position_stride;
  const i64 *current;                     // [rows, width]
  const bool* active;                     // [rows, width] or null: all
  const i64 *seeds, *positions, *steps;   // [rows], [rows, width], [rows]; null without noise
  i64* ids;                               // [2, rows, width]: chosen tokens, most probable ones
  float* numbers;                         // [9, rows, width]: see `finish`
  bool* commits;                          // [rows, width] or null: nothing is selected
  i64* after;                             // [rows, width], the tokens after the commits
  u32* parts;                             // [rows, width, pieces, 8]
  u32* arrived;                           // [rows], zeros before and after
  i64 rows, width, vocabulary, pieces, mask;
  float divisor, noise, threshold;        // divisor: logits are divided by it; noise: its scale, 0 for none
  int minimum, score, suppressed;         // score: 0 low_confidence, 1 margin, 2 entropy
  i64 suppress[SUPPRESSED];
};

// What is known of some logits.
struct Part {
  float first, second;                    // the largest and the one after
  float sum, weighted;                    // of e^d and of d e^d, d = z - first
  float chosen, noise;                    // logit and noise of the chosen token
  int best, token;
};

__device__ inline Part nothing() { return {-INFINITE, -INFINITE, 0.f, 0.f, -INFINITE, 0.f, -1, -1}; }

__device__ inline float below(float z, float first) { return fmaxf(z - first, -200.f); }  // e^-200 is 0; so is that of what is no number

// Whether the second of two logits with noise is ahead, of equal ones the lower id. Large logits are taken off each other before the
// noise is added, which would be lost in them.
__device__ inline bool ahead(const Part& a, const Part& b) {
  if (b.token < 0 || a.token < 0) return a.token < 0;
  float lead = (b.chosen - a.chosen) + (b.noise - a.noise);
  return lead > 0.f || (lead == 0.f && b.token < a.token);
}

__device__ inline Part joined(const Part& a, const Part& b) {
  Part c = a;
  if (b.first > a.first || (b.first == a.first && b.best >= 0 && (a.best < 0 || b.best < a.best))) c.first = b.first, c.best = b.best;
  c.second = fmaxf(fminf(a.first, b.first), fmaxf(a.second, b.second));
  float da = below(a.first, c.first), db = below(b.first, c.first), ea = expf(da), eb = expf(db);
  c.sum = a.sum * ea + b.sum * eb;
  c.weighted = (a.weighted + da * a.sum) * ea + (b.weighted + db * b.sum) * eb;
  if (ahead(a, b)) c.chosen = b.chosen, c.noise = b.noise, c.token = b.token;
  return c;
}

__device__ inline Part over_warp(Part p) {
#pragma unroll 1
  for (int lane = 16; lane; lane >>= 1) {
    Part q;
    q.first = __shfl_xor_sync(0xffffffffu, p.first, lane);
    q.second = __shfl_xor_sync(0xffffffffu, p.second, lane);
    q.sum = __shfl_xor_sync(0xffffffffu, p.sum, lane);
    q.weighted = __shfl_xor_sync(0xffffffffu, p.weighted, lane);
    q.chosen = __shfl_xor_sync(0xffffffffu, p.chosen, lane);
    q.noise = __shfl_xor_sync(0xffffffffu, p.noise, lane);
    q.best = __shfl_xor_sync(0xffffffffu, p.best, lane);
    q.token = __shfl_xor_sync(0xffffffffu, p.token, lane);
    p = joined(p, q);
  }
  return p;
}

// ---------------------------------------------------------------------------------------------------------- noise

struct Four { u32 x, y, z, w; };
__device__ inline u32 pick(const Four& f, int i) { return i == 0 ? f.x : i == 1 ? f.y : i == 2 ? f.z : f.w; }

// Philox4x32-10 (Salmon et al., SC 2011).
__device__ inline Four philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    u32 h0 = __umulhi(c0, 0xD2511F53u), l0 = c0 * 0xD2511F53u, h1 = __umulhi(c2, 0xCD9E8D57u), l1 = c2 * 0xCD9E8D57u;
    c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

struct Place { u32 position, step, k0, k1; };  // whose noise it is

__device__ inline Place place_of(const Tokens& a, i64 row, i64 at) {
  if (a.noise == 0.f) return {};
  u64 seed = (u64)a.seeds[row];
  return {(u32)a.positions[at], (u32)a.steps[row], (u32)seed, (u32)(seed >> 32)};
}
__device__ inline float gumbel(u32 word) {
  float u = fminf(((float)word + 0.5f) * 2.3283064365386963e-10f, 0.999999940395355224609375f);
  return -logf(-log1pf(-u));
}
__device__ inline float noise_of(const Tokens& a, const Place& p, int token) {
  return gumbel(pick(philox((u32)token >> 2, p.position, p.step, 0u, p.k0, p.k1), token & 3)) * a.noise;
}

// ---------------------------------------------------------------------------------------------------------- one piece

// What is no number is the smallest finite one, infinities are the largest ones.
__device__ inline float clean(const Tokens& a, float z) {
  z = z / a.divisor;
  return z != z ? -LARGEST : fminf(fmaxf(z, -LARGEST), LARGEST);
}

template <int V> __device__ inline void see(const Tokens& a, const Place& place, Part& p, int id, const float (&z)[V]) {
  float before = p.first;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    bool higher = z[i] > p.first;
    p.second = fmaxf(p.second, higher ? p.first : z[i]);
    if (higher) p.first = z[i], p.best = id + i;
  }
  if (p.first > before) {
    float d = below(before, p.first), e = expf(d);
    p.weighted = (p.weighted + d * p.sum) * e;
    p.sum *= e;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float d = below(z[i], p.first), e = expf(d);
    p.sum += e;
    p.weighted = fmaf(e, d, p.weighted);
  }
  if (a.noise == 0.f) return;
#pragma unroll
  for (int j = 0; j < V; j += 4) {
    float most = z[j];
#pragma unroll
    for (int i = 1; i < 4 && i < V; ++i) most = fmaxf(most, z[j + i]);
    // No noise is drawn where even the most of it would not bring one of these ahead.
    if (most == -INFINITE || (p.token >= 0 && (most - p.chosen) + (MOST_NOISE * a.noise - p.noise) <= 0.f)) continue;
    Four words = philox((u32)(id + j) >> 2, place.position, place.step, 0u, place.k0, place.k1);
#pragma unroll
    for (int i = 0; i < 4 && i < V; ++i) {
      u32 word = pick(words, V == 1 ? id & 3 : i);
      Part q = {};
      q.chosen = z[j + i], q.noise = gumbel(word) * a.noise, q.token = id + j + i;
      if (z[j + i] != -INFINITE && ahead(p, q)) p.chosen = q.chosen, p.noise = q.noise, p.token = q.token;
    }
  }
}

template <typename T, int V> __device__ inline Part piece_of(const Tokens& a, const T* logits, const Place& place, int first, int last) {
  Part p = nothing();
  bool any = false;
  for (int s = 0; s < a.suppressed; ++s) any |= a.suppress[s] >= first && a.suppress[s] < last;
#pragma unroll 1
  for (int id = first + threadIdx.x * V; id < last; id += THREADS * V) {
    float z[V];
    load<V>(logits + id, z);
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = clean(a, z[i]);
    if (any) {
      for (int s = 0; s < a.suppressed; ++s) {
#pragma unroll
        for (int i = 0; i < V; ++i) z[i] = a.suppress[s] == id + i ? -INFINITE : z[i];
      }
    }
    see<V>(a, place, p, id, z);
  }
  return p;
}

// ---------------------------------------------------------------------------------------------------------- a row put together

template <typename T> __device__ inline void finish(const Tokens& a, const T* logits, const Place& place, const Part& p, i64 at) {
  i64 all = a.rows * a.width;
  float log_sum = logf(p.sum), p2 = expf((p.second - p.first) - log_sum), entropy = log_sum - p.weighted / p.sum;
  i64 current = a.current[at];
  bool shown = current >= 0 && current < a.vocabulary;
  for (int s = 0; s < a.suppressed; ++s) shown &= a.suppress[s] != current;
  float p_current = shown ? expf((clean(a, to_float(logits[current])) - p.first) - log_sum) : 0.f;
  bool drawn = a.noise != 0.f;
  float log_p = drawn ? (p.chosen - p.first) - log_sum : -log_sum;
  a.ids[at] = drawn ? p.token : p.best;
  a.ids[all + at] = p.best;
  float score = a.score == 0 ? expf(log_p) : a.score == 1 ? expf(-log_sum) - p2 : -entropy;
  float found[9] = {log_p, -log_sum, p2, entropy, p.first + log_sum, p_current,
                    drawn ? p.noise : 0.f, drawn ? noise_of(a, place, p.best) : 0.f, score == score ? score : -LARGEST};
#pragma unroll
  for (int k = 0; k < 9; ++k) a.numbers[k * all + at] = found[k];
}

__device__ inline bool candidate(const Tokens& a, i64 at) { return a.current[at] == a.mask && (!a.active || a.active[at]); }

// Whatever scores at least the threshold, and in any case the `minimum` best, ties to the left.
__device__ inline void select(const Tokens& a, i64 row) {
  const float* score = a.numbers + 8 * a.rows * a.width + row * a.width;
#pragma unroll 1
  for (i64 w = threadIdx.x; w < a.width; w += THREADS) {
    i64 at = row * a.width + w;
    bool commit = false;
    if (candidate(a, at)) {
      i64 place = 0;
#pragma unroll 1
      for (i64 v = 0; v < a.width; ++v)
        place += candidate(a, row * a.width + v) && (score[v] > score[w] || (score[v] == score[w] && v < w));
      commit = score[w] >= a.threshold || place < a.minimum;
    }
    a.commits[at] = commit;
    a.after[at] = commit ? a.ids[at] : a.current[at];
  }
}

template <typename T, int V> __device__ void tokens(const Tokens& a, Part* warps, u32* ticket) {
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll 1
  for (i64 block = blockIdx.x; block < a.rows * a.width * a.pieces; block += gridDim.x) {
    i64 at = block / a.pieces, piece = block - at * a.pieces, row = at / a.width;
    const T* logits = (const T*)a.logits + row * a.row_stride + (at - row * a.width) * a.position_stride;
    int first = (int)(piece * PIECE), last = (int)(a.vocabulary - first < PIECE ? a.vocabulary : first + PIECE);
    Part p = over_warp(piece_of<T, V>(a, logits, place_of(a, row, at), first, last));
    __syncthreads();  // of the block before, all is read
    if (lane == 0) warps[warp] = p;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < THREADS / 32; ++i) p = joined(p, warps[i]);
      volatile u32* part = a.parts + block * 8;
      const float f[6] = {p.first, p.second, p.sum, p.weighted, p.chosen, p.noise};
#pragma unroll
      for (int k = 0; k < 6; ++k) part[k] = as_bits(f[k]);
      part[6] = (u32)p.best, part[7] = (u32)p.token;
      __threadfence();
      *ticket = atomicAdd(a.arrived + row, 1u);
    }
    __syncthreads();
    if (*ticket != a.width * a.pieces - 1) continue;
    __threadfence();
#pragma unroll 1
    for (i64 w = warp; w < a.width; w += THREADS / 32) {
      i64 whole = row * a.width + w;
      p = nothing();
#pragma unroll 1
      for (i64 i = lane; i < a.pieces; i += 32) {
        const volatile u32* part = a.parts + (whole * a.pieces + i) * 8;  // written by other blocks: not from this one's cache
        p = joined(p, {as_float(part[0]), as_float(part[1]), as_float(part[2]), as_float(part[3]), as_float(part[4]), as_float(part[5]),
                       (int)part[6], (int)part[7]});
      }
      p = over_warp(p);
      if (lane == 0) finish<T>(a, (const T*)a.logits + row * a.row_stride + w * a.position_stride, place_of(a, row, whole), p, whole);
    }
    __syncthreads();
    if (a.commits) select(a, row);
    if (threadIdx.x == 0) a.arrived[row] = 0;
  }
}

#define TOKENS(T, V)                                     \
  KERNEL(tokens_##T##_##V, Tokens, THREADS) {            \
    __shared__ Part warps[THREADS / 32];                 \
    __shared__ u32 ticket;                               \
    tokens<T, V>(a, warps, &ticket);                     \
  }
TOKENS(float, 4) TOKENS(float, 1) TOKENS(bf16, 8) TOKENS(bf16, 1) TOKENS(fp16, 8) TOKENS(fp16, 1)
