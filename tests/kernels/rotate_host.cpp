/* The CUDA kernels' device functions run on the host, thread after thread, phase after phase. */
#include <cstdint>
#include <cstring>
#include <vector>

#include "tile.h"

static void round_to(float value, Brain &to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to.bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <typename T, int OUT, bool WHOLE> static void tiles(const Batch &b) {
    using Tile = Tile<T, OUT, WHOLE>;
    static typename Tile::Source source;
    static typename Tile::Staged staged[2];
    unsigned across = (b.side + TILE - 1) / TILE, blocks = static_cast<unsigned>(b.images) * across * across;
    std::vector<typename Tile::Pixel[2][2]> quads(THREADS);
    for (unsigned block = 0; block < blocks; block++) {
        Part part = part_of(b, block);
        std::memset(staged, 0xff, sizeof staged); /* a value that is read and was never staged is NaN */
        for (int t = 0; t < THREADS; t++) Tile::fill(b, t, source);
        for (int t = 0; t < THREADS; t++) Tile::load(b, part, t, source);
        for (int t = 0; t < THREADS; t++) Tile::normalise(t, source, quads[t]);
        for (int view = 0; view < b.views; view++) {
            struct way way = way_of(b.flips[part.image], b.turns[part.image * b.views + view]);
            for (int t = 0; t < THREADS; t++) Tile::stage(part, way, t, quads[t], staged[view % 2]);
            for (int t = 0; t < THREADS; t++) Tile::store(b, part, way, view, t, staged[view % 2]);
        }
    }
}

template <typename T> static void pixels(const Batch &b) {
    for (long long at = 0; at < b.images * b.side * b.side; at++) scatter<T>(b, at);
}

#define KERNELS(T, name)                                                                                               \
    extern "C" void name##_3_chunks(const Batch *b) { tiles<T, 3, true>(*b); }                                         \
    extern "C" void name##_4_chunks(const Batch *b) { tiles<T, 4, true>(*b); }                                         \
    extern "C" void name##_3_values(const Batch *b) { tiles<T, 3, false>(*b); }                                        \
    extern "C" void name##_4_values(const Batch *b) { tiles<T, 4, false>(*b); }                                        \
    extern "C" void name##_any(const Batch *b) { pixels<T>(*b); }

KERNELS(float, float32)
KERNELS(Brain, bfloat16)
