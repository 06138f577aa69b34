/* The orientation in a block of EXIF. */
#ifndef FASTROT_EXIF_H
#define FASTROT_EXIF_H

#include <stdint.h>

/* 1..8 from the first directory of a TIFF block; 1 where it has none or is broken. */
int exif_orientation(const uint8_t *block, int64_t length);

#endif
