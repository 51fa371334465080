#include "cuda/device.h"

#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace fibers {

Counters counters;
Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

// Saves the callee-saved registers on the stack that is left and takes them from the one that is entered.
extern "C" void llava_cot_switch_stack(void** left, void* entered);
asm(R"(
.text
.globl llava_cot_switch_stack
.type llava_cot_switch_stack, @function
llava_cot_switch_stack:
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
.size llava_cot_switch_stack, .-llava_cot_switch_stack
)");

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  Call call = Call::kNone;
  bool left = false;         // whether a lane has returned from the kernel
  uint64_t values[2][kWarp];  // by parity of the barrier: a lane is never two exchanges ahead of another
};

struct Block {
  Barrier barrier;
  std::vector<char> shared;
};

struct Fiber {
  void* stack_pointer;
  int thread, rank;
  bool done;
};

// The team that runs. Statics, since kernels find it without an argument, as they find threadIdx.
std::vector<Fiber> team;
std::vector<int> order, next_of;  // of the fibers; a ring
std::vector<Warp> warps;
std::vector<Block> blocks;
Barrier team_barrier;
const std::function<void()>* kernel;
void* main_stack;
int current, num_done, first_block;
uint64_t progress;        // counts releases of barriers and fibers' ends
uint64_t order_seed = 0;  // 0: as numbered
llava_cot::DeviceLimits limits;
std::string error;
char* stacks;
size_t num_stacks;

Warp& warp_of(const Fiber& fiber) {
  return warps[(fiber.rank * block_size.x + fiber.thread) / kWarp];
}

void enter(int fiber) {
  current = fiber;
  thread_index.x = team[fiber].thread;
  block_index.x = first_block + team[fiber].rank;
}

void leave_for_main() {
  void* unused;
  llava_cot_switch_stack(&unused, main_stack);
}

void fail(const std::string& what) {
  error = what + " (block " + std::to_string(block_index.x) + ", thread " + std::to_string(thread_index.x) + ")";
  leave_for_main();
}

void yield() {
  const int from = current;
  int to = next_of[from];
  while (team[to].done) to = next_of[from] = next_of[to];
  if (to == from) return;
  enter(to);
  llava_cot_switch_stack(&team[from].stack_pointer, team[to].stack_pointer);
}

void release(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
  ++progress;
}

void wait(Barrier& barrier, const char* name) {
  if (++barrier.arrived == barrier.expected) return release(barrier);
  const uint64_t generation = barrier.generation;
  uint64_t seen = progress;
  // One round of the ring without progress may have begun before it; a second one cannot.
  for (size_t idle = 0; barrier.generation == generation; seen = progress) {
    yield();
    idle = seen == progress ? idle + 1 : 0;
    if (idle > 2) fail(std::string(name) + " is not reached by every thread");
  }
}

void withdraw(Barrier& barrier) {
  if (--barrier.expected > 0 && barrier.arrived == barrier.expected) release(barrier);
}

void run_fiber() {
  (*kernel)();
  Fiber& self = team[current];
  self.done = true;
  ++num_done;
  ++progress;
  Warp& warp = warp_of(self);
  warp.left = true;
  if (warp.barrier.arrived > 0) fail("a warp function is called by a part of the warp");
  withdraw(blocks[self.rank].barrier);
  withdraw(team_barrier);
  if (num_done == static_cast<int>(team.size())) leave_for_main();
  yield();
}

void prepare(Fiber& fiber, int index) {
  // Tops of stacks a multiple of a page apart would all fall into the same few sets of the cache.
  char* top = stacks + (index + 1) * kStackBytes - index % 32 * 128;
  auto* words = reinterpret_cast<void**>(top) - 2;  // leaves rsp as it is after a call
  words[0] = reinterpret_cast<void*>(&run_fiber);
  words[1] = nullptr;
  fiber.stack_pointer = words - 6;
  fiber.done = false;
}

void run_team() {
  for (Block& block : blocks) {
    std::fill(block.shared.begin(), block.shared.end(), static_cast<char>(kPoison));
    block.barrier = {static_cast<int>(block_size.x)};
  }
  for (Warp& warp : warps) {
    warp.barrier = {kWarp};
    warp.left = false;
  }
  team_barrier = {static_cast<int>(team.size())};
  num_done = 0;
  for (size_t i = 0; i < team.size(); ++i) {
    prepare(team[i], static_cast<int>(i));
    next_of[order[i]] = order[(i + 1) % team.size()];
  }
  enter(order[0]);
  llava_cot_switch_stack(&main_stack, team[order[0]].stack_pointer);
}

