// Merging: evicted tokens sorted by pivot, then one warp a pivot, whose members lie side by side in that order.
//
// Fixed tiles of the order that lie inside one pivot's run are summed ahead, each by a warp, so a pivot that attracts
// everything adds tiles, not tokens. Lanes hold neighbouring pieces of a key row and of a value row, and every sum has
// one fixed order.
#include <algorithm>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cub/device/device_radix_sort.cuh>

#include "common.cuh"

namespace lookm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 3;  // at least that many on a multiprocessor: the kernels wait for memory
constexpr int kTile = 128;
constexpr int kAhead = 4;  // rows that a lane reads before it adds the first of them
constexpr unsigned kAll = 0xffffffff;

using Key = std::uint32_t;
constexpr int kMostKeyBits = 32;  // 2^32 kept tokens are more than any GPU holds

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void round_to(float *out, float x) { *out = x; }
__device__ void round_to(__half *out, float x) { *out = __float2half_rn(x); }
__device__ void round_to(__nv_bfloat16 *out, float x) { *out = __float2bfloat16_rn(x); }

// Neighbouring elements that one access reads or writes.
template <typename T, int COUNT>
struct alignas(COUNT * sizeof(T)) Pack {
    T x[COUNT];
};

// The (row, head) of this block, of which every one has `blocks`, and the number of the block in it.
struct BlockOfRow {
    int row, block;

    // 32 bits: a division of 64 is a call
    __device__ explicit BlockOfRow(unsigned blocks)
        : row(static_cast<int>(blockIdx.x / blocks)), block(static_cast<int>(blockIdx.x % blocks)) {}
};

__global__ void __launch_bounds__(kThreads)
    keys_kernel(const int *evicted, const int *pivot, const float *weight, Key *keys, int *places, int kept_size,
                int evicted_size, unsigned blocks) {
    const BlockOfRow here(blocks);
    const int place = here.block * kThreads + static_cast<int>(threadIdx.x);
    if (place >= evicted_size) return;
    const std::int64_t item = static_cast<std::int64_t>(here.row) * evicted_size + place;
    const int to = pivot[item];
    const bool merges = evicted[item] >= 0 && to >= 0 && weight[item] != 0.0f;
    keys[item] = static_cast<Key>(here.row) * (kept_size + 1) + (merges ? to : kept_size);
    places[item] = place;
}

