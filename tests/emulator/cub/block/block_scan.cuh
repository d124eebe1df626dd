// cub::BlockScan by one thread of the block. Like the real one it needs a barrier before its storage is used again.
#pragma once

#include <cuda_runtime.h>

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_WARP_SCANS };

template <typename T, int THREADS, BlockScanAlgorithm ALGORITHM = BLOCK_SCAN_RAKING>
class BlockScan {
public:
    struct TempStorage {
        T values[THREADS];
        T total;
    };

    explicit BlockScan(TempStorage &storage) : storage(storage) {}

    template <typename Operator>
    void ExclusiveScan(T input, T &output, T initial, Operator add) {
        scan(input, output, initial, add);
    }
    void ExclusiveSum(T input, T &output) { scan(input, output, T{}, std::plus<T>()); }
    void ExclusiveSum(T input, T &output, T &total) {
        scan(input, output, T{}, std::plus<T>());
        total = storage.total;
    }

private:
    template <typename Operator>
    void scan(T input, T &output, T initial, Operator add) {
        storage.values[threadIdx.x] = input;
        __syncthreads();
        if (threadIdx.x == 0) {
            T sum = initial;
            for (T &value : storage.values) {
                const T own = value;
                value = sum;
                sum = add(sum, own);
            }
            storage.total = sum;
        }
        __syncthreads();
        output = storage.values[threadIdx.x];
    }

    TempStorage &storage;
};

}  // namespace cub
