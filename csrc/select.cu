// Radix selection on (tier, score), then an ordered compaction of the row: one block a (row, head).
//
// The first pass orders the scores, keeps keys and tiers in shared memory where a row fits, and counts the highest
// digits of every tier; two more digits find the score at the line. Then every warp counts its part of the row, one
// prefix sum gives each its places, and both lists are written in order.
#include <cub/block/block_scan.cuh>

#include "common.cuh"

namespace lookm {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTiers = 3;
constexpr int kBins = 2048;  // of 11 bits; the third digit has 10
constexpr unsigned kAll = 0xffffffff;

// Tokens of a part of the row: above the line, at it, and all that are valid.
struct Counts {
    int above, tied, valid;
};

struct AddCounts {
    __host__ __device__ Counts operator()(const Counts &a, const Counts &b) const {
        return {a.above + b.above, a.tied + b.tied, a.valid + b.valid};
    }
};

// the scan by warps needs the fewest registers and the least shared memory
using CountScan = cub::BlockScan<Counts, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
using BinScan = cub::BlockScan<int, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;

struct Shared {
    int bins[kTiers][kBins];
    union {
        typename CountScan::TempStorage counts;
        typename BinScan::TempStorage bins;
    } scan;
    int digit, wanted, tier_size[kTiers];
};

// Orders as the score does; 0, below every finite score, for NaN and infinities; -0 as 0.
__device__ unsigned order_key(float score) {
    if (!(fabsf(score) < INFINITY)) return 0;
    const unsigned bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits ^ 0x80000000u;
}

struct Token {
    unsigned key;
    int tier;
};

// The keys and tiers of a row, out of global memory. Four tokens a step and thread.
struct GlobalRow {
    const float *scores;
    const int *tiers;
    int tokens;

    __device__ Token at(int n) const { return {order_key(scores[n]), tiers[n] & 3}; }
};

// The same out of shared memory: four keys and a byte with their four tiers for every four tokens.
struct CachedRow {
    uint4 *keys;
    unsigned char *tiers;
    int tokens;

    __device__ Token at(int n) const {
        return {reinterpret_cast<const unsigned *>(keys)[n], tiers[n / 4] >> (2 * (n % 4)) & 3};
    }
};

// Finds the bin of `bins`, walked from the highest, where the count reaches shared.wanted; leaves in shared its number
// and how many of it are wanted. Of no wanted ones nothing is found.
__device__ void find_digit(Shared &shared, const int *bins) {
    // a thread's two neighbouring bins
    const int high = kBins - 1 - 2 * static_cast<int>(threadIdx.x), low = high - 1;
    const int wanted = shared.wanted;
    int before;
    BinScan(shared.scan.bins).ExclusiveSum(bins[high] + bins[low], before);
    // what is wanted was read by all before one writes it
    __syncthreads();
    const int between = before + bins[high], after = between + bins[low];
    if (before < wanted && wanted <= after) {
        shared.digit = wanted <= between ? high : low;
        shared.wanted = wanted - (wanted <= between ? before : between);
    }
    __syncthreads();
}

// Counts the digits at `shift` of the tokens of a tier whose higher digits are those of `line`.
template <typename Row>
__device__ void count_digits(int *bins, const Row &row, int tier, unsigned line, int shift, int bits) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) bins[bin] = 0;
    __syncthreads();
    const int above = shift + bits;
#pragma unroll 4
    for (int n = threadIdx.x; n < row.tokens; n += kThreads) {
        const Token token = row.at(n);
        if (token.tier == tier && token.key >> above == line >> above) {
            atomicAdd(&bins[token.key >> shift & ((1 << bits) - 1)], 1);
        }
    }
    __syncthreads();
}

// Where kept and evicted tokens part: in `tier`, at the score `line`, of whose ties the first `ties` stay.
struct Line {
    int tier;
    unsigned key;
    int ties;

    __device__ bool above(const Token &token) const {
        return token.tier > tier || (token.tier == tier && token.key > key);
    }
    __device__ bool tied(const Token &token) const { return token.tier == tier && token.key == key; }
};

