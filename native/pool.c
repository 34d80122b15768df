#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

struct job {
    pool_task *task;
    void *context;
    size_t count;
    atomic_size_t next;
};

static struct {
    pthread_mutex_t user; /* held by the one pool_run that has the helpers */
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t wake;
    pthread_cond_t idle;
    struct job *job;
    unsigned wanted; /* how many more helpers may join `job` */
    unsigned busy;   /* how many have joined and not left */
    unsigned started;
    int stopping;
    pthread_t helpers[POOL_MAX_THREADS];
} pool = {
    .user = PTHREAD_MUTEX_INITIALIZER,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .idle = PTHREAD_COND_INITIALIZER,
};

static void name_thread(const char *name)
{
#if defined(__linux__)
    pthread_setname_np(pthread_self(), name);
#elif defined(__APPLE__)
    pthread_setname_np(name);
#else
    (void)name;
#endif
}

/* Signals stay with the threads of the program: a handler must not run on a helper's stack. */
static int start_thread(pthread_t *thread, void *(*body)(void *), void *argument)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(thread, NULL, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

static void work(struct job *job)
{
    for (;;) {
        size_t piece = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (piece >= job->count)
            return;
        job->task(job->context, piece);
    }
}

static void *help(void *unused)
{
    (void)unused;
    name_thread("offstep-copy");
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.wanted == 0 && !pool.stopping)
            pthread_cond_wait(&pool.wake, &pool.lock);
        if (pool.stopping)
            break;
        struct job *job = pool.job;
        pool.wanted--;
        pool.busy++;
        pthread_mutex_unlock(&pool.lock);
        work(job);
        pthread_mutex_lock(&pool.lock);
        if (--pool.busy == 0)
            pthread_cond_signal(&pool.idle);
    }
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

/* The child of a fork has no helpers, and its locks may have been held by threads that it does not have. */
static void forget_helpers(void)
{
    pthread_mutex_init(&pool.user, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.idle, NULL);
    pool.job = NULL;
    pool.wanted = pool.busy = pool.started = 0;
    pool.stopping = 0;
}

static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, forget_helpers);
}

/* Called with pool.user held, so that no one else starts helpers. */
static unsigned start_helpers(unsigned wanted)
{
    static pthread_once_t watched = PTHREAD_ONCE_INIT;
    pthread_once(&watched, watch_forks);
    while (pool.started < wanted && start_thread(&pool.helpers[pool.started], help, NULL) == 0)
        pool.started++;
    return pool.started < wanted ? pool.started : wanted;
}

/* Hands job to the helpers, takes part, and takes it back: helpers that have not woken by then are not waited for. */
static void run_with_helpers(struct job *job, unsigned helpers)
{
    pthread_mutex_lock(&pool.lock);
    pool.job = job;
    pool.wanted = helpers;
    pthread_mutex_unlock(&pool.lock);
    for (unsigned i = 0; i < helpers; i++)
        pthread_cond_signal(&pool.wake);
    work(job);
    pthread_mutex_lock(&pool.lock);
    pool.wanted = 0;
    while (pool.busy > 0)
        pthread_cond_wait(&pool.idle, &pool.lock);
    pool.job = NULL;
    pthread_mutex_unlock(&pool.lock);
}

static unsigned clamp_threads(unsigned threads, size_t count)
{
    if (threads > POOL_MAX_THREADS)
        threads = POOL_MAX_THREADS;
    return threads > count ? (unsigned)count : threads;
}

void pool_run(unsigned threads, size_t count, pool_task *task, void *context)
{
    struct job job = {.task = task, .context = context, .count = count, .next = 0};
    threads = clamp_threads(threads, count);
    if (threads <= 1 || pthread_mutex_trylock(&pool.user) != 0) {
        work(&job);
        return;
    }
    run_with_helpers(&job, start_helpers(threads - 1));
    pthread_mutex_unlock(&pool.user);
}

static void *help_apart(void *job)
{
    name_thread("offstep-io");
    work(job);
    return NULL;
}

void pool_run_apart(unsigned threads, size_t count, pool_task *task, void *context)
{
    struct job job = {.task = task, .context = context, .count = count, .next = 0};
    pthread_t helpers[POOL_MAX_THREADS];
    unsigned started = 0;
    threads = clamp_threads(threads, count);
    while (started + 1 < threads && start_thread(&helpers[started], help_apart, &job) == 0)
        started++;
    work(&job);
    for (unsigned i = 0; i < started; i++)
        pthread_join(helpers[i], NULL);
}

void pool_stop(void)
{
    pthread_mutex_lock(&pool.user);
    pthread_mutex_lock(&pool.lock);
    pool.stopping = 1;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    for (unsigned i = 0; i < pool.started; i++)
        pthread_join(pool.helpers[i], NULL);
    pool.started = 0;
    pool.stopping = 0;
    pthread_mutex_unlock(&pool.user);
}
