// Compaction in place: a block walks one (row, head) of keys or values and a slab of its bytes, without a second
// buffer. Into other memory nothing is in the way: every step of the walk has a block of its own.
//
// Kept indices ascend, so the places that move right (more empty places than tokens skipped) come first and are walked
// backwards, those that move left come after and are walked forwards: no row is overwritten before it was read. The
// rows that the two read and write are disjoint. The empty places, which right movers may still have to read, are last.
#include <algorithm>

#include "common.cuh"

namespace lookm {
namespace {

constexpr int kThreads = 512;
constexpr int kHeld = 4;  // rows a thread holds between the loads and the stores of a step

// Of places 0 to size - 1, `before` being true of the first ones and false of the rest, how many the first are.
template <typename Predicate>
__device__ int partition_point(int size, Predicate before) {
    int low = 0;
    while (size > 0) {
        const int step = static_cast<int>(ceil_div(size, kThreads));
        const std::int64_t probe = static_cast<std::int64_t>(threadIdx.x) * step;
        const int count = __syncthreads_count(probe < size && before(low + static_cast<int>(probe)));
        if (count == 0) return low;
        const int done = (count - 1) * step + 1;
        low += done;
        size = min(step - 1, size - done);
    }
    return low;
}

template <typename Chunk>
struct Walk {
    const char *x;  // this thread's chunk of row 0
    std::int64_t stride;
    char *out;
    std::int64_t out_stride;
    const int *kept;
    int first, rows;  // the thread's row in a step, and how many rows apart its rows are
    bool inside;      // whether the row is that wide
    bool in_place;

    __device__ const Chunk &row(int n) const { return *reinterpret_cast<const Chunk *>(x + n * stride); }
    __device__ Chunk &out_row(int n) const { return *reinterpret_cast<Chunk *>(out + n * out_stride); }
    __device__ int step() const { return kHeld * rows; }

    // Places begin to begin + step() - 1, those inside [low, high): all are read before any is written.
    __device__ void move(int begin, int low, int high) const {
        int place[kHeld], token[kHeld];
        bool moves[kHeld];
        Chunk held[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            place[i] = begin + i * rows + first;
            const bool mine = inside && place[i] >= low && place[i] < high;
            token[i] = mine ? kept[place[i]] : -1;
            // a row that stays where it is is neither read nor written
            moves[i] = mine && !(in_place && token[i] == place[i]);
        }
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            held[i] = Chunk{};
            if (moves[i] && token[i] >= 0) held[i] = row(token[i]);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (moves[i]) out_row(place[i]) = held[i];
        }
    }
};

// The rows: strides and widths in bytes. walks: blocks that share the places of a (row, head), 1 in place.
template <typename Chunk>
__global__ void __launch_bounds__(kThreads)
    compact_kernel(Rows key, Rows value, Rows out_key, Rows out_value, const int *kept, int heads, int kept_size,
                   int slab_bytes, int key_slabs, int slabs, int walks, bool in_place) {
    const int row = blockIdx.x / (slabs * walks);
    const int slab = blockIdx.x % slabs;
    const Rows &x = slab < key_slabs ? key : value;
    const Rows &out = slab < key_slabs ? out_key : out_value;
    const int chunks = slab_bytes / static_cast<int>(sizeof(Chunk));
    const int byte = (slab < key_slabs ? slab : slab - key_slabs) * slab_bytes +
                     static_cast<int>(threadIdx.x) % chunks * static_cast<int>(sizeof(Chunk));
    kept += static_cast<std::int64_t>(row) * kept_size;
    const Walk<Chunk> walk{
        static_cast<const char *>(x.data) + row / heads * x.stride_b + row % heads * x.stride_h + byte,
        x.stride_n,
        static_cast<char *>(out.data) + row / heads * out.stride_b + row % heads * out.stride_h + byte,
        out.stride_n,
        kept,
        static_cast<int>(threadIdx.x) / chunks,
        kThreads / chunks,
        byte < x.width,
        in_place};

    if (!in_place) {
        const int begin = static_cast<int>(blockIdx.x) / slabs % walks * walk.step();
        walk.move(begin, 0, kept_size);
        return;
    }
    // kept[c] - c never falls
    const int empty = partition_point(kept_size, [=](int c) { return kept[c] < 0; });
    const int middle = partition_point(kept_size, [=](int c) { return kept[c] < c; });
    for (int end = middle; end > empty; end -= walk.step()) walk.move(end - walk.step(), empty, end);
    for (int begin = middle; begin < kept_size; begin += walk.step()) walk.move(begin, middle, kept_size);
    for (int begin = 0; begin < empty; begin += walk.step()) walk.move(begin, 0, empty);
}

Rows in_bytes(const Rows &x, int item) {
    return {x.data, x.stride_b * item, x.stride_h * item, x.stride_n * item, x.width * item};
}

template <typename Chunk>
cudaError_t launch_compact(const Compact &a, cudaStream_t stream) {
    int device = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const int key_item = item_bytes(a.key_dtype), value_item = item_bytes(a.value_dtype);
    const Rows key = in_bytes(a.key, key_item), value = in_bytes(a.value, value_item);
    const Rows out_key = in_bytes(a.out_key, key_item), out_value = in_bytes(a.out_value, value_item);
    const std::int64_t rows = static_cast<std::int64_t>(a.batch) * a.heads;
    const int slab = compact_slab_bytes(rows, key.width, value.width, multiprocessors);
    const std::int64_t key_slabs = ceil_div(key.width, slab), slabs = key_slabs + ceil_div(value.width, slab);
    const bool in_place = a.key.data == a.out_key.data;
    const int step = kHeld * kThreads / (slab / static_cast<int>(sizeof(Chunk)));
    const std::int64_t walks = in_place ? 1 : ceil_div(a.kept_size, step);
    return launch(compact_kernel<Chunk>, a.kept_size ? rows * slabs * walks : 0, kThreads, 0, stream, key, value,
                  out_key, out_value, a.kept, a.heads, a.kept_size, slab, static_cast<int>(key_slabs),
                  static_cast<int>(slabs), static_cast<int>(walks), in_place);
}

}  // namespace

int compact_slab_bytes(std::int64_t rows, std::int64_t key_bytes, std::int64_t value_bytes, int multiprocessors) {
    int slab = 128;
    while (slab > 32 && rows * (ceil_div(key_bytes, slab) + ceil_div(value_bytes, slab)) < 2 * multiprocessors) {
        slab /= 2;
    }
    return slab;
}

cudaError_t compact(const Compact &a, cudaStream_t stream) {
    const int key_item = item_bytes(a.key_dtype), value_item = item_bytes(a.value_dtype);
    switch (std::min({access_bytes(a.key, a.batch, a.heads, a.tokens, key_item),
                      access_bytes(a.value, a.batch, a.heads, a.tokens, value_item),
                      access_bytes(a.out_key, a.batch, a.heads, a.kept_size, key_item),
                      access_bytes(a.out_value, a.batch, a.heads, a.kept_size, value_item)})) {
        case 16: return launch_compact<uint4>(a, stream);
        case 8: return launch_compact<uint2>(a, stream);
        case 4: return launch_compact<unsigned>(a, stream);
        default: return launch_compact<unsigned short>(a, stream);
    }
}

}  // namespace lookm
