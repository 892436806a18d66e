#include "cuda_emulator.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace l0::emulator {

dim3 grid_dim, block_dim;

namespace {

constexpr size_t kStack = 256 << 10;

// Where a stack was left. swapcontext asks the kernel about signals each time, which takes most of a test's
// time.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};
extern "C" void l0_switch_stack(void** leave, void* enter);
asm(R"(
  .text
  .type l0_switch_stack, @function
l0_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size l0_switch_stack, .-l0_switch_stack
)");
void switch_context(Context& from, const Context& to) {
  l0_switch_stack(&from.stack_pointer, to.stack_pointer);
}
void start_context(Context& context, void* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStack);
  top[-2] = reinterpret_cast<void*>(entry);  // where the first switch returns to; above it, nobody's address
  context.stack_pointer = top - 8;           // below it, the six registers
}
#else
using Context = ucontext_t;
void switch_context(Context& from, const Context& to) { swapcontext(&from, &to); }
void start_context(Context& context, void* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Fiber;

struct Barrier {
  int line = 0;
  size_t arrived = 0, expected = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Barrier barrier;
  uint64_t slot[2]
               [32];  // in turn: a lane that is one operation ahead must not overwrite what others still read
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<unsigned char, Free>;

Memory poisoned(size_t bytes) {
  // The size is exact, so that AddressSanitizer sees the first byte behind it.
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes ? bytes : 1)) throw std::bad_alloc();
  std::memset(p, 0xff, bytes);
  return Memory(static_cast<unsigned char*>(p));
}

struct Block {
  unsigned rank;
  Barrier barrier;
  std::vector<Warp> warps;
  Memory dynamic;
  std::map<int, std::pair<Memory, size_t>> shared;
};

struct Fiber : Thread {
  Block* home;
  Warp* warp;
  unsigned operations = 0;
  bool ready = true, done = false;
  Context context;
  void* stack = nullptr;
  void* fake = nullptr;
};

std::mt19937_64 random_bits(1);
std::vector<std::unique_ptr<Fiber>> fibers;  // kept from block to block
int64_t launch_count = 0;

// The cluster that runs.
const std::function<void()>* body;
Context scheduler;
const void* scheduler_stack;
size_t scheduler_stack_size;
void* scheduler_fake;
Fiber* current;
Barrier cluster_barrier;
std::vector<Block> blocks;
std::string failure;

// Every switch is said to AddressSanitizer, which keeps an account of each stack.
#if defined(__SANITIZE_ADDRESS__)
void leave(void** fake, const void* stack, size_t size) { __sanitizer_start_switch_fiber(fake, stack, size); }
void arrive(void* fake, const void** stack, size_t* size) {
  __sanitizer_finish_switch_fiber(fake, stack, size);
}
#else
void leave(void**, const void*, size_t) {}
void arrive(void*, const void**, size_t*) {}
#endif

void resume(Fiber& fiber) {
  current = &fiber;
  leave(&scheduler_fake, fiber.stack, kStack);
  switch_context(scheduler, fiber.context);
  arrive(scheduler_fake, nullptr, nullptr);
  current = nullptr;
}

void suspend() {
  Fiber& fiber = *current;
  leave(&fiber.fake, scheduler_stack, scheduler_stack_size);
  switch_context(fiber.context, scheduler);
  arrive(fiber.fake, &scheduler_stack, &scheduler_stack_size);
}

void enter() {
  arrive(nullptr, &scheduler_stack, &scheduler_stack_size);
  for (;;) {
    (*body)();
    current->done = true;
    suspend();  // until the next block
  }
}

}  // namespace

// The scheduler throws away the cluster.
void fail(const std::string& what) {
  if (failure.empty()) failure = what;
  for (;;) suspend();
}

