/* Rotated views on a GPU: a block reads a tile of one image once and writes it into every view, through
   shared memory, so that both sides move 16 bytes an access. No header of CUDA or torch is needed. */
#include "tile.h"

template <typename T, int OUT, bool WHOLE> __device__ __forceinline__ void tiles(const Batch &b) {
    using Tile = Tile<T, OUT, WHOLE>;
    __shared__ typename Tile::Source source;
    __shared__ typename Tile::Staged staged[2]; /* two, so that one barrier a view is enough */
    typename Tile::Pixel quad[2][2];
    int thread = threadIdx.x;
    Tile::fill(b, thread, source);
    Part part = part_of(b, blockIdx.x);
    Tile::load(b, part, thread, source);
    __syncthreads();
    Tile::normalise(thread, source, quad);
#pragma unroll 1
    for (int view = 0; view < b.views; view++) {
        struct way way = way_of(b.flips[part.image], b.turns[part.image * b.views + view]);
        Tile::stage(part, way, thread, quad, staged[view % 2]);
        __syncthreads();
        Tile::store(b, part, way, view, thread, staged[view % 2]);
    }
}

template <typename T> __device__ __forceinline__ void pixels(const Batch &b) {
    long long at = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < b.images * b.side * b.side) scatter<T>(b, at);
}

/* together: blocks a processor must hold at once, which bounds the registers; more of them would spill. */
#define KERNELS(T, name, together)                                                                                     \
    KERNEL(name##_3_chunks, together, (tiles<T, 3, true>(b)))                                                          \
    KERNEL(name##_4_chunks, together, (tiles<T, 4, true>(b)))                                                          \
    KERNEL(name##_3_values, 3, (tiles<T, 3, false>(b)))                                                                \
    KERNEL(name##_4_values, 3, (tiles<T, 4, false>(b)))                                                                \
    KERNEL(name##_any, together, (pixels<T>(b)))
#define KERNEL(name, together, body)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, together) name(const Batch b) { body; }

KERNELS(float, float32, 3)
KERNELS(Half, float16, 4)
KERNELS(Brain, bfloat16, 4)
