/* Stretches of a file of 1,000 bytes that any requests ask for: its bytes, or the outcome that leaves it to the caller. */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../kernels/fastrot_kernels/reader/reader.c"

enum { FILE_BYTES = 1000, MOST = 8, FIELDS = 8 };

static char name[] = "/dev/shm/fuzz-reader-XXXXXX";
static uint8_t whole[FILE_BYTES];

static void forget(void) { unlink(name); }

int LLVMFuzzerInitialize(int *count, char ***words) {
    (void)count, (void)words;
    for (int i = 0; i < FILE_BYTES; i++) whole[i] = (uint8_t)(i * 37 + 11);
    int handle = mkstemp(name);
    if (handle < 0 || write(handle, whole, FILE_BYTES) != FILE_BYTES) abort();
    close(handle);
    atexit(forget);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *words, size_t size) {
    static struct pool *pool;
    if (!pool && !(pool = reader_open(2))) abort();
    int images = size / FIELDS < MOST ? (int)(size / FIELDS) : MOST;
    struct request requests[MOST];
    uint8_t outcomes[MOST] = {0};
    for (int i = 0; i < images; i++) {
        const uint8_t *w = words + i * FIELDS;
        int64_t offset = w[0] << 8 | w[1], length = (w[2] << 8 | w[3]) % 2000;
        bool other = w[4] == 1;
        requests[i] = (struct request){.path = other ? "/dev/shm" : name, .path_length = other ? 8 : sizeof name - 1,
            .file = other, .offset = offset, .length = length, .time = w[5] == 1 ? 7 : INT64_MIN,
            .size = w[6] == 1 ? FILE_BYTES : w[6] == 2 ? 5 : -1, .out = malloc(length)};
    }
    struct batch *batch = reader_start(pool, images, requests, outcomes);
    if (!batch || !reader_wait(pool, batch) || !reader_forget(pool, batch)) abort();
    for (int i = 0; i < images; i++) {
        const struct request *r = &requests[i];
        bool whole_there = !r->file && r->offset + r->length <= FILE_BYTES && r->time != 7 && r->size != 5;
        if (outcomes[i] != (whole_there ? READ : LEFT)) abort();
        if (whole_there && memcmp(r->out, whole + r->offset, r->length)) abort();
        free(r->out);
    }
    return 0;
}
