// exp, GELU and SiLU out of operations that round once: hasten.kernels.elementary line by line, equal to the bit.
#pragma once
#include "common.cuh"

__device__ inline float power_of_two(int n) { return as_float((u32)(n + 127) << 23); }

__device__ inline float exp_exact(float x) {
  x = x < -104.f ? -104.f : x > 89.f ? 89.f : x;
  float n = rintf(x * 1.44269504f);
  float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 0.00019857756f;
  p = p * r + 0.00139336172f;
  p = p * r + 0.00833336078f;
  p = p * r + 0.0416664667f;
  p = p * r + 0.166666672f;
  p = p * r + 0.5f;
  if (n != n) return n;
  int power = (int)n, half = power >> 1;
  return (r * r * p + r + 1.f) * power_of_two(half) * power_of_two(power - half);
}

enum { NONE, GELU, GELU_TANH, SILU };

// One e^x serves all three: less code, and a kernel that is compiled sooner.
__device__ inline float activate(float x, int kind) {
  float u = (x * x * x * 0.044715f + x) * 0.7978845608f;
  float e = exp_exact(kind == GELU ? x * x * -0.5f : kind == GELU_TANH ? u * -2.f : -x);
  if (kind != GELU) return x / (e + 1.f);
  float s = 1.f / (0.35f * fabsf(x) + 1.f);
  float p = -0.0291460492f;
  p = p * s + 0.143972263f;
  p = p * s + -0.25571543f;
  p = p * s + 0.159175485f;
  p = p * s + -0.0231107362f;
  p = p * s + 0.10550838f;
  p = p * s + 0.119832776f;
  p = p * s + 0.139861882f;
  p = p * s + 0.139621407f;
  float above = p * s * e;
  return x * (x < 0.f ? above : 1.f - above);
}