// Where the run of every pivot, and of what merges nowhere, begins: a binary search for each.
__global__ void __launch_bounds__(kThreads)
    starts_kernel(const Key *keys, int *starts, int kept_size, int evicted_size, unsigned blocks) {
    const BlockOfRow here(blocks);
    const int place = here.block * kThreads + static_cast<int>(threadIdx.x);
    if (place > kept_size) return;
    keys += static_cast<std::int64_t>(here.row) * evicted_size;
    const std::int64_t group = static_cast<std::int64_t>(here.row) * (kept_size + 1) + place;
    int low = 0, high = evicted_size;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (keys[middle] < static_cast<Key>(group)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    starts[group] = low;
}

// One warp a kept token: its votes and those of its run, in an order that only the run decides.
__global__ void __launch_bounds__(kThreads)
    votes_kernel(const float *votes, float *out, const int *kept, const int *starts, const int *order,
                 const int *evicted, int tokens, int kept_size, int evicted_size, unsigned blocks) {
    const BlockOfRow here(blocks);
    const int place = here.block * kWarps + static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
    if (place >= kept_size) return;
    const std::int64_t number = static_cast<std::int64_t>(here.row) * kept_size + place;
    const int begin = starts[number + here.row], end = starts[number + here.row + 1], token = kept[number];
    float sum = 0.0f;
    if (votes == nullptr) {
        sum = 1.0f + static_cast<float>(end - begin);
    } else {
        votes += static_cast<std::int64_t>(here.row) * tokens;
        const std::int64_t offset = static_cast<std::int64_t>(here.row) * evicted_size;
        for (int item = begin + lane; item < end; item += kWarp) sum += votes[evicted[offset + order[offset + item]]];
        for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_sync(kAll, sum, lane ^ step);
        if (token >= 0) sum += votes[token];
    }
    if (lane == 0) out[number] = token >= 0 ? sum : 0.0f;
}

// One lane's piece of the key or value rows of one (row, head).
template <typename T, int COUNT>
struct Piece {
    T *x;
    std::int64_t stride;
    bool inside;  // whether the rows are that wide

    __device__ Pack<T, COUNT> &at(int row) const { return *reinterpret_cast<Pack<T, COUNT> *>(x + row * stride); }
};

// What the kernels that sum share: the operands, and the pieces that the lanes of a warp hold.
template <typename T, int COUNT>
struct Layer {
    Rows key, value, out_key, out_value;
    const int *order, *evicted;
    const float *weight;
    float *sums;
    int heads, evicted_size, tiles;

    __device__ int pieces() const { return (key.width + value.width) / COUNT; }

    // What a lane reads, and what it writes.
    __device__ Piece<T, COUNT> piece(int row, int number) const { return piece_of(key, value, row, number); }
    __device__ Piece<T, COUNT> out_piece(int row, int number) const {
        return piece_of(out_key, out_value, row, number);
    }

    __device__ Piece<T, COUNT> piece_of(const Rows &keys, const Rows &values, int row, int number) const {
        const int element = number * COUNT;
        const bool of_key = element < key.width;
        const Rows &x = of_key ? keys : values;
        const std::int64_t offset = row / heads * x.stride_b + row % heads * x.stride_h;
        return {static_cast<T *>(x.data) + offset + (of_key ? element : element - key.width), x.stride_n,
                element < key.width + value.width};
    }

    // The sum of tile t is pieces() * t further on.
    __device__ Pack<float, COUNT> *tile_sum(int row, int tile, int number) const {
        const std::int64_t before = (static_cast<std::int64_t>(row) * tiles + tile) * pieces();
        return reinterpret_cast<Pack<float, COUNT> *>(sums) + before + number;
    }

    // Adds weight x of the tokens at places begin to end - 1 of a row's order. Every lane of a warp takes part, also
    // one whose piece is not inside.
    __device__ void add(float (&sum)[COUNT], const Piece<T, COUNT> &piece, int row, int begin, int end) const {
        const std::int64_t offset = static_cast<std::int64_t>(row) * evicted_size;
        const int lane = threadIdx.x % kWarp;
#pragma unroll 1
        for (int first = begin; first < end; first += kWarp) {
            int own_token = 0;
            float own_weight = 0.0f;
            if (first + lane < end) {
                const int place = order[offset + first + lane];
                own_token = evicted[offset + place];
                own_weight = weight[offset + place];
            }
            const int count = min(kWarp, end - first);
#pragma unroll 1
            for (int begin_ahead = 0; begin_ahead < count; begin_ahead += kAhead) {
                int token[kAhead];
                float factor[kAhead];
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    token[i] = __shfl_sync(kAll, own_token, begin_ahead + i);
                    factor[i] = __shfl_sync(kAll, own_weight, begin_ahead + i);
                }
                if (!piece.inside) continue;
                Pack<T, COUNT> ahead[kAhead];
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    if (begin_ahead + i < count) ahead[i] = piece.at(token[i]);
                }
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    if (begin_ahead + i >= count) break;
                    for (int j = 0; j < COUNT; ++j) sum[j] += factor[i] * to_float(ahead[i].x[j]);
                }
            }
        }
    }
};

// One warp a tile, of those that lie inside the run of a pivot.
template <typename T, int COUNT>
__global__ void __launch_bounds__(kThreads, kBlocks)
    tile_kernel(Layer<T, COUNT> layer, const Key *keys, int kept_size, unsigned blocks) {
    const auto [row, block] = BlockOfRow(blocks);
    const int tile = block * kWarps + static_cast<int>(threadIdx.x) / kWarp;
    if (tile >= layer.tiles) return;
    const int begin = tile * kTile, end = begin + kTile;
    keys += static_cast<std::int64_t>(row) * layer.evicted_size;
    const Key group = keys[begin];
    if (group != keys[end - 1] || group == static_cast<Key>(row) * (kept_size + 1) + kept_size) return;
#pragma unroll 1
    for (int first = 0; first < layer.pieces(); first += kWarp) {
        const int own = first + threadIdx.x % kWarp;
        const Piece<T, COUNT> piece = layer.piece(row, own);
        float sum[COUNT] = {};
        layer.add(sum, piece, row, begin, end);
        if (piece.inside) {
            Pack<float, COUNT> out;
            for (int j = 0; j < COUNT; ++j) out.x[j] = sum[j];
            *layer.tile_sum(row, tile, own) = out;
        }
    }
}

