/* A disk whose reads do not end while `frozen` is set; and what threads read meanwhile. */
#define _GNU_SOURCE
#include <unistd.h>

volatile int frozen = 0, waiting = 0;

static ssize_t frozen_pread(int handle, void *into, size_t bytes, off_t from) {
    __atomic_add_fetch(&waiting, 1, __ATOMIC_SEQ_CST);
    while (frozen) usleep(1000);
    __atomic_sub_fetch(&waiting, 1, __ATOMIC_SEQ_CST);
    return pread(handle, into, bytes, from);
}
#define pread frozen_pread
