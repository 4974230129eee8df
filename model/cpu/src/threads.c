/* Threads that share out the tasks of one operation after another, and sleep between steps.
 *
 * `ticket` holds the number of the round and how many of its tasks nobody has claimed yet. A claim
 * is a compare-and-swap of both at once, so that a thread that the machine held up cannot take a
 * task of a round that is over, and nobody waits for a thread that has claimed nothing: on a busy
 * machine the caller goes on alone. Which thread computes a task changes no bit of it. Idle
 * threads spin for some tens of microseconds, as the next operation is usually that near, and
 * then sleep in the kernel.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"

#define SPINS 5000
#define CLAIMS 8 /* of each thread while half of the tasks are done, about */

static _Thread_local int32_t own_index;

struct Pool {
    int32_t num_threads; /* the caller's included */
    pthread_t *threads;
    Task task; /* these three change only while no task is left to claim */
    void *context;
    int32_t count;
    atomic_int stopping;
    _Alignas(64) _Atomic uint64_t ticket; /* round in the high half, unclaimed tasks in the low */
    _Alignas(64) atomic_int finished;     /* tasks of this round */
    _Alignas(64) atomic_uint round;       /* what sleepers wait on */
    atomic_int sleepers, started;
};

int32_t pool_size(const Pool *pool) { return pool->num_threads; }
int32_t thread_index(void) { return own_index; }

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Claim and run some tasks that follow each other; 0 if there are none. */
static int run_some(Pool *pool) {
    uint64_t ticket = atomic_load(&pool->ticket);
    for (;;) {
        uint32_t left = (uint32_t)ticket;
        if (left == 0) return 0;
        /* Read before the swap: if it succeeds, the round went on, and these are its own. */
        Task task = pool->task;
        void *context = pool->context;
        int32_t index = pool->count - (int32_t)left;
        int32_t taken = 1 + (int32_t)left / (CLAIMS * pool->num_threads);
        if (atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket - (uint32_t)taken)) {
            for (int32_t i = 0; i < taken; i++) task(context, index + i);
            atomic_fetch_add(&pool->finished, taken);
            return 1;
        }
    }
}

static void sleep_until_round(Pool *pool, unsigned seen) {
    atomic_fetch_add(&pool->sleepers, 1);
    if (atomic_load(&pool->round) == seen)
        syscall(SYS_futex, &pool->round, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&pool->sleepers, 1);
}

static void *run_worker(void *argument) {
    Pool *pool = argument;
    int spins = 0;
    own_index = 1 + atomic_fetch_add(&pool->started, 1);
    while (!atomic_load(&pool->stopping)) {
        unsigned seen = atomic_load(&pool->round);
        if (run_some(pool)) spins = 0;
        else if (++spins < SPINS) pause_briefly();
        else {
            sleep_until_round(pool, seen);
            spins = 0;
        }
    }
    return NULL;
}

static void wake(Pool *pool) {
    atomic_fetch_add(&pool->round, 1);
    if (atomic_load(&pool->sleepers))
        syscall(SYS_futex, &pool->round, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Run task(context, 0 ... count - 1), in any order; return when all are done. Many are claimed at
 * once while many are left: small tasks are not worth a claim each, and neighbours write to the
 * same lines of memory. */
void parallel_for(Pool *pool, Task task, void *context, int32_t count) {
    if (count <= 1 || pool->num_threads == 1) {
        for (int32_t index = 0; index < count; index++) task(context, index);
        return;
    }
    pool->task = task;
    pool->context = context;
    pool->count = count;
    atomic_store(&pool->finished, 0);
    uint64_t round = atomic_load(&pool->ticket) >> 32;
    atomic_store(&pool->ticket, (round + 1) << 32 | (uint32_t)count);
    wake(pool);
    while (run_some(pool)) continue;
    for (int spins = 0; atomic_load(&pool->finished) < count; spins++) {
        if (spins < SPINS) pause_briefly();
        else sched_yield();
    }
}

/* Return a pool of num_threads, the caller's own included; fewer if the system gives fewer. */
Pool *pool_create(int32_t num_threads) {
    Pool *pool = aligned_alloc(64, (sizeof(Pool) + 63) / 64 * 64);
    if (!pool) return NULL;
    *pool = (Pool){.num_threads = 1};
    pool->threads = calloc((size_t)num_threads, sizeof(pthread_t));
    while (pool->threads && pool->num_threads < num_threads) {
        pthread_t *thread = &pool->threads[pool->num_threads - 1];
        if (pthread_create(thread, NULL, run_worker, pool)) break;
        pool->num_threads++;
    }
    return pool;
}

void pool_destroy(Pool *pool) {
    atomic_store(&pool->stopping, 1);
    wake(pool);
    for (int32_t i = 0; i < pool->num_threads - 1; i++) pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    free(pool);
}