namespace {

void wait(Barrier& b, int line) {
  Fiber& fiber = *current;
  if (b.arrived == 0) b.line = line;
  if (b.line != line)
    fail("threads meet at different barriers, lines " + std::to_string(b.line) + " and " +
         std::to_string(line));
  if (++b.arrived == b.expected) {
    for (Fiber* f : b.waiting) f->ready = true;
    b.waiting.clear();
    b.arrived = 0;
    return;
  }
  b.waiting.push_back(&fiber);
  fiber.ready = false;
  suspend();
}

std::unique_ptr<Fiber> make_fiber() {
  auto fiber = std::make_unique<Fiber>();
  void* stack =
      mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  fiber->stack = stack;
  start_context(fiber->context, stack, enter);
  return fiber;
}

void run_cluster(unsigned first, unsigned size, size_t dynamic_bytes) {
  const unsigned threads = block_dim.x;
  blocks = std::vector<Block>(size);
  const size_t count = size_t(size) * threads;
  while (fibers.size() < count) fibers.push_back(make_fiber());
  cluster_barrier = Barrier();
  cluster_barrier.expected = count;
  for (unsigned b = 0; b < size; ++b) {
    Block& block = blocks[b];
    block.rank = b;
    block.barrier.expected = threads;
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.barrier.expected = 32;
    block.dynamic = poisoned(dynamic_bytes);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = *fibers[size_t(b) * threads + t];
      fiber.thread = dim3(t, 0, 0);
      fiber.block = dim3((first + b) % grid_dim.x, (first + b) / grid_dim.x, 0);
      fiber.home = &block;
      fiber.warp = &block.warps[t / 32];
      fiber.operations = 0;
      fiber.ready = true;
      fiber.done = false;
    }
  }
  std::vector<Fiber*> turn;
  for (;;) {
    turn.clear();
    size_t done = 0;
    for (size_t i = 0; i < count; ++i) {
      Fiber& f = *fibers[i];
      done += f.done;
      if (f.ready && !f.done) turn.push_back(&f);
    }
    if (done == count) break;
    if (turn.empty() && failure.empty()) failure = "threads wait at a barrier that others never reach";
    if (!failure.empty()) break;
    std::shuffle(turn.begin(), turn.end(), random_bits);
    for (Fiber* f : turn) {
      resume(*f);
      if (!failure.empty()) break;
    }
  }
  if (!failure.empty())  // they stand in the middle of the kernel, for good
    for (auto& f : fibers) f.release();
  if (!failure.empty()) fibers.clear();
  blocks.clear();
}

}  // namespace

const Thread& self() { return *current; }
void set_seed(uint64_t seed) { random_bits.seed(seed); }
int64_t launches() { return launch_count; }

void run(const char* name, dim3 grid, dim3 block, unsigned cluster, size_t dynamic_bytes,
         const std::function<void()>& kernel) {
  ++launch_count;
  if (block.x % 32 || block.x > 1024 || block.y != 1 || block.z != 1 || grid.z != 1 || grid.x % cluster)
    throw std::invalid_argument(std::string(name) + ": a shape of launch that the emulator does not know");
  grid_dim = grid;
  block_dim = block;
  body = &kernel;
  failure.clear();
  std::vector<unsigned> order(size_t(grid.x) * grid.y / cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = unsigned(i) * cluster;
  std::shuffle(order.begin(), order.end(), random_bits);
  for (unsigned first : order) {
    run_cluster(first, cluster, dynamic_bytes);
    if (!failure.empty()) throw std::runtime_error(std::string(name) + ": " + failure);
  }
}

void* shared(size_t bytes, int id) {
  auto& [memory, size] = current->home->shared[id];
  if (!memory) {
    memory = poisoned(bytes);
    size = bytes;
  }
  return memory.get();
}

void* dynamic_shared() { return current->home->dynamic.get(); }

void* in_block_of_cluster(void* address, unsigned rank) {
  auto* p = static_cast<unsigned char*>(address);
  for (auto& [id, entry] : current->home->shared) {
    const auto& [memory, size] = entry;
    if (p < memory.get() || p >= memory.get() + size) continue;
    auto other = blocks.at(rank).shared.find(id);
    if (other == blocks.at(rank).shared.end()) break;
    return other->second.first.get() + (p - memory.get());
  }
  fail("the other block of the cluster has no such shared memory yet");
  return nullptr;
}

void barrier(Scope scope, int line) {
  if (scope == Scope::kWarp) return wait(current->warp->barrier, line);
  if (scope == Scope::kBlock) return wait(current->home->barrier, line);
  wait(cluster_barrier, line);
}

const uint64_t* exchange(unsigned mask, uint64_t value, int line) {
  if (mask != 0xffffffffu) fail("the emulator knows warp operations of whole warps only");
  Fiber& fiber = *current;
  uint64_t* slot = fiber.warp->slot[fiber.operations++ % 2];
  slot[lane()] = value;
  wait(fiber.warp->barrier, line);
  return slot;
}

}  // namespace l0::emulator
