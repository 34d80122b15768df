#include "x86.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#define TARGET(sets) __attribute__((target(sets)))
#define SSE42 TARGET("sse4.2,crc32,pclmul")
#define VPCLMUL TARGET("sse4.2,crc32,pclmul,avx512f,avx512bw,avx512vl,vpclmulqdq")

/* The crc32 instruction takes 3 cycles and a new one can start in each, hence three streams of SEGMENT bytes. */
enum { SEGMENT = 1024 };

static uint64_t load64(const uint8_t *data)
{
    uint64_t word;
    memcpy(&word, data, sizeof word);
    return word;
}

SSE42 static uint32_t crc_words(uint32_t state, const uint8_t *data, size_t n)
{
    uint64_t wide = state;
    for (; n >= 8; data += 8, n -= 8)
        wide = _mm_crc32_u64(wide, load64(data));
    state = (uint32_t)wide;
    for (; n > 0; data++, n--)
        state = _mm_crc32_u8(state, *data);
    return state;
}

/* Multiplies state by factor * x^33 modulo the polynomial. */
SSE42 static uint32_t advance(uint32_t state, uint32_t factor)
{
    __m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128((int)state), _mm_cvtsi32_si128((int)factor), 0);
    return (uint32_t)_mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

SSE42 uint32_t x86_crc32c_sse42(uint32_t state, const uint8_t *data, size_t n)
{
    const uint32_t one_segment = 0x170076fa;  /* x^(8 * 1024 - 33) */
    const uint32_t two_segments = 0xa51b6135; /* x^(16 * 1024 - 33) */
    for (; n >= 3 * SEGMENT; data += 3 * SEGMENT, n -= 3 * SEGMENT) {
        uint64_t a = state, b = 0, c = 0;
        for (size_t line = 0; line < SEGMENT; line += 64) {
            /* Three short streams are not what the prefetcher of the processor looks for. */
            for (size_t i = 0; i < 3; i++)
                __builtin_prefetch(data + (3 + i) * SEGMENT + line);
            for (size_t i = line; i < line + 64; i += 8) {
                a = _mm_crc32_u64(a, load64(data + i));
                b = _mm_crc32_u64(b, load64(data + SEGMENT + i));
                c = _mm_crc32_u64(c, load64(data + 2 * SEGMENT + i));
            }
        }
        state = advance((uint32_t)a, two_segments) ^ advance((uint32_t)b, one_segment) ^ (uint32_t)c;
    }
    return crc_words(state, data, n);
}

/* Folding (Gopal et al., "Fast CRC Computation Using PCLMULQDQ"): sixteen 128-bit lanes, each multiplied by x^2048
 * and added to the lane 256 bytes on. In the reflected bit order a product carries an extra x^33, so the factors are
 * x^(2048+31) for the first half of a lane and x^(2048-33) for the second. What is left at the end stands for
 * 256 bytes of message, and the crc32 instruction finishes it. */
enum { FOLD = 256 };


VPCLMUL static inline __m512i fold_lane(__m512i lane, __m512i next)
{
    const __m512i factors = _mm512_broadcast_i32x4(_mm_set_epi64x(0xb9e02b86, 0xdcb17aa4));
    __m512i first = _mm512_clmulepi64_epi128(lane, factors, 0x00);
    __m512i second = _mm512_clmulepi64_epi128(lane, factors, 0x11);
    return _mm512_ternarylogic_epi64(first, second, next, 0x96);
}

VPCLMUL static inline uint32_t fold_finish(const __m512i lane[4])
{
    uint8_t rest[FOLD];
    for (int i = 0; i < 4; i++)
        _mm512_storeu_si512(rest + 64 * i, lane[i]);
    return crc_words(0, rest, FOLD);
}

VPCLMUL uint32_t x86_crc32c_vpclmul(uint32_t state, const uint8_t *data, size_t n)
{
    if (n < 4 * FOLD)
        return x86_crc32c_sse42(state, data, n);
    __m512i lane[4];
    for (int i = 0; i < 4; i++)
        lane[i] = _mm512_loadu_si512(data + 64 * i);
    lane[0] = _mm512_xor_si512(lane[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)state)));
    data += FOLD;
    n -= FOLD;
    for (; n >= FOLD; data += FOLD, n -= FOLD)
        for (int i = 0; i < 4; i++)
            lane[i] = fold_lane(lane[i], _mm512_loadu_si512(data + 64 * i));
    return crc_words(fold_finish(lane), data, n);
}

/* Bytes up to the next multiple of 64, where streaming stores may begin. */
static size_t misaligned(const uint8_t *dst)
{
    return -(uintptr_t)dst & 63;
}

VPCLMUL static inline __m512i load_and_stream(uint8_t *dst, const uint8_t *src)
{
    __m512i line = _mm512_loadu_si512(src);
    _mm512_stream_si512((void *)dst, line);
    return line;
}

VPCLMUL static uint32_t copy_and_check(uint8_t *dst, const uint8_t *src, size_t n, uint32_t state)
{
    memcpy(dst, src, n);
    return x86_crc32c_sse42(state, src, n);
}

VPCLMUL uint32_t x86_copy_crc32c_vpclmul(uint8_t *dst, const uint8_t *src, size_t n, uint32_t state)
{
    if (n < 4 * FOLD)
        return copy_and_check(dst, src, n, state);
    size_t head = misaligned(dst);
    state = copy_and_check(dst, src, head, state);
    dst += head;
    src += head;
    n -= head;
    __m512i lane[4];
    for (int i = 0; i < 4; i++)
        lane[i] = load_and_stream(dst + 64 * i, src + 64 * i);
    lane[0] = _mm512_xor_si512(lane[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)state)));
    size_t done = FOLD;
    for (; n - done >= FOLD; done += FOLD)
        for (int i = 0; i < 4; i++)
            lane[i] = fold_lane(lane[i], load_and_stream(dst + done + 64 * i, src + done + 64 * i));
    return copy_and_check(dst + done, src + done, n - done, fold_finish(lane));
}

void x86_copy_streaming(uint8_t *dst, const uint8_t *src, size_t n)
{
    size_t head = misaligned(dst) < n ? misaligned(dst) : n;
    memcpy(dst, src, head);
    size_t done = head;
    for (; n - done >= 64; done += 64)
        for (size_t i = done; i < done + 64; i += 16)
            _mm_stream_si128((__m128i *)(dst + i), _mm_loadu_si128((const __m128i *)(src + i)));
    memcpy(dst + done, src + done, n - done);
}

void x86_fence(void)
{
    _mm_sfence();
}

#else
typedef int x86_nothing; /* ISO C forbids an empty file */
#endif