// Writes the lists of a row: every warp its own part, 32 tokens a step.
template <typename Row>
__device__ void write_lists(Shared &shared, const Row &row, const Line &line, int *kept, int *evicted) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const unsigned lower = (1u << lane) - 1;
    const int part = static_cast<int>(ceil_div(ceil_div(row.tokens, kWarps), kWarp)) * kWarp;
    const std::int64_t start = static_cast<std::int64_t>(warp) * part;
    const int begin = start < row.tokens ? static_cast<int>(start) : row.tokens;
    const int end = row.tokens - begin < part ? row.tokens : begin + part;

    Counts own{0, 0, 0};
    for (int first = begin; first < end; first += kWarp) {
        const Token token = first + lane < end ? row.at(first + lane) : Token{0, 0};
        own.above += token.tier > 0 && line.above(token);
        own.tied += token.tier > 0 && line.tied(token);
        own.valid += token.tier > 0;
    }
    Counts before;
    CountScan(shared.scan.counts).ExclusiveScan(own, before, Counts{0, 0, 0}, AddCounts());
    before.above = __shfl_sync(kAll, before.above, 0);
    before.tied = __shfl_sync(kAll, before.tied, 0);
    before.valid = __shfl_sync(kAll, before.valid, 0);

    for (int first = begin; first < end; first += kWarp) {
        const int n = first + lane;
        const Token token = n < end ? row.at(n) : Token{0, 0};
        const bool valid = token.tier > 0, above = valid && line.above(token), tied = valid && line.tied(token);
        const unsigned valids = __ballot_sync(kAll, valid), aboves = __ballot_sync(kAll, above);
        const unsigned ties = __ballot_sync(kAll, tied);
        // of equal scores the lower index stays
        const int tied_before = before.tied + __popc(ties & lower);
        const bool stays = above || (tied && tied_before < line.ties);
        const int stay_before = before.above + __popc(aboves & lower) + min(tied_before, line.ties);
        if (stays) kept[stay_before] = n;
        if (valid && !stays) evicted[before.valid + __popc(valids & lower) - stay_before] = n;
        before.above += __popc(aboves);
        before.tied += __popc(ties);
        before.valid += __popc(valids);
    }
}

__device__ void fill_empty(int *list, int places) {
    for (int place = threadIdx.x; place < places; place += kThreads) list[place] = -1;
}

template <typename Row>
__device__ void select_row(Shared &shared, const Row &row, int keep, int *kept, int kept_size, int *evicted,
                           int evicted_size) {
    // tokens of the tiers 1, 2 and 3, from the counts of their highest digits
    for (int tier = 0; tier < kTiers; ++tier) {
        int before, size;
        const int *bins = shared.bins[tier];
        BinScan(shared.scan.bins).ExclusiveSum(bins[2 * threadIdx.x] + bins[2 * threadIdx.x + 1], before, size);
        if (threadIdx.x == 0) shared.tier_size[tier] = size;
        __syncthreads();
    }
    const int image = shared.tier_size[0], text = shared.tier_size[1], secured = shared.tier_size[2];
    const int valid = image + text + secured;
    keep = min(keep, valid);
    Line line{keep <= secured ? 3 : keep <= secured + text ? 2 : 1, kAll, 0};
    if (keep > 0) {
        if (threadIdx.x == 0) shared.wanted = keep - (line.tier < 3 ? secured : 0) - (line.tier < 2 ? text : 0);
        __syncthreads();
        find_digit(shared, shared.bins[line.tier - 1]);
        line.key = static_cast<unsigned>(shared.digit) << 21;
        count_digits(shared.bins[0], row, line.tier, line.key, 10, 11);
        find_digit(shared, shared.bins[0]);
        line.key |= static_cast<unsigned>(shared.digit) << 10;
        count_digits(shared.bins[0], row, line.tier, line.key, 0, 10);
        find_digit(shared, shared.bins[0]);
        line.key |= shared.digit;
        line.ties = shared.wanted;
    }
    const int kept_empty = kept_size - keep, evicted_empty = evicted_size - (valid - keep);
    fill_empty(kept, kept_empty);
    fill_empty(evicted, evicted_empty);
    write_lists(shared, row, line, kept + kept_empty, evicted + evicted_empty);
}

