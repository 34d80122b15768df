#ifndef OFFSTEP_CHECK_H
#define OFFSTEP_CHECK_H

#include <stdio.h>
#include <stdlib.h>

/* Unlike assert() it also holds in release builds. */
#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s: expected %s\n", __FILE__, __LINE__, __func__, #condition);                     \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#endif
