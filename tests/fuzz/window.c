/* A window of any bytes, by any request: pixels, or a reason. The first bytes are the request, the others the file. */
#include <stdlib.h>
#include <string.h>

#include "claims.h"
#include "window.h"

enum { SIDE = 96, WORDS = 12 };

int LLVMFuzzerTestOneInput(const uint8_t *words, size_t size) {
    static uint8_t out[SIDE * SIDE * 3];
    static struct scratch scratch; /* kept from image to image, as a thread does */
    char reason[REASON] = "";
    if (size < WORDS || claims_too_much(words + WORDS, size - WORDS)) return -1;
    struct request r = {.data = words + WORDS, .length = (int64_t)size - WORDS, .out = out};
    r.size = 1 + words[0] % SIDE, r.orientation = 1 + words[1] % 8;
    r.boxed = words[2] & 1, r.fast = words[2] & 2;
    r.top = words[3] / (r.boxed ? 3.0 : 1), r.left = words[4] / (r.boxed ? 3.0 : 1);
    r.height = words[5], r.width = words[6];
    if (words[2] & 4) r.raw_height = words[7], r.raw_width = words[8];
    if (words[2] & 8 && r.raw_height > 0) r.length = r.length / r.raw_height / 3 * r.raw_height * 3,
        r.raw_width = (int32_t)(r.length / r.raw_height / 3);
    enum outcome outcome = window_pixels(&r, &scratch, reason);
    if (outcome == BROKEN && (!*reason || strchr(reason, '\n') || strlen(reason) >= REASON)) abort();
    return 0;
}
