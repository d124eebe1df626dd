// cub::BlockScan by warps. Like the real one it needs a barrier before its storage is used again.
#pragma once

#include <cuda_runtime.h>

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_WARP_SCANS };

template <typename T, int THREADS, BlockScanAlgorithm ALGORITHM = BLOCK_SCAN_RAKING>
class BlockScan {
  public:
    struct TempStorage {
        T warps[THREADS / 32];
    };

    explicit BlockScan(TempStorage &storage) : storage(storage) {}

    template <typename Operator>
    void ExclusiveScan(T input, T &output, T initial, Operator add) {
        scan(input, output, initial, add);
    }
    void ExclusiveSum(T input, T &output) { scan(input, output, T{}, std::plus<T>()); }
    void ExclusiveSum(T input, T &output, T &total) { total = scan(input, output, T{}, std::plus<T>()); }

  private:
    // Returns the sum of all.
    template <typename Operator>
    T scan(T input, T &output, T initial, Operator add) {
        static_assert(sizeof(T) % 4 == 0, "exchanged in words");
        T lanes[32];
        for (std::size_t word = 0; word < sizeof(T) / 4; ++word) {
            std::uint32_t own;
            std::memcpy(&own, reinterpret_cast<const char *>(&input) + 4 * word, 4);
            const std::uint64_t *given = emulator::warp_exchange(0xffffffff, own);
            for (int lane = 0; lane < 32; ++lane) {
                std::memcpy(reinterpret_cast<char *>(&lanes[lane]) + 4 * word, &given[lane], 4);
            }
        }
        const unsigned own_warp = threadIdx.x / 32, own_lane = threadIdx.x % 32;
        if (own_lane == 0) {
            T sum = lanes[0];
            for (int lane = 1; lane < 32; ++lane) sum = add(sum, lanes[lane]);
            storage.warps[own_warp] = sum;
        }
        __syncthreads();
        T total = initial;
        for (unsigned warp = 0; warp < THREADS / 32; ++warp) {
            if (warp == own_warp) {
                output = total;
                for (unsigned lane = 0; lane < own_lane; ++lane) output = add(output, lanes[lane]);
            }
            total = add(total, storage.warps[warp]);
        }
        return total;
    }

    TempStorage &storage;
};

}  // namespace cub
