/* check ROUNDS FILE...: rows of windows, the coefficients by our Huffman decoder and by libjpeg's own.
   ROUNDS windows of each file as it is, and ROUNDS of damaged copies. Prints how many were equal, and how
   many damaged ones were given up; exits 1 where rows differ, 2 where a sound file is given up. */
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "entropy.h"

enum { MOST = 1 << 22 };

static uint64_t state = 88172645463325252ull;

static uint32_t draw(uint32_t below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32) % below;
}

static jmp_buf back;

static void on_lost(j_decompress_ptr info) { (void)info, longjmp(back, 2); }
static void on_error(j_common_ptr info) { (void)info, longjmp(back, 1); }
static void on_message(j_common_ptr info, int level) { (void)info, (void)level; }

/* Rows [top, top + rows) of columns around [left, left + columns), in shares of the image; 0 where they are had. */
static int read_rows(const uint8_t *data, size_t length, const double at[4], struct entropy *entropy, uint8_t *out,
                     size_t *size) {
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr manager;
    info.err = jpeg_std_error(&manager);
    manager.error_exit = on_error;
    manager.emit_message = on_message;
    switch (setjmp(back)) {
    case 0:
        break;
    case 2:
        jpeg_destroy_decompress(&info);
        return 2;
    default:
        jpeg_destroy_decompress(&info);
        return 1;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, data, length);
    jpeg_read_header(&info, TRUE);
    if (!entropy_takes(&info) || (size_t)info.image_width * info.image_height * 3 > MOST) longjmp(back, 1);
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);
    unsigned mcu = 8 * (info.num_components == 1 ? 1 : info.max_h_samp_factor);
    JDIMENSION left = at[1] * (info.output_width - 1), width = 1 + at[3] * (info.output_width - 1 - left);
    JDIMENSION top = at[0] * (info.output_height - 1), rows = 1 + at[2] * (info.output_height - 1 - top);
    if (width < info.output_width) jpeg_crop_scanline(&info, &left, &width);
    if (entropy) entropy_begin(entropy, &info, left / mcu, (left + width - 1) / mcu, on_lost);
    if (top) jpeg_skip_scanlines(&info, top);
    *size = (size_t)rows * width * 3;
    for (JSAMPROW row = out; rows--; row += width * 3) jpeg_read_scanlines(&info, &row, 1);
    jpeg_destroy_decompress(&info);
    return 0;
}

int main(int count, char **words) {
    static uint8_t whole[1 << 20], theirs[MOST], ours[MOST];
    struct entropy *entropy = entropy_new();
    long equal = 0, given_up = 0;
    for (int file = 2; file < count; file++) {
        FILE *opened = fopen(words[file], "rb");
        if (!opened) return 3;
        size_t length = fread(whole, 1, sizeof whole, opened);
        fclose(opened);
        for (int round = 0; round < 2 * atoi(words[1]); round++) {
            /* memory of just the file's size: a read past it is seen */
            bool damaged = round % 2;
            size_t kept = damaged && !draw(4) ? (size_t)1 + draw(length) : length, size = 0, other = 0;
            uint8_t *data = malloc(kept);
            if (!data) return 3;
            memcpy(data, whole, kept);
            for (int changes = damaged ? draw(4) : 0; changes > 0; changes--) data[draw(kept)] = draw(256);
            double at[4];
            for (int k = 0; k < 4; k++) at[k] = draw(1001) / 1000.0;
            int how = read_rows(data, kept, at, entropy, ours, &size);
            if (how == 2) {
                if (!damaged) {
                    fprintf(stderr, "%s: given up\n", words[file]);
                    return 2;
                }
                given_up++;
            } else if (!read_rows(data, kept, at, NULL, theirs, &other) && !how) {
                if (size != other || memcmp(ours, theirs, size)) {
                    fprintf(stderr, "%s: other rows\n", words[file]);
                    return 1;
                }
                equal++;
            }
            free(data);
        }
    }
    entropy_free(entropy);
    printf("%ld %ld\n", equal, given_up);
    return 0;
}
