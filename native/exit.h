#ifndef OFFSTEP_EXIT_H
#define OFFSTEP_EXIT_H

/* Makes this process end with status 1 where exit() would end it with 0. Any thread; once is enough. */
void fail_exit(void);

#endif
