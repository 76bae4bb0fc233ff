/* The thread team: the caller and up to 63 helpers that share the items of one job.
 *
 * A helper that the system has not scheduled when a job ends is not waited for: only helpers that
 * have entered a job hold it up. So on a machine whose cores also run other processes a job costs
 * at most what the caller alone would need, where OpenMP's closing barrier costs a time slice.
 * Helpers spin for a short while after a job, since the next one is usually microseconds away,
 * then sleep.
 */
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vec.h"

#define MAX_HELPERS 63
#define SPINS 2000        /* about 50 us */
#define OPEN (1u << 16)   /* in `gate`: helpers may enter; the bits below count those inside */

static struct {
    _Alignas(64) atomic_uint gate;
    _Alignas(64) atomic_uint round; /* a job's number; helpers sleep on it */
    _Alignas(64) atomic_long next;  /* the next item that nobody has taken */
    _Alignas(64) atomic_uint sleepers;
    void (*item)(const void *, long);
    const void *args;
    long count;
    atomic_int wanted; /* helpers that may join this job */
} team;

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;
static int helpers;

static void take_items(void) {
    for (long i; (i = atomic_fetch_add(&team.next, 1)) < team.count;) team.item(team.args, i);
}

static int enter(void) {
    unsigned gate = atomic_load(&team.gate);
    while (gate & OPEN)
        if (atomic_compare_exchange_weak(&team.gate, &gate, gate + 1)) return 1;
    return 0;
}

static void *help(void *id) {
    unsigned seen = 0;
    for (;;) {
        unsigned round = atomic_load(&team.round);
        for (int spin = 0; round == seen && spin < SPINS; spin++) {
            _mm_pause();
            round = atomic_load(&team.round);
        }
        if (round == seen) {
            atomic_fetch_add(&team.sleepers, 1);
            syscall(SYS_futex, &team.round, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
            atomic_fetch_sub(&team.sleepers, 1);
            continue;
        }
        seen = round;
        if ((int)(intptr_t)id < atomic_load(&team.wanted) && enter()) {
            take_items();
            atomic_fetch_sub(&team.gate, 1);
        }
    }
    return 0;
}

static void after_fork(void) {
    helpers = 0;
    atomic_store(&team.sleepers, 0);
    pthread_mutex_init(&owner, 0);
}

static void hire(int wanted) {
    static int watching_forks;
    if (!watching_forks) watching_forks = !pthread_atfork(0, 0, after_fork);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (pthread_t thread; helpers < wanted && helpers < MAX_HELPERS; helpers++)
        if (pthread_create(&thread, &attributes, help, (void *)(intptr_t)helpers)) break;
    pthread_attr_destroy(&attributes);
}

void run_items(void (*item)(const void *, long), const void *args, long count, int threads) {
    /* Another thread's job has the helpers: this one runs alone. */
    if (threads <= 1 || count <= 1 || pthread_mutex_trylock(&owner)) {
        for (long i = 0; i < count; i++) item(args, i);
        return;
    }
    if (helpers < threads - 1) hire(threads - 1);
    team.item = item;
    team.args = args;
    team.count = count;
    atomic_store(&team.next, 0);
    atomic_store(&team.wanted, threads - 1);
    atomic_store(&team.gate, OPEN);
    atomic_fetch_add(&team.round, 1);
    if (atomic_load(&team.sleepers))
        syscall(SYS_futex, &team.round, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
    take_items();
    atomic_fetch_and(&team.gate, ~OPEN);
    for (int spin = 0; atomic_load(&team.gate); spin++) {
        if (spin < SPINS) _mm_pause();
        else sched_yield();
    }
    pthread_mutex_unlock(&owner);
}
