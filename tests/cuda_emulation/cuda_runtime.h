// Enough of CUDA to run the CUDA sources on a CPU, in tests, where there is no GPU: it checks what kernels compute, not
// how fast.
//
// Blocks run one after the other. The threads of a block are fibers, switched only where they wait for one another
// (__syncthreads, __syncwarp, shuffles), so a missing barrier shows as a wrong result: a thread runs on to its next
// wait before the others move at all. Blocks come in random order, and each takes its threads in another one, half of
// them warp by warp, so that what depends on an order differs from run to run.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

// The tensors of the emulated ops are on the CPU.
#define is_cuda is_cpu
#define DeviceGuard EmulatedDeviceGuard

namespace emulation {

inline int guards;  // that are alive

// What CUDA does to the current device is done to the wrong one of several where no guard has made it that of the
// tensors.
inline void check_guarded(const char* call) {
  if (guards == 0) throw std::runtime_error(std::string(call) + " outside of a DeviceGuard");
}

}  // namespace emulation

using cudaStream_t = void*;
using cudaError_t = int;
inline cudaError_t cudaGetLastError() { return 0; }
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline void cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  emulation::check_guarded("cudaStreamIsCapturing");
  *status = cudaStreamCaptureStatusNone;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline void cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  emulation::check_guarded("cudaMemcpyAsync");
  std::memcpy(to, from, bytes);
}
inline void cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  emulation::check_guarded("cudaMemsetAsync");
  std::memset(p, value, bytes);
}
inline void cudaStreamSynchronize(cudaStream_t) { emulation::check_guarded("cudaStreamSynchronize"); }
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

namespace torch::stable::accelerator {
struct EmulatedDeviceGuard {
  explicit EmulatedDeviceGuard(int32_t) { ++emulation::guards; }
  EmulatedDeviceGuard(const EmulatedDeviceGuard&) = delete;
  ~EmulatedDeviceGuard() { --emulation::guards; }
};
}  // namespace torch::stable::accelerator

struct alignas(16) int4 {
  int x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx{0}, blockIdx{0}, blockDim{1}, gridDim{1};

using std::max;
using std::min;

template <class T>
T atomicAdd(T* p, T x) {
  const T old = *p;
  *p += x;
  return old;
}

inline int atomicMax(int* p, int x) {
  const int old = *p;
  *p = max(old, x);
  return old;
}
inline unsigned atomicOr(unsigned* p, unsigned x) {
  const unsigned old = *p;
  *p |= x;
  return old;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

namespace emulation {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kWarp = 32;

// Threads that wait for one another: all of a block, or of a warp. A thread that has returned counts as arrived.
struct Barrier {
  int members = 0, arrived = 0, generation = 0;
  void arrive() {
    if (++arrived >= members) release();
  }
  void leave() {
    --members;
    if (members > 0 && arrived >= members) release();
  }
  void release() {
    arrived = 0;
    ++generation;
  }
};

// Where to go on: frame, address and stack. Switching is most of what the emulation does, and GCC's own setjmp needs
// for it neither a system call nor the C library.
using Place = void* [5];

struct Fiber {
  Place where;
  std::unique_ptr<char[]> stack;  // from when it is first entered
  const Barrier* barrier;         // that it waits at, while the barrier is in this generation; or null
  int generation;
  bool done;
  bool waits() const { return done || (barrier != nullptr && barrier->generation == generation); }
};

inline Place scheduler;
inline Fiber fibers[1024];
inline std::vector<Barrier> warps;
inline Barrier block;
inline unsigned current, step;  // the thread whose turn it is, and by how much the next one's number is larger
inline bool warps_run_ahead;    // of the others: before them comes the rest of the warp
inline std::mt19937 order;
inline const std::function<void()>* body;
inline std::vector<char> shared_memory;
inline size_t shared_limit = 48 << 10;  // of the next launch
inline uint64_t exchanged[2][1024];

inline char* dynamic_shared() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared_memory.data()) + 15) / 16 * 16);
}

void run_fiber();

