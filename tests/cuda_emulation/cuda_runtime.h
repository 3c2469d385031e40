// The parts of CUDA that the CUDA sources need to run on a CPU, for tests on machines without a GPU. The emulation
// checks what kernels compute, not how fast they are.
//
// Blocks run one after another, in random order. The threads of a block are fibers, and a running thread is interrupted
// only where it waits for other threads (__syncthreads, __syncwarp, shuffles). A missing barrier therefore shows as a
// wrong result, because a thread runs up to its next wait before any other thread continues. The order of threads is
// random and differs between blocks, and half of the blocks run their threads warp by warp. A result that depends on
// the order of blocks or threads therefore differs from run to run.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "devices.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

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

namespace emulation {

// An atomic addition of floats in device memory replaces subnormal numbers by zero.
template <class T>
T flushed(T x) {
  return std::is_same_v<T, float> && std::fpclassify(x) == FP_SUBNORMAL ? T(0) : x;
}

// Returns a number from -1 to 1 that has no pattern, but is always the same for the same x.
inline float noise(float x) { return static_cast<int32_t>(std::hash<float>{}(x) >> 8) * 0x1p-31f; }

}  // namespace emulation

template <class T>
T atomicAdd(T* p, T x) {
  const T old = *p;
  *p = emulation::flushed(emulation::flushed(old) + emulation::flushed(x));
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

// The fast functions have the largest errors that CUDA's documentation gives for the arguments that occur: 2 units in
// the last place for division, and an absolute error of 4e-7 for sines and cosines.
inline float __fdividef(float a, float b) {
  const float quotient = a / b;
  if (quotient == 0 || !std::isfinite(quotient)) return quotient;
  return std::bit_cast<float>(std::bit_cast<int32_t>(quotient) +
                              static_cast<int32_t>(std::lround(2 * emulation::noise(quotient))));
}
inline float __sinf(float x) { return sinf(x) + 4e-7f * emulation::noise(x); }
inline float __cosf(float x) { return cosf(x) + 4e-7f * emulation::noise(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

namespace emulation {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kWarp = 32;
constexpr int kPoison = 0xcd;  // the bytes of shared memory when a block begins, because no kernel may rely on zeros

// Threads that wait for one another: all threads of a block or of a warp. A thread that has returned counts as arrived.
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

// The frame, address and stack with which a fiber resumes. The emulation spends most of its time on switching fibers,
// so it uses GCC's built-in setjmp, which needs neither a system call nor the C library.
using ResumePoint = void* [5];

struct Fiber {
  ResumePoint resume_point;
  std::unique_ptr<char[]> stack;  // allocated when the fiber is first entered
  const Barrier* barrier;         // null if the fiber does not wait
  int generation;                 // the fiber waits while the barrier has this generation
  bool done;
  bool waits() const { return done || (barrier != nullptr && barrier->generation == generation); }
};

inline ResumePoint scheduler;
inline Fiber fibers[1024];
inline std::vector<Barrier> warps;
inline Barrier block;
inline unsigned current, step;  // the running thread, and the offset from it to the next thread
inline bool warps_run_ahead;    // whether the rest of the warp runs before the other warps
inline std::mt19937 order;
inline const std::function<void()>* body;
inline std::vector<char> shared_memory;
inline uint64_t exchanged[2][1024];

// The variables in static shared memory that the current block has reached, and their total size.
inline std::vector<void*> shared_variables;
inline size_t static_shared;

// translate() calls this function after the declaration of shared variables. The first thread of a block that reaches
// the declaration poisons them.
template <class... T>
void declare_shared(T&... variables) {
  const auto declare = [](void* variable, size_t bytes) {
    if (std::ranges::find(shared_variables, variable) != shared_variables.end()) return;
    shared_variables.push_back(variable);
    static_shared += bytes;
    std::memset(variable, kPoison, bytes);
  };
  (declare(&variables, sizeof(variables)), ...);
}

inline char* dynamic_shared() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared_memory.data()) + 15) / 16 * 16);
}

void run_fiber();

// This function is never inlined: __builtin_longjmp must not be in the function that calls __builtin_setjmp.
[[gnu::noinline]] inline void enter(unsigned thread) {
  current = thread;
  threadIdx = dim3(thread);
  Fiber& fiber = fibers[thread];
  if (fiber.stack != nullptr) __builtin_longjmp(fiber.resume_point, 1);
  fiber.stack.reset(new char[kStackBytes]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

[[gnu::noinline]] inline void leave_block() { __builtin_longjmp(scheduler, 1); }

// Returns the next thread that need not wait, or the current one if all threads must wait.
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

// Switches to the next thread. Returns when the current thread is resumed.
[[gnu::noinline]] inline void next_thread() {
  const unsigned next = next_ready();
  if (__builtin_setjmp(fibers[current].resume_point) == 0) {
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
  // A step that is coprime to the number of threads reaches all threads.
  do step = 1 + order() % blockDim.x;
  while (std::gcd(step, blockDim.x) != 1);
  warps_run_ahead = order() % 2;
  if (__builtin_setjmp(scheduler) == 0) enter(order() % blockDim.x);
}

template <class Kernel>
void launch(dim3 grid, unsigned threads, size_t shared, cudaStream_t stream, Kernel* kernel,
            const std::function<void()>& run) {
  check_stream("a launch", stream);
  check_shared(kernel, shared);
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || threads == 0 || threads > 1024)
    fail("a launch of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " blocks of " +
         std::to_string(threads) + " threads");
  body = &run;
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
    shared_memory.assign(shared + 16, static_cast<char>(kPoison));
    shared_variables.clear();
    static_shared = 0;
    run_block();
    if (block.members > 0) {
      for (Fiber& fiber : fibers) fiber.stack.reset();  // the threads that wait must not resume in the next launch
      fail(std::to_string(block.members) + " threads of a block wait for one another forever");
    }
    check_shared(kernel, shared, static_shared);
  }
}

// Returns the values that all lanes of the warp passed to this function. They are valid until the caller waits again.
template <class T>
const uint64_t* exchange(T x) {
  const unsigned warp = current / kWarp;
  // Two slots are used in turn: between two writes to the same slot there is another exchange, which waits until all
  // lanes have read the slot.
  uint64_t* slots = exchanged[warps[warp].generation % 2];
  std::memcpy(&slots[current], &x, sizeof(T));
  wait(warps[warp]);
  return &slots[warp * kWarp];
}

template <class T>
T shuffle(T x, int source_lane) {
  const uint64_t* values = exchange(x);
  T result;
  std::memcpy(&result, &values[source_lane], sizeof(T));
  return result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block); }
inline int __syncthreads_and(int predicate) {
  static bool predicates[std::size(emulation::fibers)];
  predicates[emulation::current] = predicate != 0;
  __syncthreads();
  const bool all = std::all_of(predicates, predicates + blockDim.x, [](bool x) { return x; });
  __syncthreads();  // before the next call overwrites the predicates
  return all;
}
inline void __syncwarp() { emulation::wait(emulation::warps[emulation::current / emulation::kWarp]); }
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulation::shuffle(x, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulation::shuffle(x, static_cast<int>(emulation::current % emulation::kWarp) ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t* values = emulation::exchange(uint64_t{predicate});
  unsigned bits = 0;
  for (int lane = 0; lane < emulation::kWarp; ++lane) bits |= static_cast<unsigned>(values[lane]) << lane;
  return bits;
}
