// The launchers of the CUDA backend: raw pointers, sizes, strides and the stream; no libtorch.
//
// Shapes: B rows of the batch, H key/value heads, N cached tokens, D head dimension, K kept, E evicted. Index lists are
// int32, ascending, right-aligned: their empty places hold -1 and come first. What each op computes is written in
// lookm_kernels/<op>.py. Every launcher returns the first error of CUDA and never waits for the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

namespace lookm {

enum class Dtype : int { kFloat16, kBFloat16, kFloat32 };

constexpr int item_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// A tensor [B, H, N, width] with a unit last stride; the strides count elements.
struct Rows {
    void *data;
    std::int64_t stride_b, stride_h, stride_n;
    int width;
};

// Bytes of the widest access (16, 8, 4 or 2) at which all rows of [batch, heads, tokens, width] start and end.
inline int access_bytes(const Rows &x, int batch, int heads, int tokens, int item) {
    // the stride of a dimension of size 1 is never used
    const std::int64_t elements =
        (batch > 1 ? x.stride_b : 0) | (heads > 1 ? x.stride_h : 0) | (tokens > 1 ? x.stride_n : 0) | x.width;
    const std::int64_t bits = reinterpret_cast<std::intptr_t>(x.data) | (elements * item) | 16;
    return static_cast<int>(bits & -bits);
}

// select.cu: the `keep` first tokens of every (row, head) by (tier, score).
struct Select {
    const float *scores;  // [B, H, N] contiguous
    const int *tier;      // [B, N] contiguous
    const int *keeps;     // [B] tokens to keep, or null: `keep` for every row
    int *kept;            // [B, H, K], written
    int *evicted;         // [B, H, E], written
    int batch, heads, tokens, keep, kept_size, evicted_size;
};
// Bytes of dynamic shared memory that hold the keys and tiers of a row of `tokens`; 0 when a block's `limit` is too
// small for them, and the kernel reads them from global memory again and again.
std::size_t select_cache_bytes(int tokens, std::size_t limit);
cudaError_t select_tokens(const Select &arguments, cudaStream_t stream);
// Whether the driver takes these kernels, and there are some for the current device.
cudaError_t can_run();

// merge.cu: evicted keys and values fold into their pivots, in place, or into other memory that holds the kept rows
// only.
struct Merge {
    Rows key, value;
    Rows out_key, out_value;            // key and value again: in place
    const int *kept, *evicted, *pivot;  // [B, H, K], [B, H, E], [B, H, E] contiguous
    const float *evicted_weight;        // [B, H, E] contiguous
    const float *kept_weight;           // [B, H, K] contiguous
    const float *votes;                 // [B, H, N] contiguous; null: each token stands for itself
    float *out_votes;                   // [B, H, K] contiguous; null: not wanted
    Dtype key_dtype, value_dtype;
    int batch, heads, tokens, kept_size, evicted_size;
};
// How the evicted tokens of all rows are sorted and cut, and where that lies in the workspace (offsets in bytes).
struct MergePlan {
    std::int64_t items;     // B H E tokens to sort
    int key_bits;           // of a sort key, row (K + 1) + pivot, K instead for "merges nowhere"; 32 at most
    int tiles;              // whole tiles in the sorted order of one row
    std::size_t keys[2];    // [items] sort keys, twice
    std::size_t places[2];  // [items] int32 places in the evicted list of a row, twice
    std::size_t starts;     // [B H, K + 1] int32 where the run of a pivot begins in the sorted order of its row
    std::size_t sums;       // [B H, tiles, D + Dv] float32
    std::size_t sort;       // what CUB needs, the rest of the workspace
};
MergePlan merge_plan(int batch, int heads, int kept_size, int evicted_size, int key_width, int value_width);
// Bytes of the whole workspace on the current device.
cudaError_t merge_workspace(const MergePlan &plan, std::size_t *bytes);
// workspace: `bytes` of device memory, at a multiple of 256.
cudaError_t merge(const Merge &arguments, void *workspace, std::size_t bytes, cudaStream_t stream);

// compact.cu: the kept rows move to the front, in place, or into other memory.
struct Compact {
    Rows key, value;
    Rows out_key, out_value;  // key and value again: in place
    const int *kept;          // [B, H, K] contiguous
    Dtype key_dtype, value_dtype;
    int batch, heads, tokens, kept_size;
};
// Bytes of a row that one block moves (32, 64 or 128): as many as leave every multiprocessor two blocks, 32 at least.
int compact_slab_bytes(std::int64_t rows, std::int64_t key_bytes, std::int64_t value_bytes, int multiprocessors);
cudaError_t compact(const Compact &arguments, cudaStream_t stream);

}  // namespace lookm
