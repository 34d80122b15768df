#ifndef OFFSTEP_X86_H
#define OFFSTEP_X86_H

/* Kernels for x86-64. Each is compiled for its instruction set whatever the compiler's flags; the caller has asked
 * cpu_features() first. CRC states are raw: not inverted at the start and the end. */
#if defined(__x86_64__)

#include <stddef.h>
#include <stdint.h>

/* CPU_SSE42_PCLMUL */
uint32_t x86_crc32c_sse42(uint32_t state, const uint8_t *data, size_t n);

/* CPU_SSE42_PCLMUL, CPU_AVX512 and CPU_VPCLMUL, as the next one */
uint32_t x86_crc32c_vpclmul(uint32_t state, const uint8_t *data, size_t n);

/* Copies past the cache and checks in one pass. */
uint32_t x86_copy_crc32c_vpclmul(uint8_t *dst, const uint8_t *src, size_t n, uint32_t state);

/* Copies past the cache; any x86-64. Wider stores were not faster. */
void x86_copy_streaming(uint8_t *dst, const uint8_t *src, size_t n);

void x86_fence(void);

#endif
#endif
