/* Huffman decoding of baseline JPEGs, in the place of libjpeg's own.

   The scan's bytes are unstuffed first, so that eight at a time go into the bit buffer; one look into a
   table gives a whole coefficient, or, where the coefficients are not wanted, as many as fit in the look.
   ITU T.81, annex F.2. */
#ifndef FASTROT_ENTROPY_H
#define FASTROT_ENTROPY_H

#include <stdbool.h>
#include <stdio.h>

#include <jpeglib.h>

struct entropy;

/* NULL where memory ends. One serves image after image, in one thread. */
struct entropy *entropy_new(void);
void entropy_free(struct entropy *entropy);

/* Between images: gives back the memory of a very long scan. */
void entropy_rest(struct entropy *entropy);

/* Whether a decompression, its header read, is one that entropy_begin takes. */
bool entropy_takes(j_decompress_ptr info);

/* Decode for a started decompression whose scan's data is all in memory; coefficients of the MCU columns
   outside [first, last] are left zero. `lost(info)`, which must not return, is called where the data are
   not as they should be, or memory ends: libjpeg's own decoder then has to say what becomes of them. */
void entropy_begin(struct entropy *entropy, j_decompress_ptr info, int first, int last, void (*lost)(j_decompress_ptr));

#endif
