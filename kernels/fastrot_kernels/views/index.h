/* Where a flip and a turn put a pixel: the one place that knows, for the CPU and for CUDA. */
#ifndef FASTROT_INDEX_H
#define FASTROT_INDEX_H

#ifdef __CUDACC__
#define BOTH_SIDES static __host__ __device__ __forceinline__
#else
#define BOTH_SIDES static inline
#endif

/* A view is the source, perhaps transposed, then perhaps upside down, then perhaps mirrored. */
struct way {
    int transposed, down, mirrored;
};

/* flip: not 0 = left-right, first; turn: quarter turns counter-clockwise, read as turn & 3. */
BOTH_SIDES struct way way_of(int flip, int turn) {
    struct way way;
    flip = flip != 0;
    turn &= 3;
    way.transposed = turn & 1;
    way.down = turn == 0 ? 0 : turn == 1 ? !flip : turn == 2 ? 1 : flip;
    way.mirrored = turn == 0 ? flip : turn == 1 ? 0 : turn == 2 ? !flip : 1;
    return way;
}

/* Row and column, in a view whose height and width are given, of source pixel (r, c). */
BOTH_SIDES int row_of(struct way way, int height, int r, int c) {
    int row = way.transposed ? c : r;
    return way.down ? height - 1 - row : row;
}

BOTH_SIDES int column_of(struct way way, int width, int r, int c) {
    int column = way.transposed ? r : c;
    return way.mirrored ? width - 1 - column : column;
}

#endif
