#ifndef OFFSTEP_CPU_H
#define OFFSTEP_CPU_H

#include <stddef.h>

/* Instruction sets that the kernels here know how to use. A bit is set only if both the processor and the
 * operating system support the set. */
enum cpu_feature {
    CPU_SSE42_PCLMUL = 1 << 0,
    CPU_AVX2 = 1 << 1,
    CPU_AVX512 = 1 << 2, /* F, BW and VL */
    CPU_VPCLMUL = 1 << 3,
    CPU_ARM_CRC = 1 << 4,
};

/* Returns a set of `enum cpu_feature`. Cheap enough to call often, safe from any thread. */
unsigned cpu_features(void);

/* Writes the names of the features, separated by blanks, e.g. "sse4.2 avx2". */
void cpu_describe(unsigned features, char *text, size_t text_size);

#endif
