/* The CUDA kernels, a thread's share at a time. rotate.cu runs the phases on a GPU, a barrier after each;
   the tests run the same code on the host, thread after thread. */
#ifndef FASTROT_TILE_H
#define FASTROT_TILE_H

#include "index.h"

#ifdef __CUDACC__
#define PHASE static __device__ __forceinline__
#else
#define PHASE static inline
#endif

/* A block takes TILE x TILE pixels of one image; each of its threads takes 2 x 2 of them. */
constexpr int TILE = 32, THREADS = TILE * TILE / 4, IN = 3;
static_assert(THREADS == 256, "a thread a byte value");

struct Batch {
    const unsigned char *x, *flips, *turns; /* [n, S, S, in_channels], [n], [n, V] */
    const float *mean, *std;                /* [in_channels] */
    void *out;                              /* [n, V, S, S, channels] */
    long long images;
    int side, views, in_channels, channels;
};

struct alignas(16) Chunk {
    unsigned words[4];
};

struct Brain {
    unsigned short bits;
};
struct Half {
    unsigned short bits;
};

PHASE void round_to(float value, float &to) { to = value; }
#ifdef __CUDACC__
PHASE void round_to(float value, Brain &to) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value)); }
PHASE void round_to(float value, Half &to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value)); }
#endif

/* Plain `/` is correctly rounded, in CUDA too unless told otherwise. */
template <typename T> PHASE T normalised(const Batch &b, unsigned char value, int channel) {
    T to;
    round_to((static_cast<float>(value) - b.mean[channel]) / b.std[channel], to);
    return to;
}

/* A block's part of an image: height x width pixels from (r, c). */
struct Part {
    long long image;
    int r, c, height, width;
};

BOTH_SIDES int least(int a, int b) { return a < b ? a : b; }

BOTH_SIDES Part part_of(const Batch &b, unsigned block) {
    int across = (b.side + TILE - 1) / TILE, tile = static_cast<int>(block % (across * across));
    Part part;
    part.image = block / (across * across);
    part.r = tile / across * TILE;
    part.c = tile % across * TILE;
    part.height = least(TILE, b.side - part.r);
    part.width = least(TILE, b.side - part.c);
    return part;
}

/* WHOLE: the side is a multiple of 16 and all memory is aligned to 16 bytes, so that every row of every
   part is a number of chunks, read and written; else bytes are read and values written one by one. */