// Never inlined: __builtin_longjmp must not be in the function of the __builtin_setjmp.
[[gnu::noinline]] inline void enter(unsigned thread) {
  current = thread;
  threadIdx = dim3(thread);
  Fiber& fiber = fibers[thread];
  if (fiber.stack != nullptr) __builtin_longjmp(fiber.where, 1);
  fiber.stack.reset(new char[kStackBytes]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

[[gnu::noinline]] inline void leave_block() {
  if (block.members > 0) {
    std::fprintf(stderr, "emulated launch: %d threads wait for one another for ever\n", block.members);
    std::abort();
  }
  __builtin_longjmp(scheduler, 1);
}

// The next thread, in turn, that need not wait; the current one if all must.
inline unsigned next_ready() {
  if (warps_run_ahead)
    for (unsigned k = 1; k < kWarp; ++k) {
      const unsigned thread = current / kWarp * kWarp + (current + k * step) % kWarp;
      if (thread < blockDim.x && !fibers[thread].waits()) return thread;
    }
  unsigned thread = current;
  do thread = (thread + step) % blockDim.x;
  while (thread != current && fibers[thread].waits());
  return thread;
}

// To the next thread; returns when it is this one's turn again.
[[gnu::noinline]] inline void next_thread() {
  const unsigned next = next_ready();
  if (__builtin_setjmp(fibers[current].where) == 0) {
    if (fibers[next].waits()) leave_block();
    enter(next);
  }
}

inline void run_fiber() {
  for (;;) {
    (*body)();
    fibers[current].done = true;
    warps[current / kWarp].leave();
    block.leave();
    next_thread();
  }
}

inline void wait(Barrier& barrier) {
  Fiber& fiber = fibers[current];
  fiber.barrier = &barrier;
  fiber.generation = barrier.generation;
  barrier.arrive();
  if (fiber.waits()) next_thread();
}

[[gnu::noinline]] inline void run_block() {
  // A step that has no factor in common with the number of threads leads to all of them.
  do step = 1 + order() % blockDim.x;
  while (std::gcd(step, blockDim.x) != 1);
  warps_run_ahead = order() % 2;
  if (__builtin_setjmp(scheduler) == 0) enter(order() % blockDim.x);
}

inline void launch(dim3 grid, unsigned threads, size_t shared, cudaStream_t, const std::function<void()>& kernel) {
  check_guarded("a launch");
  // Poisoned, as nothing may rely on what shared memory holds at first.
  shared_memory.assign(shared + 16, static_cast<char>(0xcd));
  if (shared > shared_limit || threads > 1024 || grid.y > 65535) {
    std::fprintf(stderr, "emulated launch: %zu bytes of shared memory, %u threads, %u blocks in y\n", shared, threads,
                 grid.y);
    std::abort();
  }
  shared_limit = 48 << 10;
  body = &kernel;
  blockDim = dim3(threads);
  gridDim = grid;
  std::vector<unsigned> blocks(size_t{grid.x} * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (const unsigned i : blocks) {
    blockIdx = dim3(i % grid.x, i / grid.x);
    block = {static_cast<int>(threads)};
    warps.assign((threads + kWarp - 1) / kWarp, {});
    for (unsigned t = 0; t < threads; ++t) {
      ++warps[t / kWarp].members;
      fibers[t].barrier = nullptr;
      fibers[t].done = false;
    }
    run_block();
  }
}

// What each lane of the warp gave, as long as the caller does not wait again.
template <class T>
const uint64_t* exchange(T x) {
  const unsigned warp = current / kWarp;
  // Two places in turn: who writes one again has waited for all to have read it, at the exchange between.
  uint64_t* places = exchanged[warps[warp].generation % 2];
  std::memcpy(&places[current], &x, sizeof(T));
  wait(warps[warp]);
  return &places[warp * kWarp];
}

template <class T>
T shuffle(T x, int from_lane) {
  const uint64_t* given = exchange(x);
  T got;
  std::memcpy(&got, &given[from_lane], sizeof(T));
  return got;
}

}  // namespace emulation

template <class Kernel>
void cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  emulation::check_guarded("cudaFuncSetAttribute");
  emulation::shared_limit = min<size_t>(bytes, 163 << 10);  // what sm_80 has
}

inline void __syncthreads() { emulation::wait(emulation::block); }
inline void __syncwarp() { emulation::wait(emulation::warps[emulation::current / emulation::kWarp]); }
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulation::shuffle(x, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulation::shuffle(x, static_cast<int>(emulation::current % emulation::kWarp) ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool wanted) {
  const uint64_t* given = emulation::exchange(uint64_t{wanted});
  unsigned bits = 0;
  for (int lane = 0; lane < emulation::kWarp; ++lane) bits |= static_cast<unsigned>(given[lane]) << lane;
  return bits;
}