// One warp a kept token. Without TILES those whose run holds no whole tile: they are many and need few registers. With
// TILES the others: the tokens before the first whole tile, the whole tiles, the tokens after the last.
template <typename T, int COUNT, bool TILES>
__global__ void __launch_bounds__(kThreads, TILES ? 1 : kBlocks)
    merge_kernel(Layer<T, COUNT> layer, const int *kept, const int *starts, const float *kept_weight, int kept_size,
                 unsigned blocks, bool in_place) {
    const auto [row, block] = BlockOfRow(blocks);
    const int place = block * kWarps + static_cast<int>(threadIdx.x) / kWarp;
    if (place >= kept_size) return;
    const std::int64_t number = static_cast<std::int64_t>(row) * kept_size + place;
    const int begin = starts[number + row], end = starts[number + row + 1];
    const int first_tile = (begin + kTile - 1) / kTile, last_tile = end / kTile;
    if ((first_tile < last_tile) != TILES) return;
    const int token = kept[number];
    const float own_weight = kept_weight[number];
    // not an empty place, nor one of which nothing changes: that keeps its bits, in place without being read
    const bool changes = token >= 0 && (begin < end || own_weight != 1.0f);
    if (in_place && !changes) return;
#pragma unroll 1
    for (int first = 0; first < layer.pieces(); first += kWarp) {
        const int own = first + threadIdx.x % kWarp;
        const Piece<T, COUNT> piece = layer.piece(row, own);
        Pack<T, COUNT> row_piece{};
        if (piece.inside && token >= 0) row_piece = piece.at(token);
        if (!changes) {
            if (piece.inside) layer.out_piece(row, own).at(place) = row_piece;
            continue;
        }
        float sum[COUNT];
        for (int j = 0; j < COUNT; ++j) sum[j] = own_weight * to_float(row_piece.x[j]);
        layer.add(sum, piece, row, begin, TILES ? first_tile * kTile : end);
        if (TILES && piece.inside) {
            const Pack<float, COUNT> *tile_sum = layer.tile_sum(row, first_tile, own);
#pragma unroll 8
            for (int tile = first_tile; tile < last_tile; ++tile, tile_sum += layer.pieces()) {
                const Pack<float, COUNT> add = *tile_sum;
                for (int j = 0; j < COUNT; ++j) sum[j] += add.x[j];
            }
        }
        if (TILES) layer.add(sum, piece, row, last_tile * kTile, end);
        if (piece.inside) {
            Pack<T, COUNT> rounded;
            for (int j = 0; j < COUNT; ++j) round_to(&rounded.x[j], sum[j]);
            layer.out_piece(row, own).at(in_place ? token : place) = rounded;
        }
    }
}

template <typename X>
X *in_workspace(void *workspace, std::size_t offset) {
    return reinterpret_cast<X *>(static_cast<char *>(workspace) + offset);
}

template <typename T, int COUNT>
cudaError_t sum_groups(const Merge &a, const MergePlan &plan, void *workspace, const Key *keys, const int *order,
                       cudaStream_t stream) {
    const std::int64_t rows = static_cast<std::int64_t>(a.batch) * a.heads;
    const unsigned tile_blocks = ceil_div(plan.tiles, kWarps), merge_blocks = ceil_div(a.kept_size, kWarps);
    const bool in_place = a.key.data == a.out_key.data;
    const Layer<T, COUNT> layer{a.key,   a.value,        a.out_key,        a.out_value,
                                order,   a.evicted,      a.evicted_weight, in_workspace<float>(workspace, plan.sums),
                                a.heads, a.evicted_size, plan.tiles};
    const auto *starts = in_workspace<const int>(workspace, plan.starts);
    cudaError_t error = launch(merge_kernel<T, COUNT, false>, rows * merge_blocks, kThreads, 0, stream, layer, a.kept,
                               starts, a.kept_weight, a.kept_size, merge_blocks, in_place);
    // without a whole tile no run holds one
    if (error != cudaSuccess || plan.tiles == 0) return error;
    error =
        launch(tile_kernel<T, COUNT>, rows * tile_blocks, kThreads, 0, stream, layer, keys, a.kept_size, tile_blocks);
    if (error != cudaSuccess) return error;
    return launch(merge_kernel<T, COUNT, true>, rows * merge_blocks, kThreads, 0, stream, layer, a.kept, starts,
                  a.kept_weight, a.kept_size, merge_blocks, in_place);
}

template <typename T>
cudaError_t sum_groups_of(const Merge &a, const MergePlan &plan, void *workspace, const Key *keys, const int *order,
                          cudaStream_t stream) {
    constexpr int item = sizeof(T);
    switch (std::min({access_bytes(a.key, a.batch, a.heads, a.tokens, item),
                      access_bytes(a.value, a.batch, a.heads, a.tokens, item),
                      access_bytes(a.out_key, a.batch, a.heads, a.kept_size, item),
                      access_bytes(a.out_value, a.batch, a.heads, a.kept_size, item)})) {
        case 16: return sum_groups<T, 16 / item>(a, plan, workspace, keys, order, stream);
        case 8: return sum_groups<T, 8 / item>(a, plan, workspace, keys, order, stream);
        case 4: return sum_groups<T, 4 / item>(a, plan, workspace, keys, order, stream);
        default: return sum_groups<T, 1>(a, plan, workspace, keys, order, stream);
    }
}

}  // namespace

