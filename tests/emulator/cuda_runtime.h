// What a kernel sees: its indices, shared memory, barriers and the exchanges of a warp. See emulator.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// all threads of a block run on one thread of the CPU, and blocks one after the other
#define __shared__ thread_local

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

namespace emulator {
// Waits for the other threads of the block; of how many of them `holds` was true.
int block_barrier(bool holds);
// Waits for the lanes of `mask`; what each of the 32 gave.
const std::uint64_t *warp_exchange(unsigned mask, std::uint64_t value);
cudaError_t launch(const cudaLaunchConfig_t &config, const void *kernel, const std::function<void()> &body);
cudaError_t allow_shared_memory(const void *kernel, int bytes);
}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               Arguments &&...arguments) {
    return emulator::launch(*config, reinterpret_cast<const void *>(kernel),
                            [&] { kernel(static_cast<Parameters>(arguments)...); });
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel *kernel, cudaFuncAttribute, int bytes) {
    return emulator::allow_shared_memory(reinterpret_cast<const void *>(kernel), bytes);
}

struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, Kernel *) {
    return cudaSuccess;
}

inline void __syncthreads() { emulator::block_barrier(false); }
inline int __syncthreads_count(bool holds) { return emulator::block_barrier(holds); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
    static_assert(sizeof(T) <= 8, "a lane gives 64 bits");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    const std::uint64_t *given = emulator::warp_exchange(mask, bits);
    std::memcpy(&value, &given[lane % 32], sizeof(T));
    return value;
}

inline unsigned __ballot_sync(unsigned mask, bool holds) {
    const std::uint64_t *given = emulator::warp_exchange(mask, holds);
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(given[lane] & 1) << lane;
    return ballot & mask;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int min(int left, int right) { return left < right ? left : right; }
inline int max(int left, int right) { return left > right ? left : right; }

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// threads change at barriers only
inline int atomicAdd(int *address, int value) {
    const int before = *address;
    *address = before + value;
    return before;
}
