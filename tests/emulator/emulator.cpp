// Runs CUDA kernels on the CPU, to test them where there is no GPU: csrc/*.cu compiled as ordinary C++.
//
// Every thread of a block is a fiber that runs until it waits at a barrier (of the block or of its warp). Those that
// can run do so in an order drawn from a seed, as do the blocks: where a barrier is missing, some order gives another
// result. Shared memory is filled with noise before every block, and noise behind what a launch asked for must still be
// there afterwards. Barriers that some threads never reach end the launch with cudaErrorLaunchFailure.
#include "cuda_runtime.h"

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace lookm {
thread_local uint4 dynamic_memory[256 * 1024 / sizeof(uint4)];
}

namespace emulator {
namespace {

constexpr std::size_t kStack = 128 * 1024;
constexpr std::size_t kDefaultShared = 48 * 1024;
constexpr int kMultiprocessors = 4;
constexpr unsigned char kNoise = 0xa5;

std::mutex one_launch;
std::mt19937 random_order(0);
int shared_limit = 227 * 1024;
cudaError_t forced_error = cudaSuccess;
std::map<const void *, std::size_t> allowed;

struct Fiber {
    ucontext_t context;
    jmp_buf place;
    std::vector<unsigned char> stack;
    bool started = false, done = false;
};

struct Warp {
    unsigned arrived = 0;
    std::uint64_t given[32], exchanged[32];
};

std::deque<Fiber> fibers;  // never moved: a context points into itself
std::vector<Warp> warps;
std::vector<unsigned> ready, waiting;
std::vector<std::vector<unsigned>> waiting_in_warp;
const std::function<void()> *kernel_body = nullptr;
unsigned current = 0, live = 0;
int holding = 0, held = 0;

// AddressSanitizer knows swapcontext; jumping is twenty times faster, as it asks nothing of the kernel.
#ifdef __SANITIZE_ADDRESS__
ucontext_t scheduler;
void resume(Fiber &fiber) { swapcontext(&scheduler, &fiber.context); }
void leave(Fiber &fiber) { swapcontext(&fiber.context, &scheduler); }
#else
jmp_buf scheduler_place;
void resume(Fiber &fiber) {
    if (_setjmp(scheduler_place)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}
void leave(Fiber &fiber) {
    if (!_setjmp(fiber.place)) _longjmp(scheduler_place, 1);
}
#endif

void release_block() {
    ready.insert(ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
    held = holding;
    holding = 0;
}

void fiber_main() {
    for (;;) {
        Fiber &fiber = fibers[current];
        (*kernel_body)();
        fiber.done = true;
        --live;
        if (live > 0 && waiting.size() == live) release_block();
        leave(fiber);
    }
}

void prepare(unsigned threads) {
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned thread = 0; thread < threads; ++thread) {
        Fiber &fiber = fibers[thread];
        // one that never got to its end is started afresh
        if (fiber.stack.empty() || !fiber.done) {
            fiber.stack.resize(kStack);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = kStack;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, fiber_main, 0);
            fiber.started = false;
        }
        fiber.done = false;
    }
    warps.assign((threads + 31) / 32, Warp());
    waiting_in_warp.assign(warps.size(), {});
    waiting.clear();
    ready.resize(threads);
    std::iota(ready.begin(), ready.end(), 0u);
    std::shuffle(ready.begin(), ready.end(), random_order);
    live = threads;
    holding = held = 0;
}

// The memory of all variables of this library that are thread_local: the shared memory of all kernels.
struct SharedMemory {
    unsigned char *begin = nullptr;
    std::size_t bytes = 0;
};

int find_shared_memory(dl_phdr_info *info, std::size_t, void *found) {
    auto *memory = static_cast<SharedMemory *>(found);
    const auto *own = reinterpret_cast<unsigned char *>(lookm::dynamic_memory);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        if (info->dlpi_phdr[i].p_type != PT_TLS || info->dlpi_tls_data == nullptr) continue;
        auto *begin = static_cast<unsigned char *>(info->dlpi_tls_data);
        if (own >= begin && own < begin + info->dlpi_phdr[i].p_memsz) *memory = {begin, info->dlpi_phdr[i].p_memsz};
    }
    return 0;
}

bool run_block(std::size_t dynamic_bytes, const SharedMemory &memory) {
    std::memset(memory.begin, kNoise, memory.bytes);
    prepare(blockDim.x);
    // in every other block those released last mostly run first, so that a warp may be far ahead of the others
    const bool newest_first = random_order() % 2;
    while (live > 0) {
        if (ready.empty()) return false;
        const bool newest = newest_first && random_order() % 64;
        std::swap(ready[newest ? ready.size() - 1 : random_order() % ready.size()], ready.back());
        current = ready.back();
        ready.pop_back();
        threadIdx = {current, 0, 0};
        resume(fibers[current]);
    }
    const auto *end = reinterpret_cast<unsigned char *>(lookm::dynamic_memory) + sizeof lookm::dynamic_memory;
    const auto *behind = reinterpret_cast<unsigned char *>(lookm::dynamic_memory) + dynamic_bytes;
    return std::all_of(behind, end, [](unsigned char byte) { return byte == kNoise; });
}

}  // namespace

