// A stand-in for the few entry points of libcuda that a launch goes through; kernels run on the CPU as cuda_on_cpu.h says.
#include "cuda_on_cpu.h"

#include <ucontext.h>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {
enum State { RUNS, AT_SHUFFLE, AT_BARRIER, DONE };
constexpr size_t STACK = 1 << 16;
struct Fiber : Thread {
  ucontext_t context;
  jmp_buf jump;
  State state;
  bool entered, second;
  char* stack;
  void* fake;
};

Thread* thread;
dim3 block_index, block_size, grid_size;
static Fiber fibers[1024];
static uint64_t words[1024][2];
static Kernel* kernels;
static Kernel* running;
static const void* arguments;
static char error[256];
static unsigned order;
#ifdef __SANITIZE_ADDRESS__
static ucontext_t main_context;
static void* main_fake;
static const void* main_stack;
static size_t main_size;
#else
static jmp_buf main_jump;
extern "C" char __start_cuda_shared[] __attribute__((weak)), __stop_cuda_shared[] __attribute__((weak));
#endif

void enter(Kernel* kernel) { kernel->next = kernels; kernels = kernel; }

// A plain jump does without the system call of swapcontext, but the sanitizer follows the latter only.
static void leave(Fiber& f) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&f.fake, main_stack, main_size);
  swapcontext(&f.context, &main_context);
  __sanitizer_finish_switch_fiber(f.fake, nullptr, nullptr);
#else
  if (!_setjmp(f.jump)) _longjmp(main_jump, 1);
#endif
}

static void body() {
  Fiber& f = *(Fiber*)thread;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_size);
#endif
  for (;;) {
    running->call(running->function, arguments);
    f.state = DONE;
    leave(f);
  }
}

static void go_on(Fiber& f) {
  thread = &f;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&main_fake, f.stack, STACK);
#endif
  if (!f.entered) {
    if (!f.stack) f.stack = (char*)malloc(STACK);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, body, 0);
    f.entered = true;
#ifndef __SANITIZE_ADDRESS__
    if (!_setjmp(main_jump)) setcontext(&f.context);
    return;
#endif
  }
#ifdef __SANITIZE_ADDRESS__
  swapcontext(&main_context, &f.context);
  __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#else
  if (!_setjmp(main_jump)) _longjmp(f.jump, 1);
#endif
}

void barrier() {
  Fiber& f = *(Fiber*)thread;
  f.state = AT_BARRIER;
  leave(f);
}

uint64_t exchange(uint64_t value, unsigned lane) {
  Fiber& f = *(Fiber*)thread;
  bool second = f.second;  // two slots in turn: a fast lane may be at its next shuffle while a slow one reads this one's
  f.second = !second;
  unsigned first = f.warp * 32;
  words[first + f.lane][second] = value;
  f.state = AT_SHUFFLE;
  leave(f);
  return words[first + lane][second];
}

void fail(const char* why) {
  snprintf(error, sizeof error, "%s in %s, block (%u, %u), thread (%u, %u)", why, running->name, block_index.x, block_index.y,
           thread->id.x, thread->id.y);
  Fiber& f = *(Fiber*)thread;
  f.entered = false;  // this fiber is not gone back to
  leave(f);
  abort();
}

static bool run_block() {
  unsigned n = block_size.x * block_size.y * block_size.z;
#ifndef __SANITIZE_ADDRESS__
  if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
#endif
  for (unsigned i = 0; i < n; ++i) {
    Fiber& f = fibers[i];
    f.id = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    f.lane = i & 31, f.warp = i >> 5, f.state = RUNS, f.second = false;
  }
  for (;;) {
    unsigned done = 0, waiting = 0;
    for (unsigned w = 0; w * 32 < n; ++w) {
      unsigned warp = order & 1 ? (n - 1) / 32 - w : w, first = warp * 32, last = first + 32 < n ? first + 32 : n, shuffling;
      do {
        shuffling = 0;
        for (unsigned i = first; i < last; ++i) {
          Fiber& f = fibers[order & 1 ? first + last - 1 - i : i];
          if (f.state == RUNS) go_on(f);
          if (*error) return false;
          shuffling += f.state == AT_SHUFFLE;
        }
        if (shuffling && shuffling < 32) {
          snprintf(error, sizeof error, "%u of 32 threads of a warp reach a shuffle of %s", shuffling, running->name);
          return false;
        }
        for (unsigned i = first; shuffling && i < last; ++i) fibers[i].state = RUNS;
      } while (shuffling);
      for (unsigned i = first; i < last; ++i) done += fibers[i].state == DONE, waiting += fibers[i].state == AT_BARRIER;
    }
    if (done == n) return true;
    if (done) {
      snprintf(error, sizeof error, "%u of %u threads never reach a barrier of %s", done, n, running->name);
      return false;
    }
    for (unsigned i = 0; waiting && i < n; ++i) fibers[i].state = RUNS;
  }
}

static int launch(Kernel* kernel, dim3 grid, dim3 block, const void* args) {
  running = kernel, arguments = args, grid_size = grid, block_size = block, *error = 0;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned i = 0; i < grid.x; ++i) {
      block_index = {order & 2 ? grid.x - 1 - i : i, y, 0};
      if (!run_block()) {
        for (Fiber& f : fibers) f.entered = false;
        return 719;  // CUDA_ERROR_LAUNCH_FAILED
      }
    }
  return 0;
}
}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;
extern "C" {
// Threads backwards (1), blocks backwards (2), or both (3).
void shim_order(unsigned which) { order = which; }
const char* shim_error() { return error; }
size_t shim_size(const char* name) {
  for (Kernel* k = kernels; k; k = k->next)
    if (!strcmp(k->name, name)) return k->size;
  return 0;
}
const char* shim_name(unsigned index) {
  Kernel* k = kernels;
  while (k && index--) k = k->next;
  return k ? k->name : nullptr;
}

// A thread has no context until it is given one, as on a GPU.
static thread_local void* context;
static int retained;
int shim_retained() { return retained; }
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int ordinal) { return ordinal == 7 ? 101 : (*device = ordinal, 0); }
int cuDevicePrimaryCtxRetain(void** made, int) { return ++retained, *made = (void*)1, 0; }
int cuCtxSetCurrent(void* given) { return context = given, 0; }
int cuGetErrorString(int code, const char** text) {
  *text = code == 1 ? "invalid argument" : code == 201 ? "invalid device context" : code == 200 ? "device kernel image is invalid" : code == 500 ? "named symbol not found" : error;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  if (!context) return 201;
  if (memcmp(image, "\x7f""ELF", 4)) return 200;
  *module = (void*)1;
  return 0;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void*, const char* name) {
  for (Kernel* k = kernels; k; k = k->next)
    if (!strcmp(k->name, name)) return *function = k, 0;
  return 500;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void*,
                   void** params, void** extra) {
  if (!context) return 201;
  Kernel* kernel = (Kernel*)function;
  unsigned long long threads = (unsigned long long)bx * by * bz;
  if (!threads || threads > kernel->threads || !gx || gx > 0x7fffffffu || !gy || gy > 65535 || gz != 1 || bz != 1 || shared || extra) return 1;
  return launch(kernel, {gx, gy, gz}, {bx, by, bz}, params[0]);
}
}
