/* Threads that take images from batches, oldest batch first. */
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#include "window.h"

struct batch {
    const struct request *requests;
    uint8_t *outcomes;
    char (*reasons)[REASON];
    int images, taken, done;
    struct batch *next;
};

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    struct batch *first, *last; /* batches with images to take */
    bool closing;
    int threads;
    pthread_t ids[];
};

static void *serve(void *argument) {
    struct pool *pool = argument;
    struct scratch scratch = {0};
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->first && !pool->closing) pthread_cond_wait(&pool->work, &pool->lock);
        if (pool->closing) break;
        struct batch *batch = pool->first;
        int at = batch->taken++;
        if (batch->taken == batch->images && !(pool->first = batch->next)) pool->last = NULL;
        pthread_mutex_unlock(&pool->lock);
        batch->outcomes[at] = window_pixels(&batch->requests[at], &scratch, batch->reasons[at]);
        pthread_mutex_lock(&pool->lock);
        if (++batch->done == batch->images) pthread_cond_broadcast(&pool->finished);
    }
    pthread_mutex_unlock(&pool->lock);
    scratch_free(&scratch);
    return NULL;
}

void turbo_close(struct pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->closing = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->threads; i++) pthread_join(pool->ids[i], NULL);
    pthread_cond_destroy(&pool->finished);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

/* NULL where memory or threads end. */
struct pool *turbo_open(int threads) {
    struct pool *pool = calloc(1, sizeof *pool + threads * sizeof *pool->ids);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);
    for (; pool->threads < threads; pool->threads++)
        if (pthread_create(&pool->ids[pool->threads], NULL, serve, pool)) {
            turbo_close(pool);
            return NULL;
        }
    return pool;
}

/* Starts on a batch; all its memory stays the caller's and stays put until turbo_wait. */
struct batch *turbo_submit(struct pool *pool, int images, const struct request *requests, uint8_t *outcomes,
                           char (*reasons)[REASON]) {
    struct batch *batch = malloc(sizeof *batch);
    if (!batch) return NULL;
    *batch = (struct batch){.requests = requests, .outcomes = outcomes, .reasons = reasons, .images = images};
    if (images == 0) return batch;
    pthread_mutex_lock(&pool->lock);
    if (pool->last) pool->last->next = batch;
    else pool->first = batch;
    pool->last = batch;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    return batch;
}

/* Waits for a batch and forgets it. */
void turbo_wait(struct pool *pool, struct batch *batch) {
    pthread_mutex_lock(&pool->lock);
    while (batch->done < batch->images) pthread_cond_wait(&pool->finished, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
    free(batch);
}
