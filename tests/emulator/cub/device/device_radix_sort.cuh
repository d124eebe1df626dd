// cub::DeviceRadixSort by std::stable_sort, on the same bits of the keys.
#pragma once

#include <algorithm>
#include <vector>

#include <cuda_runtime.h>

namespace cub {

template <typename T>
struct DoubleBuffer {
    T *buffers[2] = {nullptr, nullptr};
    int selector = 0;

    DoubleBuffer() = default;
    DoubleBuffer(T *current, T *alternate) : buffers{current, alternate} {}
    T *Current() { return buffers[selector]; }
    T *Alternate() { return buffers[selector ^ 1]; }
};

struct DeviceRadixSort {
    // 256 bytes of storage, so that a caller that gives none is found out
    static constexpr std::size_t kStorage = 256;

    template <typename Key, typename Value, typename Count>
    static cudaError_t SortPairs(void *storage, std::size_t &bytes, DoubleBuffer<Key> &keys,
                                 DoubleBuffer<Value> &values, Count items, int begin_bit, int end_bit,
                                 cudaStream_t = nullptr) {
        if (storage == nullptr) {
            bytes = kStorage;
            return cudaSuccess;
        }
        if (bytes < kStorage) return cudaErrorInvalidValue;
        std::memset(storage, 0xaa, bytes);
        const Key mask =
            end_bit - begin_bit >= static_cast<int>(8 * sizeof(Key)) ? ~Key{0} : (Key{1} << (end_bit - begin_bit)) - 1;
        std::vector<Count> order(items);
        for (Count item = 0; item < items; ++item) order[item] = item;
        const Key *sorted_by = keys.Current();
        std::stable_sort(order.begin(), order.end(), [=](Count left, Count right) {
            return (sorted_by[left] >> begin_bit & mask) < (sorted_by[right] >> begin_bit & mask);
        });
        for (Count item = 0; item < items; ++item) {
            keys.Alternate()[item] = keys.Current()[order[item]];
            values.Alternate()[item] = values.Current()[order[item]];
        }
        // what is left where the input was must not be read
        if (items > 0) {
            std::memset(keys.Current(), 0xaa, items * sizeof(Key));
            std::memset(values.Current(), 0xaa, items * sizeof(Value));
        }
        keys.selector ^= 1;
        values.selector ^= 1;
        return cudaSuccess;
    }
};

}  // namespace cub
