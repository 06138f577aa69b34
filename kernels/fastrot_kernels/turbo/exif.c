#include "exif.h"

#include <stdbool.h>

enum { ORIENTATION = 0x0112, SHORT = 3, LONG = 4, SIGNED_SHORT = 8, SIGNED_LONG = 9, ENTRY = 12 };

static uint32_t number(const uint8_t *at, int bytes, bool big) {
    uint32_t value = 0;
    for (int i = 0; i < bytes; i++) value = value << 8 | at[big ? i : bytes - 1 - i];
    return value;
}

int exif_orientation(const uint8_t *block, int64_t length) {
    if (length < 8) return 1;
    bool big = block[0] == 'M' && block[1] == 'M', little = block[0] == 'I' && block[1] == 'I';
    if (!(big || little) || number(block + 2, 2, big) != 42) return 1;
    int64_t at = number(block + 4, 4, big);
    if (at + 2 > length) return 1;
    int entries = (int)number(block + at, 2, big);
    uint32_t found = 1; /* of several, the last: as Pillow */
    at += 2;
    for (int i = 0; i < entries && at + ENTRY <= length; i++, at += ENTRY) {
        if (number(block + at, 2, big) != ORIENTATION) continue;
        uint32_t type = number(block + at + 2, 2, big), count = number(block + at + 4, 4, big);
        int bytes = type == SHORT || type == SIGNED_SHORT ? 2 : type == LONG || type == SIGNED_LONG ? 4 : 0;
        if (!count || !bytes) continue;
        int64_t value = (int64_t)count * bytes <= 4 ? at + 8 : number(block + at + 8, 4, big);
        if (value + bytes <= length) found = number(block + value, bytes, big);
    }
    return found >= 1 && found <= 8 ? (int)found : 1;
}
