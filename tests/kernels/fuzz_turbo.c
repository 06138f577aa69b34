/* fuzz ROUNDS FILE...: decode windows of damaged copies; prints how many gave pixels and how many a reason. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "window.h"

static uint64_t state = 88172645463325252ull;

static uint32_t draw(uint32_t below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32) % below;
}

int main(int count, char **words) {
    static uint8_t whole[1 << 20], out[96 * 96 * 3];
    struct scratch scratch = {0};
    long sound = 0, bad = 0;
    for (int file = 2; file < count; file++) {
        FILE *opened = fopen(words[file], "rb");
        if (!opened) return 1;
        int64_t length = (int64_t)fread(whole, 1, sizeof whole, opened);
        fclose(opened);
        for (int round = 0; round < atoi(words[1]); round++) {
            /* memory of just the file's size: a read past it is seen */
            int64_t kept = draw(4) ? length : 1 + draw((uint32_t)length);
            uint8_t *data = malloc(kept);
            if (!data) return 1;
            memcpy(data, whole, kept);
            for (int changes = draw(9); changes > 0; changes--)
                data[draw(draw(2) ? (uint32_t)kept : 700 < kept ? 700 : (uint32_t)kept)] = draw(256);
            struct request request = {.data = data, .length = kept, .size = 8 + draw(89), .out = out};
            request.top = draw(100), request.left = draw(100);
            request.height = 1 + draw(100), request.width = 1 + draw(120);
            request.orientation = 1 + draw(8);
            request.boxed = draw(2), request.fast = draw(2);
            if (request.boxed) request.top += 0.3, request.width += 0.7;
            if (draw(8) == 0) request.raw_height = 1 + draw(60), request.raw_width = 1 + draw(60);
            if (request.raw_height && draw(4)) {
                request.length = (int64_t)request.raw_height * request.raw_width * 3;
                data = realloc(data, request.length);
                if (!data) return 1;
                memset(data, round, request.length);
                request.data = data;
            }
            char reason[REASON] = "";
            if (window_pixels(&request, &scratch, reason) == DONE) sound++;
            else bad++;
            free(data);
        }
    }
    scratch_free(&scratch);
    printf("%ld %ld\n", sound, bad);
    return 0;
}
