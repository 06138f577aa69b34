/* libjpeg's time and memory for a huge image of few bytes are not asked for here: those that claim more pixels than
   that are passed over, so that a second holds many executions. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MOST_CLAIMED = 1 << 17 };

static bool claims_too_much(const uint8_t *data, size_t size) {
    for (size_t at = 0; at + 9 < size; at++)
        if (data[at] == 0xFF && (data[at + 1] & 0xF0) == 0xC0 &&
            (data[at + 5] << 8 | data[at + 6]) * (int64_t)(data[at + 7] << 8 | data[at + 8]) > MOST_CLAIMED)
            return true;
    return false;
}
