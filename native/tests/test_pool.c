#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#if defined(__has_feature)
#define HAS_FEATURE(name) __has_feature(name)
#else
#define HAS_FEATURE(name) 0
#endif
#if defined(__SANITIZE_THREAD__) || HAS_FEATURE(thread_sanitizer)
#define UNDER_TSAN 1 /* it does not follow threads into a child */
#else
#define UNDER_TSAN 0
#endif

enum { PIECES = 1000 };

struct tally {
    unsigned char seen[PIECES];
    atomic_size_t total;
};

static void count_piece(void *context, size_t piece)
{
    struct tally *tally = context;
    tally->seen[piece]++; /* not atomic: a piece handed out twice is also a race that TSan reports */
    atomic_fetch_add(&tally->total, 1);
}

typedef void runner(unsigned, size_t, pool_task *, void *);

static void check_run(runner *run, unsigned threads, size_t count)
{
    struct tally tally;
    memset(&tally, 0, sizeof tally);
    run(threads, count, count_piece, &tally);
    CHECK(atomic_load(&tally.total) == count);
    for (size_t i = 0; i < count; i++)
        CHECK(tally.seen[i] == 1);
}

static void every_piece_runs_once(void)
{
    for (unsigned threads = 0; threads < 9; threads++)
        for (size_t count = 0; count <= PIECES; count = count * 3 + 1) {
            check_run(pool_run, threads, count);
            check_run(pool_run_apart, threads, count);
        }
}

static void *run_often(void *threads)
{
    for (int i = 0; i < 200; i++)
        check_run(pool_run, (unsigned)(uintptr_t)threads, 50);
    return NULL;
}

static void callers_do_not_disturb_each_other(void)
{
    pthread_t callers[4];
    for (uintptr_t i = 0; i < 4; i++)
        CHECK(pthread_create(&callers[i], NULL, run_often, (void *)(i + 1)) == 0);
    for (int i = 0; i < 4; i++)
        pthread_join(callers[i], NULL);
}

static void a_forked_child_has_a_working_pool(void)
{
    check_run(pool_run, 4, PIECES);
    pid_t child = fork();
    if (child == 0) {
        check_run(pool_run, 4, PIECES);
        pool_stop();
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    check_run(pool_run, 4, PIECES);
}

static void a_stopped_pool_starts_again(void)
{
    pool_stop();
    check_run(pool_run, 3, PIECES);
    pool_stop();
}

int main(void)
{
    every_piece_runs_once();
    callers_do_not_disturb_each_other();
    if (!UNDER_TSAN)
        a_forked_child_has_a_working_pool();
    a_stopped_pool_starts_again();
    return 0;
}