int block_barrier(bool holds) {
    const unsigned own = current;
    holding += holds;
    waiting.push_back(own);
    if (waiting.size() == live) release_block();
    leave(fibers[own]);
    return held;
}

const std::uint64_t *warp_exchange(unsigned mask, std::uint64_t value) {
    const unsigned own = current, number = own / 32;
    Warp &warp = warps[number];
    warp.given[own % 32] = value;
    warp.arrived |= 1u << own % 32;
    waiting_in_warp[number].push_back(own);
    if (warp.arrived == mask) {
        std::copy_n(warp.given, 32, warp.exchanged);
        warp.arrived = 0;
        ready.insert(ready.end(), waiting_in_warp[number].begin(), waiting_in_warp[number].end());
        waiting_in_warp[number].clear();
    }
    leave(fibers[own]);
    return warp.exchanged;
}

cudaError_t allow_shared_memory(const void *kernel, int bytes) {
    if (forced_error != cudaSuccess) return forced_error;
    if (bytes > shared_limit) return cudaErrorInvalidValue;
    allowed[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t &config, const void *kernel, const std::function<void()> &body) {
    const std::lock_guard<std::mutex> lock(one_launch);
    if (forced_error != cudaSuccess) return forced_error;
    const std::size_t most = std::max(kDefaultShared, allowed[kernel]);
    if (config.blockDim.x == 0 || config.blockDim.x > 1024 || config.blockDim.x % 32 || config.gridDim.x == 0 ||
        config.dynamicSmemBytes > std::min<std::size_t>(most, shared_limit)) {
        return cudaErrorInvalidConfiguration;
    }
    SharedMemory memory;
    // it exists from its first use on
    lookm::dynamic_memory[0] = {};
    dl_iterate_phdr(find_shared_memory, &memory);
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    kernel_body = &body;
    std::vector<unsigned> blocks(config.gridDim.x);
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::shuffle(blocks.begin(), blocks.end(), random_order);
    for (const unsigned block : blocks) {
        blockIdx = {block, 0, 0};
        if (!run_block(config.dynamicSmemBytes, memory)) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

}  // namespace emulator

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
        default: return "cudaSuccess";
    }
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorLaunchFailure: return "a barrier that not all reach, or shared memory out of bounds";
        default: return "no error";
    }
}

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return emulator::forced_error;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::kMultiprocessors : emulator::shared_limit;
    return cudaSuccess;
}

// For the tests: the order of threads, the shared memory of a block in bytes, and an error for every call (0: none).
extern "C" void emulator_configure(unsigned seed, int shared_bytes, int error) {
    const std::lock_guard<std::mutex> lock(emulator::one_launch);
    emulator::random_order.seed(seed);
    emulator::shared_limit = shared_bytes;
    emulator::forced_error = static_cast<cudaError_t>(error);
}