MergePlan merge_plan(int batch, int heads, int kept_size, int evicted_size, int key_width, int value_width) {
    const std::int64_t rows = static_cast<std::int64_t>(batch) * heads, groups = rows * (kept_size + std::int64_t{1});
    MergePlan plan{};
    plan.items = rows * evicted_size;
    plan.tiles = evicted_size / kTile;
    while (plan.key_bits < 63 && groups > std::int64_t{1} << plan.key_bits) ++plan.key_bits;
    plan.key_bits = std::max(plan.key_bits, 1);
    std::size_t end = 0;
    const auto take = [&end](std::int64_t count, std::size_t item) {
        const std::size_t begin = end;
        end += ceil_div(static_cast<std::int64_t>(count * item), 256) * 256;
        return begin;
    };
    for (std::size_t &keys : plan.keys) keys = take(plan.items, sizeof(Key));
    for (std::size_t &places : plan.places) places = take(plan.items, sizeof(int));
    plan.starts = take(groups, sizeof(int));
    plan.sums = take(rows * plan.tiles * (std::int64_t{key_width} + value_width), sizeof(float));
    plan.sort = end;
    return plan;
}

cudaError_t merge_workspace(const MergePlan &plan, std::size_t *bytes) {
    int device = 0;
    std::size_t sort_bytes = 0;
    // CUB would say of a machine without a GPU that its number is wrong
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    if (plan.key_bits > kMostKeyBits) return cudaErrorInvalidValue;
    cub::DoubleBuffer<Key> keys;
    cub::DoubleBuffer<int> places;
    error = cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, keys, places, plan.items, 0, plan.key_bits);
    *bytes = plan.sort + sort_bytes;
    return error;
}

cudaError_t merge(const Merge &a, void *workspace, std::size_t bytes, cudaStream_t stream) {
    if (a.kept_size == 0) return cudaSuccess;
    const MergePlan plan = merge_plan(a.batch, a.heads, a.kept_size, a.evicted_size, a.key.width, a.value.width);
    if (plan.key_bits > kMostKeyBits) return cudaErrorInvalidValue;
    cub::DoubleBuffer<Key> keys(in_workspace<Key>(workspace, plan.keys[0]), in_workspace<Key>(workspace, plan.keys[1]));
    cub::DoubleBuffer<int> places(in_workspace<int>(workspace, plan.places[0]),
                                  in_workspace<int>(workspace, plan.places[1]));
    const std::int64_t rows = static_cast<std::int64_t>(a.batch) * a.heads;
    const unsigned key_blocks = ceil_div(a.evicted_size, kThreads), start_blocks = a.kept_size / kThreads + 1;
    cudaError_t error =
        launch(keys_kernel, rows * key_blocks, kThreads, 0, stream, a.evicted, a.pivot, a.evicted_weight,
               keys.Current(), places.Current(), a.kept_size, a.evicted_size, key_blocks);
    if (error != cudaSuccess) return error;
    std::size_t sort_bytes = bytes - plan.sort;
    error = cub::DeviceRadixSort::SortPairs(in_workspace<void>(workspace, plan.sort), sort_bytes, keys, places,
                                            plan.items, 0, plan.key_bits, stream);
    if (error != cudaSuccess) return error;
    error = launch(starts_kernel, rows * start_blocks, kThreads, 0, stream, keys.Current(),
                   in_workspace<int>(workspace, plan.starts), a.kept_size, a.evicted_size, start_blocks);
    if (error != cudaSuccess) return error;
    if (a.out_votes != nullptr) {
        const unsigned blocks = ceil_div(a.kept_size, kWarps);
        error = launch(votes_kernel, rows * blocks, kThreads, 0, stream, a.votes, a.out_votes, a.kept,
                       in_workspace<const int>(workspace, plan.starts), places.Current(), a.evicted, a.tokens,
                       a.kept_size, a.evicted_size, blocks);
        if (error != cudaSuccess) return error;
    }
    const auto sum = [&](const Merge &part, Dtype dtype) {
        switch (dtype) {
            case Dtype::kFloat16:
                return sum_groups_of<__half>(part, plan, workspace, keys.Current(), places.Current(), stream);
            case Dtype::kBFloat16:
                return sum_groups_of<__nv_bfloat16>(part, plan, workspace, keys.Current(), places.Current(), stream);
            default: return sum_groups_of<float>(part, plan, workspace, keys.Current(), places.Current(), stream);
        }
    };
    if (a.key_dtype == a.value_dtype) return sum(a, a.key_dtype);
    // one after the other, each beside a tensor of width 0
    Merge keys_alone = a, values_alone = a;
    keys_alone.value = a.key, keys_alone.out_value = a.out_key;
    values_alone.key = a.value, values_alone.out_key = a.out_value;
    keys_alone.value.width = values_alone.key.width = 0;
    error = sum(keys_alone, a.key_dtype);
    return error != cudaSuccess ? error : sum(values_alone, a.value_dtype);
}

}  // namespace lookm
