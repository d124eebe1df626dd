// Compaction in place: a block walks one (row, head) of keys or values and a slab of its bytes, without a second
// buffer.
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
    char *x;  // this thread's chunk of row 0
    std::int64_t stride;
    const int *kept;
    int first, rows;  // the thread's row in a step, and how many rows apart its rows are
    bool inside;      // whether the row is that wide

    __device__ Chunk &row(int n) const { return *reinterpret_cast<Chunk *>(x + n * stride); }
    __device__ int step() const { return kHeld * rows; }

    // Places begin to begin + step() - 1, those inside [low, high): all are read before any is written.
    __device__ void move(int begin, int low, int high) const {
        int place[kHeld], token[kHeld];
        Chunk held[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            place[i] = begin + i * rows + first;
            const bool mine = inside && place[i] >= low && place[i] < high;
            // a row that stays where it is is neither read nor written
            token[i] = mine ? kept[place[i]] : place[i];
        }
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            held[i] = Chunk{};
            if (token[i] >= 0 && token[i] != place[i]) held[i] = row(token[i]);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (token[i] != place[i]) row(place[i]) = held[i];
        }
    }
};

// key, value: strides and widths in bytes.
template <typename Chunk>
__global__ void __launch_bounds__(kThreads) compact_kernel(Rows key, Rows value, const int *kept, int heads,
                                                           int kept_size, int slab_bytes, int key_slabs, int slabs) {
    const int row = blockIdx.x / slabs;
    const int slab = blockIdx.x % slabs;
    const Rows &x = slab < key_slabs ? key : value;
    const int chunks = slab_bytes / static_cast<int>(sizeof(Chunk));
    const int byte = (slab < key_slabs ? slab : slab - key_slabs) * slab_bytes +
                     static_cast<int>(threadIdx.x) % chunks * static_cast<int>(sizeof(Chunk));
    kept += static_cast<std::int64_t>(row) * kept_size;
    const Walk<Chunk> walk{static_cast<char *>(x.data) + row / heads * x.stride_b + row % heads * x.stride_h + byte,
                           x.stride_n,
                           kept,
                           static_cast<int>(threadIdx.x) / chunks,
                           kThreads / chunks,
                           byte < x.width};

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
    const Rows key = in_bytes(a.key, item_bytes(a.key_dtype)), value = in_bytes(a.value, item_bytes(a.value_dtype));
    const std::int64_t rows = static_cast<std::int64_t>(a.batch) * a.heads;
    const int slab = compact_slab_bytes(rows, key.width, value.width, multiprocessors);
    const std::int64_t key_slabs = ceil_div(key.width, slab), slabs = key_slabs + ceil_div(value.width, slab);
    return launch(compact_kernel<Chunk>, a.kept_size ? rows * slabs : 0, kThreads, 0, stream, key, value, a.kept,
                  a.heads, a.kept_size, slab, static_cast<int>(key_slabs), static_cast<int>(slabs));
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
    switch (std::min(access_bytes(a.key, a.batch, a.heads, a.tokens, item_bytes(a.key_dtype)),
                     access_bytes(a.value, a.batch, a.heads, a.tokens, item_bytes(a.value_dtype)))) {
        case 16: return launch_compact<uint4>(a, stream);
        case 8: return launch_compact<uint2>(a, stream);
        case 4: return launch_compact<unsigned>(a, stream);
        default: return launch_compact<unsigned short>(a, stream);
    }
}

}  // namespace lookm