// VECTORS: rows start at multiples of 16 bytes. CACHED: keys and tiers stay in shared memory.
template <bool VECTORS, bool CACHED>
__global__ void __launch_bounds__(kThreads, 1) select_kernel(Select a) {
    __shared__ Shared shared;
    const std::int64_t pid = blockIdx.x;
    const int quads = static_cast<int>(ceil_div(a.tokens, 4));
    const GlobalRow global{a.scores + pid * a.tokens, a.tier + pid / a.heads * a.tokens, a.tokens};
    const CachedRow cached{dynamic_memory, reinterpret_cast<unsigned char *>(dynamic_memory + quads), a.tokens};
    const int keep = a.keeps ? a.keeps[pid / a.heads] : a.keep;

    for (int bin = threadIdx.x; bin < kTiers * kBins; bin += kThreads) (&shared.bins[0][0])[bin] = 0;
    __syncthreads();
#pragma unroll 4
    for (int quad = threadIdx.x; quad < quads; quad += kThreads) {
        float score[4];
        int tier[4];
        if (VECTORS) {
            const float4 four_scores = reinterpret_cast<const float4 *>(global.scores)[quad];
            const int4 four_tiers = reinterpret_cast<const int4 *>(global.tiers)[quad];
            score[0] = four_scores.x, score[1] = four_scores.y, score[2] = four_scores.z, score[3] = four_scores.w;
            tier[0] = four_tiers.x, tier[1] = four_tiers.y, tier[2] = four_tiers.z, tier[3] = four_tiers.w;
        } else {
            for (int i = 0; i < 4; ++i) {
                const bool inside = quad < quads - 1 || 4 * quad + i < a.tokens;
                score[i] = inside ? global.scores[4 * static_cast<std::int64_t>(quad) + i] : 0.0f;
                tier[i] = inside ? global.tiers[4 * static_cast<std::int64_t>(quad) + i] : 0;
            }
        }
        unsigned key[4];
        int packed = 0;
        for (int i = 0; i < 4; ++i) {
            key[i] = order_key(score[i]);
            packed |= (tier[i] & 3) << (2 * i);
            if (tier[i] & 3) atomicAdd(&shared.bins[(tier[i] & 3) - 1][key[i] >> 21], 1);
        }
        if (CACHED) {
            cached.keys[quad] = {key[0], key[1], key[2], key[3]};
            cached.tiers[quad] = static_cast<unsigned char>(packed);
        }
    }
    __syncthreads();
    int *kept = a.kept + pid * a.kept_size, *evicted = a.evicted + pid * a.evicted_size;
    if (CACHED) {
        select_row(shared, cached, keep, kept, a.kept_size, evicted, a.evicted_size);
    } else {
        select_row(shared, global, keep, kept, a.kept_size, evicted, a.evicted_size);
    }
}

template <bool VECTORS, bool CACHED>
cudaError_t launch_select(const Select &a, std::size_t cache_bytes, std::size_t limit, cudaStream_t stream) {
    const auto kernel = select_kernel<VECTORS, CACHED>;
    if (CACHED) {
        // the same for every launch: another thread may be about to launch with another size
        const int most = static_cast<int>(limit - sizeof(Shared));
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        if (error != cudaSuccess) return error;
    }
    return launch(kernel, static_cast<std::int64_t>(a.batch) * a.heads, kThreads, cache_bytes, stream, a);
}

}  // namespace

std::size_t select_cache_bytes(int tokens, std::size_t limit) {
    const std::size_t quads = ceil_div(tokens, 4), bytes = quads * (sizeof(uint4) + 1);
    return bytes + sizeof(Shared) <= limit ? bytes : 0;
}

cudaError_t select_tokens(const Select &a, cudaStream_t stream) {
    int device = 0, limit = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    const std::size_t cache = select_cache_bytes(a.tokens, limit);
    const auto address = reinterpret_cast<std::uintptr_t>(a.scores) | reinterpret_cast<std::uintptr_t>(a.tier);
    const bool vectors = a.tokens % 4 == 0 && address % 16 == 0;
    if (vectors) {
        return cache ? launch_select<true, true>(a, cache, limit, stream)
                     : launch_select<true, false>(a, 0, limit, stream);
    }
    return cache ? launch_select<false, true>(a, cache, limit, stream)
                 : launch_select<false, false>(a, 0, limit, stream);
}

cudaError_t can_run() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, select_kernel<true, true>);
}

}  // namespace lookm
