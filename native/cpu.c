#include "cpu.h"

#include <stdio.h>
#include <string.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#endif

unsigned cpu_features(void)
{
    unsigned found = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul"))
        found |= CPU_SSE42_PCLMUL;
    if (__builtin_cpu_supports("avx2"))
        found |= CPU_AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        found |= CPU_AVX512;
    if (__builtin_cpu_supports("vpclmulqdq"))
        found |= CPU_VPCLMUL;
#elif defined(__aarch64__) && defined(__APPLE__)
    found |= CPU_ARM_CRC; /* every arm64 Mac has it */
#elif defined(__aarch64__) && defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_CRC32)
        found |= CPU_ARM_CRC;
#endif
    return found;
}

void cpu_describe(unsigned features, char *text, size_t text_size)
{
    static const char *const names[] = {"sse4.2", "avx2", "avx512", "vpclmul", "arm-crc"};
    size_t used = 0;
    if (text_size == 0)
        return;
    text[0] = '\0';
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (!(features & (1u << i)))
            continue;
        int wrote = snprintf(text + used, text_size - used, "%s%s", used ? " " : "", names[i]);
        if (wrote < 0 || (size_t)wrote >= text_size - used)
            return;
        used += (size_t)wrote;
    }
}
