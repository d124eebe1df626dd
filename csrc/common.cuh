// What two of the kernels share.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "lookm.h"

namespace lookm {

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t size, std::int64_t block) {
    return (size + block - 1) / block;
}

// The shared memory that a launch asks for.
extern __shared__ uint4 dynamic_memory[];

// Launches `blocks` blocks along x, the only axis that is not limited to 65,535 of them; none is no error.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace lookm
