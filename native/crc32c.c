#include "crc32c.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "copy.h"
#include "cpu.h"
#include "x86.h"

#if defined(__aarch64__)
#include <arm_acle.h>
#endif

/* Polynomials over GF(2) modulo Castagnoli's, reflected: the top bit is the coefficient of x^0. */
#define POLYNOMIAL 0x82F63B78u
#define ONE 0x80000000u
#define X 0x40000000u

static uint32_t multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (uint32_t bit = ONE; bit; bit >>= 1) {
        if (a & bit)
            product ^= b;
        b = (b >> 1) ^ (b & 1 ? POLYNOMIAL : 0);
    }
    return product;
}

uint32_t crc32c_shift_for(uint64_t n)
{
    uint32_t power = ONE;
    uint32_t square = X;
    for (int i = 0; i < 3; i++) /* x^8: n counts bytes */
        square = multiply(square, square);
    for (; n; n >>= 1) {
        if (n & 1)
            power = multiply(power, square);
        square = multiply(square, square);
    }
    return power;
}

uint32_t crc32c_combine(uint32_t first, uint32_t second, uint32_t shift)
{
    return multiply(first, shift) ^ second;
}

/* Portable: eight tables, eight bytes a step. */
static uint32_t tables[8][256];

static void fill_tables(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t state = byte;
        for (int i = 0; i < 8; i++)
            state = (state >> 1) ^ (state & 1 ? POLYNOMIAL : 0);
        tables[0][byte] = state;
    }
    for (int t = 1; t < 8; t++)
        for (int byte = 0; byte < 256; byte++)
            tables[t][byte] = (tables[t - 1][byte] >> 8) ^ tables[0][tables[t - 1][byte] & 255];
}

static uint32_t crc_tables(uint32_t state, const uint8_t *data, size_t n)
{
    static pthread_once_t filled = PTHREAD_ONCE_INIT;
    pthread_once(&filled, fill_tables);
    for (; n >= 8; data += 8, n -= 8) {
        uint32_t low = state ^ ((uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 |
                                (uint32_t)data[3] << 24);
        state = tables[7][low & 255] ^ tables[6][low >> 8 & 255] ^ tables[5][low >> 16 & 255] ^ tables[4][low >> 24] ^
                tables[3][data[4]] ^ tables[2][data[5]] ^ tables[1][data[6]] ^ tables[0][data[7]];
    }
    for (; n > 0; data++, n--)
        state = (state >> 8) ^ tables[0][(state ^ *data) & 255];
    return state;
}

#if defined(__aarch64__)
#if defined(__clang__)
__attribute__((target("crc")))
#else
__attribute__((target("+crc")))
#endif
static uint32_t crc_arm(uint32_t state, const uint8_t *data, size_t n)
{
    for (; n >= 8; data += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, data, sizeof word);
        state = __crc32cd(state, word);
    }
    for (; n > 0; data++, n--)
        state = __crc32cb(state, *data);
    return state;
}
#endif

static const struct {
    const char *name;
    unsigned needs;
    crc32c_function *function;
} implementations[] = {
/* best first */
#if defined(__x86_64__)
    {"vpclmul", CPU_SSE42_PCLMUL | CPU_AVX512 | CPU_VPCLMUL, x86_crc32c_vpclmul},
    {"sse4.2", CPU_SSE42_PCLMUL, x86_crc32c_sse42},
#endif
#if defined(__aarch64__)
    {"arm-crc", CPU_ARM_CRC, crc_arm},
#endif
    {"tables", 0, crc_tables},
};

crc32c_function *crc32c_implementation(size_t number, const char **name)
{
    unsigned features = cpu_features();
    for (size_t i = 0; i < sizeof implementations / sizeof *implementations; i++) {
        if ((implementations[i].needs & features) != implementations[i].needs || number-- > 0)
            continue;
        *name = implementations[i].name;
        return implementations[i].function;
    }
    return NULL;
}

static uint32_t choose(uint32_t state, const uint8_t *data, size_t n);

static _Atomic(crc32c_function *) best = choose;

static uint32_t choose(uint32_t state, const uint8_t *data, size_t n)
{
    const char *name;
    crc32c_function *chosen = crc32c_implementation(0, &name);
    atomic_store_explicit(&best, chosen, memory_order_relaxed);
    return chosen(state, data, n);
}

static uint32_t update(uint32_t state, const uint8_t *data, size_t n)
{
    return atomic_load_explicit(&best, memory_order_relaxed)(state, data, n);
}

uint32_t crc32c_extend(uint32_t crc, const void *data, size_t n)
{
    return ~update(~crc, data, n);
}

uint32_t crc32c_extend_zeros(uint32_t crc, uint64_t n)
{
    static const uint8_t zeros[1024];
    if (n <= sizeof zeros)
        return ~update(~crc, zeros, n);
    return ~multiply(~crc, crc32c_shift_for(n));
}

/* Copies by blocks that the check has just brought into the first-level cache. Blocks as short as the check's own let
 * it read the next one while the stores of the last are on their way; 12 KB took 1.7 times as long. */
static uint32_t copy_by_blocks(uint8_t *dst, const uint8_t *src, size_t n, uint32_t state, int streaming)
{
    enum { BLOCK = 3072 };
    size_t size = BLOCK - ((uintptr_t)dst & 63); /* from then on blocks begin at cache lines */
    for (size_t done = 0; done < n; done += size, size = BLOCK) {
        if (n - done < size)
            size = n - done;
        state = update(state, src + done, size);
        if (streaming)
            copy_streaming(dst + done, src + done, size);
        else
            memcpy(dst + done, src + done, size);
    }
    return state;
}

uint32_t crc32c_copy(void *dst, const void *src, size_t n, uint32_t crc, int streaming)
{
#if defined(__x86_64__)
    if (streaming && atomic_load_explicit(&best, memory_order_relaxed) == x86_crc32c_vpclmul)
        return ~x86_copy_crc32c_vpclmul(dst, src, n, ~crc);
#endif
    return ~copy_by_blocks(dst, src, n, ~crc, streaming);
}
