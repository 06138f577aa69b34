#include "window.h"

#include <math.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#include "entropy.h"

/* A JPEG of more pixels, or of more scans, is an attack: libjpeg holds a progressive one's coefficients. */
enum { MOST_PIXELS = 1 << 30, MOST_SCANS = 256 };

/* libjpeg-turbo writes rows that begin on 32 bytes past the cache, where the next pass would miss them. */
enum { OFF_LINE = 16 };

/* A stretch of the stored image, resampled as it is read, row after row. */
struct flow {
    const struct request *request;
    struct scratch *scratch;
    int low, high;   /* rows [low, high) and columns [left, right) hold all taps */
    int left, right;
    int ring;        /* rows kept between the passes */
    uint8_t *turned; /* size * size * 3 of the stored orientation; `out` itself where that is upright */
    uint8_t *input;  /* a row of input, with slack behind it */
    int next;        /* output row to come */
};

static int64_t whole_blocks(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

/* The upright window in the stored image's coordinates: undoes EXIF orientation 1..8. */
static void stored_window(const struct request *r, double height, double width, double at[4]) {
    int orientation = r->orientation;
    double top = r->top, left = r->left, h = r->height, w = r->width;
    if (orientation >= 5) { /* upright rows are stored columns */
        double t = top, u = h;
        top = left, left = t;
        h = w, w = u;
    }
    bool from_below = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    at[0] = from_below ? height - top - h : top;
    at[1] = from_right ? width - left - w : left;
    at[2] = h;
    at[3] = w;
}

/* One axis of a flow: plans it and says which samples [*low, *high) it reads, from `*low` on counted. */
static bool plan_axis(struct axis *axis, double start, double extent, int samples, int boxed, int size, int *low,
                      int *high) {
    if (boxed) {
        double reach = fmax(extent / size, 1) + 1, end = fmin(start + extent, samples);
        start = fmax(start, 0);
        extent = end - start;
        *low = (int)fmax(floor(start - reach), 0);
        *high = (int)fmin(ceil(end + reach), samples);
    } else {
        *low = (int)floor(start);
        *high = (int)fmin(ceil(start + extent), samples);
    }
    return extent > 0 && axis_plan(axis, start - *low, extent, 0, *high - *low, size);
}

/* Plans both axes of a stored image of height x width and finds the memory. */
static bool begin(struct flow *flow, double height, double width, const double window[4]) {
    const struct request *r = flow->request;
    struct scratch *s = flow->scratch;
    int size = r->size;
    if (!plan_axis(&s->down, window[0], window[2], (int)height, r->boxed, size, &flow->low, &flow->high)) return false;
    if (!plan_axis(&s->across, window[1], window[3], (int)width, r->boxed, size, &flow->left, &flow->right))
        return false;
    flow->ring = s->down.taps;
    flow->next = 0;
    int64_t slack = axis_slack(&s->across), line = whole_blocks((int64_t)size * 3 + slack);
    int64_t input = whole_blocks((int64_t)width * 3 + slack + OFF_LINE);
    int64_t square = whole_blocks((int64_t)size * size * 3 + slack);
    int64_t need = flow->ring * line + input + square;
    if (need > s->room) {
        free(s->memory);
        s->memory = aligned_alloc(64, need);
        s->room = s->memory ? need : 0;
    }
    if (flow->ring > s->room_rows) {
        free(s->rows);
        s->rows = malloc(sizeof(uint8_t *) * flow->ring);
        s->room_rows = s->rows ? flow->ring : 0;
    }
    if (!s->memory || !s->rows) return false;
    for (int k = 0; k < flow->ring; k++) s->rows[k] = s->memory + k * line;
    flow->input = s->memory + flow->ring * line + OFF_LINE;
    /* the down pass writes blocks of 16 bytes */
    bool straight = r->orientation == 1 && size * 3 % 16 == 0;
    flow->turned = straight ? r->out : s->memory + flow->ring * line + input;
    return true;
}

/* Row y of the input, its column `left` at `row`: across, and down as far as rows are there. */
static void feed(struct flow *flow, int y, const uint8_t *row) {
    struct scratch *s = flow->scratch;
    int size = flow->request->size, k = y - flow->low;
    resample_across(&s->across, row, s->rows[k % flow->ring]);
    for (; flow->next < size && s->down.first[flow->next] + s->down.count[flow->next] <= k + 1; flow->next++) {
        uint8_t *out = flow->turned + (int64_t)flow->next * size * 3;
        resample_down(&s->down, flow->next, s->rows, flow->ring, size * 3, out);
    }
}

/* The finished square, turned upright, into the caller's memory. */
static void finish(const struct flow *flow) {
    int size = flow->request->size, o = flow->request->orientation;
    uint8_t *out = flow->request->out;
    if (o == 1) {
        if (out != flow->turned) memcpy(out, flow->turned, (int64_t)size * size * 3);
        return;
    }
    bool from_below = o == 3 || o == 4 || o == 6 || o == 7, from_right = o == 2 || o == 3 || o == 7 || o == 8;
    for (int y = 0; y < size; y++)
        for (int x = 0; x < size; x++, out += 3) {
            int row = o >= 5 ? x : y, column = o >= 5 ? y : x;
            if (from_below) row = size - 1 - row;
            if (from_right) column = size - 1 - column;
            memcpy(out, flow->turned + ((int64_t)row * size + column) * 3, 3);
        }
}

/* Ways back from within libjpeg. */
enum { FAILED = 1, LOST = 2 };

struct fault {
    struct jpeg_error_mgr manager; /* first: libjpeg hands out its address */
    jmp_buf back;
    char *reason;
};

static void on_error(j_common_ptr info) {
    struct fault *fault = (struct fault *)info->err;
    char said[JMSG_LENGTH_MAX];
    fault->manager.format_message(info, said);
    snprintf(fault->reason, REASON, "cannot be decoded (%.70s)", said);
    longjmp(fault->back, FAILED);
}

static void on_lost(j_decompress_ptr info) { longjmp(((struct fault *)info->err)->back, LOST); }

/* Damage that libjpeg shrugs off is no fault, as for Pillow; an end before the window's end is. */
static void on_message(j_common_ptr info, int level) {
    struct fault *fault = (struct fault *)info->err;
    if (level < 0 && fault->manager.msg_code == JWRN_JPEG_EOF) {
        snprintf(fault->reason, REASON, "is truncated");
        longjmp(fault->back, FAILED);
    }
}

static void on_progress(j_common_ptr info) {
    struct fault *fault = (struct fault *)info->err;
    if (((j_decompress_ptr)info)->input_scan_number > MOST_SCANS) {
        snprintf(fault->reason, REASON, "has more than %d scans", MOST_SCANS);
        longjmp(fault->back, FAILED);
    }
}

static bool ours(j_decompress_ptr info) {
    bool known = info->jpeg_color_space == JCS_YCbCr || info->jpeg_color_space == JCS_RGB ||
                 info->jpeg_color_space == JCS_GRAYSCALE;
    return known && (info->num_components == 1 || info->num_components == 3) && !info->arith_code;
}

/* Rows [low, high) of a started decompression, all taps' columns among them. */
static void read_rows(j_decompress_ptr info, struct flow *flow, struct entropy *entropy) {
    /* libjpeg-turbo crops at whole blocks; two pixels more on a side give chroma's filter its neighbours. */
    JDIMENSION from = flow->left > 2 ? flow->left - 2 : 0;
    JDIMENSION to = flow->right + 2 < (int)info->output_width ? flow->right + 2 : (int)info->output_width;
    JDIMENSION width = to - from;
    if (width < info->output_width) jpeg_crop_scanline(info, &from, &width);
    if (entropy && entropy_takes(info)) {
        int mcu = (int)info->scale_num * (info->num_components == 1 ? 1 : info->max_h_samp_factor);
        entropy_begin(entropy, info, from / mcu, (from + width - 1) / mcu, on_lost);
    }
    if (flow->low > 0) jpeg_skip_scanlines(info, flow->low);
    JSAMPROW row = flow->input;
    for (int y = flow->low; y < flow->high; y++) {
        jpeg_read_scanlines(info, &row, 1);
        feed(flow, y, flow->input + (flow->left - (int)from) * 3);
    }
}

/* The window within the upright image, which may be another than the one indexed. */
static bool inside(const struct request *r, double stored_height, double stored_width, char reason[REASON]) {
    bool lying = r->orientation >= 5;
    double height = lying ? stored_width : stored_height, width = lying ? stored_height : stored_width;
    bool sound = r->height > 0 && r->width > 0 && r->top >= 0 && r->left >= 0;
    bool within = r->boxed ? r->top < height && r->left < width
                           : r->top + r->height <= height && r->left + r->width <= width;
    if (!sound || !within) snprintf(reason, REASON, "is %.0fx%.0f, not as indexed", width, height);
    return sound && within;
}

/* By our Huffman decoder, or where `entropy` is NULL by libjpeg's, which has the last word on damaged data. */
static enum outcome jpeg_pixels(const struct request *r, struct scratch *scratch, struct entropy *entropy,
                                char reason[REASON]) {
    struct jpeg_decompress_struct info;
    struct jpeg_progress_mgr progress = {.progress_monitor = on_progress};
    struct fault fault = {.reason = reason};
    volatile enum outcome outcome = BROKEN;
    info.err = jpeg_std_error(&fault.manager);
    fault.manager.error_exit = on_error;
    fault.manager.emit_message = on_message;
    switch (setjmp(fault.back)) {
    case 0:
        break;
    case LOST:
        jpeg_destroy_decompress(&info);
        return jpeg_pixels(r, scratch, NULL, reason);
    default:
        jpeg_destroy_decompress(&info);
        return outcome;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, r->data, (unsigned long)r->length);
    jpeg_read_header(&info, TRUE);
    if (!ours(&info)) {
        jpeg_destroy_decompress(&info);
        return NOT_OURS;
    }
    info.progress = &progress;
    struct flow flow = {.request = r, .scratch = scratch};
    double height = info.image_height, width = info.image_width, window[4];
    if (height * width > MOST_PIXELS) {
        snprintf(reason, REASON, "is %.0fx%.0f, too large", width, height);
    } else if (inside(r, height, width, reason)) {
        stored_window(r, height, width, window);
        info.out_color_space = JCS_RGB;
        info.dct_method = JDCT_ISLOW;
        double shrink = r->fast ? fmin(window[2], window[3]) / r->size : 1;
        info.scale_num = shrink >= 8 ? 1 : shrink >= 4 ? 2 : shrink >= 2 ? 4 : 8;
        info.scale_denom = 8;
        jpeg_start_decompress(&info);
        for (int k = 0; k < 4; k++) window[k] *= info.scale_num / 8.0;
        if (begin(&flow, info.output_height, info.output_width, window)) {
            read_rows(&info, &flow, entropy);
            finish(&flow);
            outcome = DONE;
        } else {
            snprintf(reason, REASON, "leaves no memory for its window");
        }
    }
    jpeg_destroy_decompress(&info);
    return outcome;
}

/* Pixels that need no decoding. The last rows are copied: the across pass reads behind a row's end. */
static enum outcome raw_pixels(const struct request *r, struct scratch *scratch, char reason[REASON]) {
    int height = r->raw_height, width = r->raw_width;
    struct flow flow = {.request = r, .scratch = scratch};
    double window[4];
    if (r->length != (int64_t)height * width * 3) {
        snprintf(reason, REASON, "is not %dx%d pixels", width, height);
        return BROKEN;
    }
    if (!inside(r, height, width, reason)) return BROKEN;
    stored_window(r, height, width, window);
    if (!begin(&flow, height, width, window)) {
        snprintf(reason, REASON, "leaves no memory for its window");
        return BROKEN;
    }
    int64_t slack = axis_slack(&scratch->across), line = (int64_t)width * 3;
    for (int y = flow.low; y < flow.high; y++) {
        const uint8_t *row = r->data + y * line;
        if (row + line + slack > r->data + r->length) row = memcpy(flow.input, row, line);
        feed(&flow, y, row + flow.left * 3);
    }
    finish(&flow);
    return DONE;
}

enum outcome window_pixels(const struct request *r, struct scratch *scratch, char reason[REASON]) {
    if (r->raw_height > 0) return raw_pixels(r, scratch, reason);
    static const uint8_t jpeg[3] = {0xFF, 0xD8, 0xFF};
    if (r->length < 3 || memcmp(r->data, jpeg, 3)) return NOT_OURS;
    if (!scratch->entropy && !(scratch->entropy = entropy_new())) {
        snprintf(reason, REASON, "leaves no memory for its decoder");
        return BROKEN;
    }
    enum outcome outcome = jpeg_pixels(r, scratch, scratch->entropy, reason);
    entropy_rest(scratch->entropy);
    return outcome;
}

void scratch_free(struct scratch *scratch) {
    axis_free(&scratch->across);
    axis_free(&scratch->down);
    entropy_free(scratch->entropy);
    free(scratch->memory);
    free(scratch->rows);
}
