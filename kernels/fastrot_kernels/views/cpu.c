/* Rotated views on the CPU. An image is normalised once by table and transposed once, both within the
   cache; its views are then lines of one or the other, forwards or backwards. */
#define _DEFAULT_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "index.h"

#define INLINE static inline __attribute__((always_inline))
enum { BLOCK = 16, HUGE_PAGE = 2 << 20, LEAST_PER_THREAD = 256 << 10 };

struct batch {
    const uint8_t *x, *flips, *turns; /* [n, S, S, C], [n], [n, V] */
    const uint8_t *table;             /* [C, 256] values of `width` bytes */
    uint8_t *out;                     /* [n, V, S, S, channels] such values */
    int64_t images;
    int side, in_channels, channels, views, width;
    _Atomic int64_t taken;
    atomic_bool failed;
};

/* Normalised pixels of one image; channels beyond the source's are zero. */
INLINE void normalise_as(const struct batch *b, const uint8_t *source, uint8_t *to, int in, int out, int width) {
    int64_t pixels = (int64_t)b->side * b->side;
    for (int64_t p = 0; p < pixels; p++, source += in, to += out * width) {
        for (int c = 0; c < in; c++) memcpy(to + c * width, b->table + (c * 256 + source[c]) * width, width);
        if (out > in) memset(to + in * width, 0, (out - in) * width);
    }
}

static void normalise(const struct batch *b, const uint8_t *source, uint8_t *to) {
    int in = b->in_channels, out = b->channels, width = b->width;
    if (in == 3 && out == 3 && width == 2) normalise_as(b, source, to, 3, 3, 2);
    else if (in == 3 && out == 4 && width == 2) normalise_as(b, source, to, 3, 4, 2);
    else if (in == 3 && out == 3 && width == 4) normalise_as(b, source, to, 3, 3, 4);
    else if (in == 3 && out == 4 && width == 4) normalise_as(b, source, to, 3, 4, 4);
    else normalise_as(b, source, to, in, out, width);
}

/* BLOCK x BLOCK pixels at a time, so that both sides' lines stay in the first cache. */
INLINE void transpose_as(int side, const uint8_t *from, uint8_t *to, int pixel) {
    int64_t line = (int64_t)side * pixel;
    for (int r0 = 0; r0 < side; r0 += BLOCK)
        for (int c0 = 0; c0 < side; c0 += BLOCK) {
            int rows = r0 + BLOCK < side ? r0 + BLOCK : side, columns = c0 + BLOCK < side ? c0 + BLOCK : side;
            for (int c = c0; c < columns; c++)
                for (int r = r0; r < rows; r++) memcpy(to + c * line + r * pixel, from + r * line + c * pixel, pixel);
        }
}

INLINE void reverse_as(int side, const uint8_t *from, uint8_t *to, int pixel) {
    for (int i = 0; i < side; i++) memcpy(to + i * pixel, from + (side - 1 - i) * (int64_t)pixel, pixel);
}

#define BY_PIXEL(function, ...)                                                                                        \
    switch (pixel) {                                                                                                   \
    case 6: function(__VA_ARGS__, 6); break;                                                                           \
    case 8: function(__VA_ARGS__, 8); break;                                                                           \
    case 12: function(__VA_ARGS__, 12); break;                                                                         \
    case 16: function(__VA_ARGS__, 16); break;                                                                         \
    default: function(__VA_ARGS__, pixel);                                                                             \
    }

static void transpose(int side, const uint8_t *from, uint8_t *to, int pixel) {
    BY_PIXEL(transpose_as, side, from, to)
}

static void reverse(int side, const uint8_t *from, uint8_t *to, int pixel) { BY_PIXEL(reverse_as, side, from, to) }

/* upright, transposed: this thread's room for an image each. */
static void views_of(const struct batch *b, int64_t image, uint8_t *upright, uint8_t *transposed) {
    int side = b->side, pixel = b->channels * b->width;
    int64_t line = (int64_t)side * pixel;
    const uint8_t *turns = b->turns + image * b->views;
    bool any_transposed = false;
    for (int v = 0; v < b->views; v++) any_transposed |= way_of(0, turns[v]).transposed;
    normalise(b, b->x + image * side * side * b->in_channels, upright);
    if (any_transposed) transpose(side, upright, transposed, pixel);
    for (int v = 0; v < b->views; v++) {
        struct way way = way_of(b->flips[image], turns[v]);
        uint8_t *to = b->out + (image * b->views + v) * line * side;
        for (int i = 0; i < side; i++, to += line) {
            const uint8_t *from = (way.transposed ? transposed : upright) + (way.down ? side - 1 - i : i) * line;
            if (way.mirrored) reverse(side, from, to, pixel);
            else memcpy(to, from, line);
        }
    }
}

static void *work(void *argument) {
    struct batch *b = argument;
    int64_t bytes = (int64_t)b->side * b->side * b->channels * b->width;
    uint8_t *room = malloc(2 * bytes);
    if (!room) {
        b->failed = true;
        return NULL;
    }
    for (int64_t i; (i = b->taken++) < b->images;) views_of(b, i, room, room + bytes);
    free(room);
    return NULL;
}

/* 0, or 1 where there is no memory for the threads' rooms. Threads that cannot be had are done without. */
int rotate_views(const uint8_t *x, const uint8_t *flips, const uint8_t *turns, const void *table, void *out,
                 int64_t images, int side, int in_channels, int channels, int views, int width, int threads) {
    struct batch batch = {.x = x, .flips = flips, .turns = turns, .table = table, .out = out, .images = images,
                          .side = side, .in_channels = in_channels, .channels = channels, .views = views,
                          .width = width};
    int64_t bytes = images * views * side * side * channels * width, most = bytes / LEAST_PER_THREAD;
    /* Fresh memory in huge pages faults far less often; advice alone, so its result is of no matter. */
    uintptr_t first = ((uintptr_t)out + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, last = (uintptr_t)out + bytes;
    if (last >= first + HUGE_PAGE) madvise((void *)first, (last - first) / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    if (most > images) most = images;
    if (threads > most) threads = most > 1 ? (int)most : 1;
    pthread_t others[threads];
    int started = 0;
    while (started < threads - 1 && pthread_create(&others[started], NULL, work, &batch) == 0) started++;
    work(&batch);
    while (started > 0) pthread_join(others[--started], NULL);
    return batch.failed;
}
