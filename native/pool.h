#ifndef OFFSTEP_POOL_H
#define OFFSTEP_POOL_H

#include <stddef.h>

enum { POOL_MAX_THREADS = 256 };

/* Handles one piece of a job. Called once for each piece, from several threads, in rising order of start. */
typedef void pool_task(void *context, size_t piece);

/* Runs task for pieces 0 .. count-1 on up to `threads` threads, the caller's among them, and returns when all are
 * done. The helpers are kept for the next call. While another thread is using them, the caller does its work alone.
 * Cannot fail: where no thread can be started, the caller does everything. Survives fork. */
void pool_run(unsigned threads, size_t count, pool_task *task, void *context);

/* The same with threads of its own that end with the call, for work that blocks or takes long: it never keeps the
 * pool from others. */
void pool_run_apart(unsigned threads, size_t count, pool_task *task, void *context);

/* Ends and joins the helpers. A later pool_run starts new ones. */
void pool_stop(void);

#endif
