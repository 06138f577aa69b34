/* Threads that read stretches of files into memory, oldest batch first. They read, never map: a file that shrinks is a
 * short read, not a SIGBUS. What is not plainly there, and as expected, is left to the caller, who has the words. */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum outcome { PENDING = 0, READ = 1, LEFT = 2 };

struct request {
    const char *path; /* path_length bytes, no 0 behind them */
    int64_t path_length;
    int64_t file; /* equal: the same path */
    int64_t offset, length;
    int64_t size, time; /* of the file, bytes and ns, as expected; size < 0, time INT64_MIN: any */
    uint8_t *out;
};

struct batch {
    const struct request *requests;
    uint8_t *outcomes;
    int images, taken, done;
    int64_t number;
    struct batch *next;
};

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    struct batch *first, *last; /* batches with images to take */
    int64_t batches;
    int users, reading; /* threads and the caller, who hold the pool; threads in a read */
    bool closing;
};

/* The file a thread is at: a shard is opened once for its neighbours in a batch. */
struct opened {
    int handle;
    int64_t file, batch;
    struct stat state;
};

static void shut(struct opened *o) {
    if (o->handle >= 0) close(o->handle);
    o->handle = -1;
}

static bool open_file(struct opened *o, const struct request *r) {
    char path[PATH_MAX];
    shut(o);
    if (r->path_length >= PATH_MAX) return false;
    memcpy(path, r->path, r->path_length);
    path[r->path_length] = 0;
    o->handle = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe's open would wait for a writer */
    o->file = r->file;
    return o->handle >= 0 && fstat(o->handle, &o->state) == 0 && S_ISREG(o->state.st_mode);
}

static enum outcome read_one(const struct request *r, struct opened *o) {
    if ((o->handle < 0 || o->file != r->file) && !open_file(o, r)) {
        shut(o);
        return LEFT;
    }
    int64_t size = o->state.st_size, time = o->state.st_mtim.tv_sec * INT64_C(1000000000) + o->state.st_mtim.tv_nsec;
    bool as_expected = (r->size < 0 || size == r->size) && (r->time == INT64_MIN || time == r->time);
    if (!as_expected || size < r->offset + r->length) return LEFT;
    for (int64_t got = 0; got < r->length;) {
        ssize_t some = pread(o->handle, r->out + got, r->length - got, r->offset + got);
        if (some < 0 && errno == EINTR) continue;
        if (some <= 0) return LEFT;
        got += some;
    }
    return READ;
}

/* Lets go of the pool, locked; the last one frees it. */
static void leave(struct pool *pool) {
    bool last = --pool->users == 0;
    pthread_mutex_unlock(&pool->lock);
    if (!last) return;
    pthread_cond_destroy(&pool->finished);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

static void *serve(void *argument) {
    struct pool *pool = argument;
    struct opened opened = {.handle = -1};
    pthread_mutex_lock(&pool->lock);
    while (!pool->closing) {
        struct batch *batch = pool->first;
        if (!batch) {
            shut(&opened);
            pthread_cond_wait(&pool->work, &pool->lock);
            continue;
        }
        int at = batch->taken++;
        if (batch->taken == batch->images && !(pool->first = batch->next)) pool->last = NULL;
        if (opened.batch != batch->number) shut(&opened); /* it may have changed since */
        opened.batch = batch->number;
        pool->reading++;
        pthread_mutex_unlock(&pool->lock);
        enum outcome outcome = read_one(&batch->requests[at], &opened);
        pthread_mutex_lock(&pool->lock);
        batch->outcomes[at] = outcome;
        batch->done++;
        pool->reading--;
        if (batch->done == batch->images || pool->closing) pthread_cond_broadcast(&pool->finished);
    }
    shut(&opened);
    leave(pool);
    return NULL;
}

/* Ends the threads, and waits at most so many seconds for those in a read. Returns how many still are: the memory that
 * they read into must stay. */
int reader_close(struct pool *pool, double seconds) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    int64_t ns = until.tv_nsec + (int64_t)(seconds * 1e9);
    until.tv_sec += ns / 1000000000;
    until.tv_nsec = ns % 1000000000;
    pthread_mutex_lock(&pool->lock);
    pool->closing = true;
    pthread_cond_broadcast(&pool->work);
    pthread_cond_broadcast(&pool->finished);
    while (pool->reading && pthread_cond_timedwait(&pool->finished, &pool->lock, &until) != ETIMEDOUT) {}
    int reading = pool->reading;
    pthread_mutex_unlock(&pool->lock);
    return reading;
}

/* The caller's last call, after reader_close. */
void reader_free(struct pool *pool) {
    pthread_mutex_lock(&pool->lock);
    leave(pool);
}

/* NULL where memory or threads end. */
struct pool *reader_open(int threads) {
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);
    pool->users = 1;
    for (int i = 0; i < threads; i++) {
        pthread_t id;
        pthread_mutex_lock(&pool->lock);
        pool->users++;
        pthread_mutex_unlock(&pool->lock);
        if (pthread_create(&id, NULL, serve, pool)) {
            pthread_mutex_lock(&pool->lock);
            pool->users--;
            pthread_mutex_unlock(&pool->lock);
            reader_close(pool, 0);
            reader_free(pool);
            return NULL;
        }
        pthread_detach(id); /* one that a frozen disk holds is not waited for */
    }
    return pool;
}

/* Starts on a batch; all its memory stays put until reader_forget lets go of it. */
struct batch *reader_start(struct pool *pool, int images, const struct request *requests, uint8_t *outcomes) {
    struct batch *batch = malloc(sizeof *batch);
    if (!batch) return NULL;
    *batch = (struct batch){.requests = requests, .outcomes = outcomes, .images = images};
    pthread_mutex_lock(&pool->lock);
    batch->number = ++pool->batches;
    if (images) {
        if (pool->last) pool->last->next = batch;
        else pool->first = batch;
        pool->last = batch;
        pthread_cond_broadcast(&pool->work);
    }
    pthread_mutex_unlock(&pool->lock);
    return batch;
}

/* Waits for a batch: whether it is done, or the pool was closed before it. */
bool reader_wait(struct pool *pool, const struct batch *batch) {
    pthread_mutex_lock(&pool->lock);
    while (batch->done < batch->images && !pool->closing) pthread_cond_wait(&pool->finished, &pool->lock);
    bool done = batch->done == batch->images;
    pthread_mutex_unlock(&pool->lock);
    return done;
}

/* Begins no more reads of a batch. Whether none is under way either: then it is gone, and its memory is the caller's. */
bool reader_forget(struct pool *pool, struct batch *batch) {
    pthread_mutex_lock(&pool->lock);
    for (struct batch *b = pool->first, *before = NULL; b; before = b, b = b->next)
        if (b == batch) {
            if (before) before->next = b->next;
            else pool->first = b->next;
            if (pool->last == b) pool->last = before;
            batch->images = batch->taken;
            break;
        }
    bool idle = batch->done == batch->taken;
    pthread_mutex_unlock(&pool->lock);
    if (idle) free(batch);
    return idle;
}