void reserve_stacks(size_t count) {
  if (count <= num_stacks) return;
  if (stacks) munmap(stacks, num_stacks * kStackBytes);
  void* memory = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  STD_TORCH_CHECK(memory != MAP_FAILED, "no memory for the stacks of ", count, " fibers");
  stacks = static_cast<char*>(memory);
  num_stacks = count;
}

}  // namespace

void run(const std::function<void()>& body, int64_t num_blocks, int num_threads, int64_t shared_bytes, int team_size) {
  STD_TORCH_CHECK(num_threads > 0 && num_threads <= 1024 && num_threads % kWarp == 0,
                  "num_threads must be a multiple of 32 up to 1024, got ", num_threads);
  STD_TORCH_CHECK(num_blocks % team_size == 0, "num_blocks must be a multiple of team_size");
  STD_TORCH_CHECK(shared_bytes <= limits.max_shared_bytes, "a block has no ", shared_bytes,
                  " bytes of shared memory");
  ++counters.launches;
  kernel = &body;
  error.clear();
  block_size.x = num_threads;
  grid_size.x = static_cast<unsigned>(num_blocks);
  const size_t count = static_cast<size_t>(team_size) * num_threads;
  reserve_stacks(count);
  team.resize(count);
  order.resize(count);
  next_of.resize(count);
  warps.resize(count / kWarp);
  blocks.resize(team_size);
  for (Block& block : blocks) block.shared.resize(shared_bytes + 16);
  for (size_t i = 0; i < count; ++i) {
    team[i].thread = static_cast<int>(i) % num_threads;
    team[i].rank = static_cast<int>(i) / num_threads;
  }
  std::iota(order.begin(), order.end(), 0);
  std::vector<int64_t> teams(num_blocks / team_size);
  std::iota(teams.begin(), teams.end(), 0);
  if (order_seed) {
    std::mt19937_64 random(order_seed);
    std::shuffle(order.begin(), order.end(), random);
    std::shuffle(teams.begin(), teams.end(), random);
  }
  for (const int64_t index : teams) {
    first_block = static_cast<int>(index * team_size);
    run_team();
    STD_TORCH_CHECK(error.empty(), error);
    for (const Block& block : blocks) {
      STD_TORCH_CHECK(std::all_of(block.shared.end() - 16, block.shared.end(),
                                  [](char byte) { return static_cast<unsigned char>(byte) == kPoison; }),
                      "a kernel wrote past the end of its shared memory");
    }
  }
}

void sync_block() { wait(blocks[team[current].rank].barrier, "__syncthreads"); }
void sync_team() { wait(team_barrier, "team_sync"); }

const uint64_t* exchange(Call call, unsigned mask, uint64_t value) {
  Warp& warp = warp_of(team[current]);
  if (mask != llava_cot::kFullWarp || warp.left) fail("a warp function is called by a part of the warp");
  if (warp.barrier.arrived > 0 && warp.call != call) fail("the lanes of a warp call different warp functions");
  warp.call = call;
  uint64_t* values = warp.values[warp.barrier.generation % 2];
  values[lane()] = value;
  wait(warp.barrier, "a warp function");
  return values;
}

char* shared_memory(int rank) { return blocks[rank].shared.data(); }
int rank() { return team[current].rank; }
int lane() { return team[current].thread % kWarp; }

}  // namespace fibers

llava_cot::DeviceLimits llava_cot::device_limits(const torch::stable::Tensor&) { return fibers::limits; }

int llava_cot::team_size() { return static_cast<int>(fibers::blocks.size()); }

// For ctypes.
extern "C" __attribute__((visibility("default"))) fibers::Counters* llava_cot_fibers_counters() {
  return &fibers::counters;
}
extern "C" __attribute__((visibility("default"))) void llava_cot_fibers_set_order(uint64_t seed) {
  fibers::order_seed = seed;
}
extern "C" __attribute__((visibility("default"))) void llava_cot_fibers_set_limits(int num_multiprocessors,
                                                                                   int max_team_size,
                                                                                   int64_t max_shared_bytes) {
  fibers::limits = {num_multiprocessors, max_team_size, max_shared_bytes};
}
