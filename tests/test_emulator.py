"""tests/emulator finds what it is there to find: kernels with a mistake each, and the same without it."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch
from emulator import FLAGS, HERE, why_not_built

pytestmark = pytest.mark.skipif(why_not_built() is not None, reason=str(why_not_built()))

KERNELS = """
#include <cub/block/block_scan.cuh>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lookm {
extern __shared__ uint4 dynamic_memory[];
}

__global__ void reverse_kernel(int *x, bool right) {
    __shared__ int held[64];
    held[threadIdx.x] = x[threadIdx.x];
    if (right) __syncthreads();
    x[threadIdx.x] = held[63 - threadIdx.x];
}

__global__ void diverge_kernel(int *x, bool right) {
    if (threadIdx.x == 3 && !right) {
        x[0] = __shfl_sync(0xffffffff, 1, 0);
    } else {
        __syncthreads();
    }
}

__global__ void overflow_kernel(int *x, bool right) {
    reinterpret_cast<int *>(lookm::dynamic_memory)[threadIdx.x + !right] = x[threadIdx.x];
}

// two scans with one storage
__global__ void scan_kernel(int *x, bool right) {
    using Scan = cub::BlockScan<int, 64>;
    __shared__ typename Scan::TempStorage storage;
    int before, again;
    Scan(storage).ExclusiveSum(x[threadIdx.x], before);
    if (right) __syncthreads();
    Scan(storage).ExclusiveSum(1, again);
    x[threadIdx.x] = before + again;
}

extern "C" int run(int number, int *x, bool right) {
    const auto kernel = number == 0   ? reverse_kernel
                        : number == 1 ? diverge_kernel
                        : number == 2 ? overflow_kernel
                                      : scan_kernel;
    cudaLaunchConfig_t config;
    config.blockDim = dim3(64);
    config.dynamicSmemBytes = 256;
    return cudaLaunchKernelEx(&config, kernel, x, right);
}

extern "C" void convert(const float *x, std::uint16_t *halves, std::uint16_t *bfloats, float *back, int count) {
    for (int i = 0; i < count; ++i) {
        halves[i] = __float2half_rn(x[i]).bits;
        bfloats[i] = __float2bfloat16_rn(x[i]).bits;
        back[2 * i] = __half2float({halves[i]});
        back[2 * i + 1] = __bfloat162float({bfloats[i]});
    }
}
"""
FAILURE = 719


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "kernels.cpp").write_text(KERNELS)
    sources = [str(folder / "kernels.cpp"), str(HERE / "emulator.cpp")]
    command = ["g++", *FLAGS, "-shared", "-I", str(HERE), *sources, "-o", str(folder / "kernels.so")]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def results(library: ctypes.CDLL, number: int, right: bool) -> set[tuple[int, ...]]:
    """The error, then the output, that eight orders of the threads give."""
    found = set()
    for seed in range(8):
        library.emulator_configure(seed, 48 * 1024, 0)
        x = (ctypes.c_int * 64)(*range(64))
        error = library.run(number, x, ctypes.c_bool(right))
        found.add((error, *x))
    return found


def test_a_missing_barrier_shows(library: ctypes.CDLL) -> None:
    assert results(library, 0, True) == {(0, *reversed(range(64)))}
    assert len(results(library, 0, False)) > 1


def test_a_barrier_that_some_never_reach_ends_the_launch(library: ctypes.CDLL) -> None:
    assert {found[0] for found in results(library, 1, True)} == {0}
    assert {found[0] for found in results(library, 1, False)} == {FAILURE}
    # and leaves nothing behind
    assert results(library, 0, True) == {(0, *reversed(range(64)))}


def test_writing_behind_the_shared_memory_asked_for_ends_the_launch(library: ctypes.CDLL) -> None:
    assert {found[0] for found in results(library, 2, True)} == {0}
    assert {found[0] for found in results(library, 2, False)} == {FAILURE}


def test_storage_of_a_scan_needs_a_barrier_before_it_is_used_again(library: ctypes.CDLL) -> None:
    assert results(library, 3, True) == {(0, *(n * (n - 1) // 2 + n for n in range(64)))}
    assert len(results(library, 3, False)) > 1


def test_numbers_of_16_bits_are_rounded_as_torch_does(library: ctypes.CDLL) -> None:
    """Around every power of two, halfway between neighbours, denormal, too large, infinite and not a number."""
    steps = torch.arange(-3, 4, dtype=torch.float64)
    powers = torch.arange(-30, 18, dtype=torch.float64)
    x = torch.cat([torch.exp2(powers)[:, None] * (1 + steps * 2.0**-bits) for bits in (8, 9, 11, 12)]).flatten()
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, 65504.0, 65519.0, 65520.0, 1e38, torch.inf, -torch.inf])]).float()
    halves, bfloats, back = torch.empty(len(x)).half(), torch.empty(len(x)).bfloat16(), torch.empty(len(x), 2)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, halves, bfloats, back)]
    library.convert(*pointers, len(x))
    assert torch.equal(halves.view(torch.int16), x.half().view(torch.int16))
    assert torch.equal(bfloats.view(torch.int16), x.bfloat16().view(torch.int16))
    assert torch.equal(back, torch.stack([x.half().float(), x.bfloat16().float()], 1))
    nan = torch.full((1,), torch.nan)
    library.convert(*[ctypes.c_void_p(tensor.data_ptr()) for tensor in (nan, halves, bfloats, back)], 1)
    assert back[0].isnan().all()