template <typename T, int OUT, bool WHOLE> struct Tile {
    struct Pixel {
        T values[OUT];
    };
    static constexpr int PAIR = 2 * OUT * sizeof(T);
    static constexpr int ALIGNED = PAIR % 16 == 0 ? 16 : PAIR % 8 == 0 ? 8 : 4;
    struct alignas(ALIGNED) Pair {
        Pixel pixels[2];
    };
    /* Bytes a row of a view's tile; the last 16 are empty, to spread its columns over the banks. */
    static constexpr int PITCH = TILE * OUT * sizeof(T) + 16;
    struct alignas(16) Source {
        unsigned char bytes[TILE][TILE * IN];
        T table[IN][256];
    };
    struct alignas(16) Staged {
        unsigned char bytes[TILE * PITCH];
    };

    /* Phase 1: what bytes become (one division a byte value is a quarter of one a source value, and
       leaves registers free) and the source's part into shared memory. */
    PHASE void fill(const Batch &b, int thread, Source &to) {
#pragma unroll 1
        for (int channel = 0; channel < IN; channel++)
            to.table[channel][thread] = normalised<T>(b, static_cast<unsigned char>(thread), channel);
    }

    PHASE void load(const Batch &b, const Part &part, int thread, Source &to) {
        const unsigned char *from = b.x + ((part.image * b.side + part.r) * b.side + part.c) * IN;
        long long line = static_cast<long long>(b.side) * IN;
        if (WHOLE) {
            int each = part.width * IN / 16;
            for (int k = thread; k < part.height * each; k += THREADS)
                *reinterpret_cast<Chunk *>(to.bytes[k / each] + k % each * 16) =
                    *reinterpret_cast<const Chunk *>(from + k / each * line + k % each * 16);
        } else {
            int each = part.width * IN;
            for (int k = thread; k < part.height * each; k += THREADS)
                to.bytes[k / each][k % each] = from[k / each * line + k % each];
        }
    }

    /* Row and column in the part of a thread's first pixel: a warp takes 8 x 4 quads, which spreads
       both rows and columns of them over the banks. */
    BOTH_SIDES int row_in_part(int thread) { return (thread / 64 * 4 + thread % 32 / 8) * 2; }
    BOTH_SIDES int column_in_part(int thread) { return (thread / 32 % 2 * 8 + thread % 8) * 2; }

    /* Phase 2: this thread's four pixels, normalised, in registers. */
    PHASE void normalise(int thread, const Source &from, Pixel (&quad)[2][2]) {
        int r = row_in_part(thread), c = column_in_part(thread);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            Pixel pixel = {};
#pragma unroll
            for (int channel = 0; channel < IN; channel++)
                pixel.values[channel] = from.table[channel][from.bytes[r + k / 2][(c + k % 2) * IN + channel]];
            quad[k / 2][k % 2] = pixel;
        }
    }

    /* Phase 3, for each view: the quad to where it lies in the view's tile. The eight ways are compiled
       one by one, since registers cannot be indexed. */
    PHASE void stage(const Part &part, struct way way, int thread, const Pixel (&quad)[2][2], Staged &to) {
        switch (way.transposed * 4 + way.down * 2 + way.mirrored) {
        case 0: stage_as<0, 0, 0>(part, thread, quad, to); break;
        case 1: stage_as<0, 0, 1>(part, thread, quad, to); break;
        case 2: stage_as<0, 1, 0>(part, thread, quad, to); break;
        case 3: stage_as<0, 1, 1>(part, thread, quad, to); break;
        case 4: stage_as<1, 0, 0>(part, thread, quad, to); break;
        case 5: stage_as<1, 0, 1>(part, thread, quad, to); break;
        case 6: stage_as<1, 1, 0>(part, thread, quad, to); break;
        default: stage_as<1, 1, 1>(part, thread, quad, to);
        }
    }

    template <int TRANSPOSED, int DOWN, int MIRRORED>
    PHASE void stage_as(const Part &part, int thread, const Pixel (&quad)[2][2], Staged &to) {
        constexpr struct way way = {TRANSPOSED, DOWN, MIRRORED};
        int r = row_in_part(thread), c = column_in_part(thread);
        int height = TRANSPOSED ? part.width : part.height, width = TRANSPOSED ? part.height : part.width;
        if (WHOLE) {
            if (r >= part.height || c >= part.width) return;
            int row = row_of(way, height, r + (!TRANSPOSED && DOWN), c + (TRANSPOSED && DOWN));
            int column = column_of(way, width, r + (TRANSPOSED && MIRRORED), c + (!TRANSPOSED && MIRRORED));
#pragma unroll
            for (int down = 0; down < 2; down++) {
                Pair pair;
#pragma unroll
                for (int right = 0; right < 2; right++) {
                    int r_of = TRANSPOSED ? right ^ MIRRORED : down ^ DOWN;
                    int c_of = TRANSPOSED ? down ^ DOWN : right ^ MIRRORED;
                    pair.pixels[right] = quad[r_of][c_of];
                }
                *reinterpret_cast<Pair *>(to.bytes + (row + down) * PITCH + column * OUT * sizeof(T)) = pair;
            }
        } else {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int rk = r + k / 2, ck = c + k % 2;
                if (rk >= part.height || ck >= part.width) continue;
                int row = row_of(way, height, rk, ck), column = column_of(way, width, rk, ck);
                *reinterpret_cast<Pixel *>(to.bytes + row * PITCH + column * OUT * sizeof(T)) = quad[k / 2][k % 2];
            }
        }
    }

    /* Phase 4, for each view: its tile to its place. */
    PHASE void store(const Batch &b, const Part &part, struct way way, int view, int thread, const Staged &from) {
        int last_r = part.r + part.height - 1, last_c = part.c + part.width - 1;
        int row = least(row_of(way, b.side, part.r, part.c), row_of(way, b.side, last_r, last_c));
        int column = least(column_of(way, b.side, part.r, part.c), column_of(way, b.side, last_r, last_c));
        int height = way.transposed ? part.width : part.height, width = way.transposed ? part.height : part.width;
        long long first = ((part.image * b.views + view) * b.side + row) * b.side + column;
        T *to = static_cast<T *>(b.out) + first * OUT;
        if (!WHOLE) copy<T>(b.side, height, width * OUT, thread, from, to);
        else if (width == TILE) copy<Chunk>(b.side, height, TILE * OUT * sizeof(T) / 16, thread, from, to);
        else copy<Chunk>(b.side, height, TILE / 2 * OUT * sizeof(T) / 16, thread, from, to);
    }

    template <typename Unit>
    PHASE void copy(int side, int height, int each, int thread, const Staged &from, T *to) {
#pragma unroll 2 /* four would spill */
        for (int k = thread; k < height * each; k += THREADS) {
            int row = k / each, unit = k % each;
            T *line = to + static_cast<long long>(row) * side * OUT;
            reinterpret_cast<Unit *>(line)[unit] = reinterpret_cast<const Unit *>(from.bytes + row * PITCH)[unit];
        }
    }
};

/* Any number of channels: a thread a source pixel, a value at a time. */
template <typename T> PHASE void scatter(const Batch &b, long long at) {
    long long pixels = static_cast<long long>(b.side) * b.side, image = at / pixels;
    int r = static_cast<int>(at % pixels / b.side), c = static_cast<int>(at % b.side);
    for (int view = 0; view < b.views; view++) {
        struct way way = way_of(b.flips[image], b.turns[image * b.views + view]);
        long long row = row_of(way, b.side, r, c), column = column_of(way, b.side, r, c);
        T *to = static_cast<T *>(b.out) + ((image * b.views + view) * pixels + row * b.side + column) * b.channels;
        for (int channel = 0; channel < b.channels; channel++)
            to[channel] = channel < b.in_channels ? normalised<T>(b, b.x[at * b.in_channels + channel], channel) : T{};
    }
}

#endif
