#include "exit.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static atomic_flag is_registered = ATOMIC_FLAG_INIT;

/* exit() must not be called in here, so the handlers registered before ours do not run; all output is flushed. */
static void end_as_failed(void)
{
    fflush(NULL);
    _exit(EXIT_FAILURE);
}

#ifdef __GLIBC__
static void end_unless_failed(int status, void *unused)
{
    (void)unused;
    if (status == EXIT_SUCCESS)
        end_as_failed();
}

void fail_exit(void)
{
    if (!atomic_flag_test_and_set(&is_registered))
        on_exit(end_unless_failed, NULL);
}
#else /* no way to know the status: another failure's status becomes 1 */
void fail_exit(void)
{
    if (!atomic_flag_test_and_set(&is_registered))
        atexit(end_as_failed);
}
#endif
