/* One image's window -> size x size RGB bytes, upright. */
#ifndef FASTROT_WINDOW_H
#define FASTROT_WINDOW_H

#include <stdint.h>

#include "resample.h"

enum outcome {
    DONE = 0,
    NOT_OURS = 1, /* another kind of image, or a JPEG of a kind that is left to others */
    BROKEN = 2,   /* `reason` says how */
};

enum { REASON = 96 };

struct request {
    const uint8_t *data;
    int64_t length;
    int32_t raw_height, raw_width; /* > 0: data are pixels, uint8 [height, width, 3], not a JPEG */
    double top, left, height, width; /* of the upright image */
    int boxed; /* taps may leave the window (Pillow's `resize(box=)`); else it is cropped first */
    int fast;  /* scale in the DCT where the window is at least twice the target */
    int size;
    int orientation; /* EXIF's 1..8, of the stored pixels */
    uint8_t *out; /* size * size * 3 */
};

struct entropy;

/* What a thread keeps from image to image. Zeroed before first use. */
struct scratch {
    struct axis across, down;
    struct entropy *entropy;
    uint8_t *memory;
    int64_t room;
    uint8_t **rows;
    int room_rows;
};

enum outcome window_pixels(const struct request *request, struct scratch *scratch, char reason[REASON]);
void scratch_free(struct scratch *scratch);

#endif
