/* Any bytes as a JPEG: where our Huffman decoder does not give up, its rows are those of libjpeg's own. The first four
   bytes say which rows and columns; a second round finds the tables of the first. */
#define main check_main
#include "../kernels/check_entropy.c"
#undef main

#include "claims.h"

int LLVMFuzzerTestOneInput(const uint8_t *words, size_t size) {
    static uint8_t theirs[MOST], ours[MOST];
    if (size < 5 || claims_too_much(words + 4, size - 4)) return -1;
    struct entropy *entropy = entropy_new();
    size_t own = 0, other = 0;
    double at[4];
    for (int k = 0; k < 4; k++) at[k] = words[k] / 255.0;
    for (int round = 0; round < 2; round++) {
        if (read_rows(words + 4, size - 4, at, entropy, ours, &own)) break;
        if (!read_rows(words + 4, size - 4, at, NULL, theirs, &other) && (own != other || memcmp(ours, theirs, own)))
            abort();
    }
    entropy_free(entropy);
    return 0;
}
