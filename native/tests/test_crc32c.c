#include "crc32c.h"

#include <string.h>

#include "check.h"
#include "copy.h"

enum { SIZE = 1 << 15 };

static uint8_t data[SIZE + 64];
static uint8_t copied[SIZE + 128];

static uint32_t bit_by_bit(uint32_t crc, const uint8_t *bytes, size_t n)
{
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0);
    }
    return ~crc;
}

/* All lengths near the borders of the kernels, and some beyond. */
static size_t next_length(size_t n)
{
    return n < 1400 ? n + 1 : n + 251;
}

static void known_values(void)
{
    uint8_t bytes[32];
    CHECK(crc32c_extend(0, "", 0) == 0);
    CHECK(crc32c_extend(0, "123456789", 9) == 0xE3069283u);
    memset(bytes, 0, sizeof bytes); /* RFC 3720, B.4 */
    CHECK(crc32c_extend(0, bytes, sizeof bytes) == 0x8A9136AAu);
    memset(bytes, 0xFF, sizeof bytes);
    CHECK(crc32c_extend(0, bytes, sizeof bytes) == 0x62A8AB43u);
}

static void every_implementation_agrees(void)
{
    const char *name;
    crc32c_function *function;
    for (size_t i = 0; (function = crc32c_implementation(i, &name)) != NULL; i++) {
        printf("implementation: %s\n", name);
        for (size_t n = 0; n <= SIZE; n = next_length(n)) {
            const uint8_t *start = data + n % 17;
            CHECK(~function(~0x12345678u, start, n) == bit_by_bit(0x12345678u, start, n));
        }
    }
}

static void parts_combine_to_the_whole(void)
{
    uint32_t whole = bit_by_bit(0, data, SIZE);
    for (size_t cut = 0; cut <= SIZE; cut += 1021) {
        uint32_t first = crc32c_extend(0, data, cut);
        uint32_t second = crc32c_extend(0, data + cut, SIZE - cut);
        CHECK(crc32c_combine(first, second, crc32c_shift_for(SIZE - cut)) == whole);
        CHECK(crc32c_extend(first, data + cut, SIZE - cut) == whole);
    }
}

static void zeros_are_appended(void)
{
    static const uint8_t zeros[4096];
    for (size_t n = 0; n <= sizeof zeros; n += 127)
        CHECK(crc32c_extend_zeros(0xCAFE, n) == bit_by_bit(0xCAFE, zeros, n));
    uint32_t twice = crc32c_extend_zeros(crc32c_extend_zeros(7, 1ull << 32), 1ull << 32);
    CHECK(crc32c_extend_zeros(7, 1ull << 33) == twice);
}

static void copies_are_exact_and_stay_inside(void)
{
    for (size_t n = 0; n <= SIZE; n = n < 1400 ? n + 13 : n + 1021)
        for (int streaming = 0; streaming < 2; streaming++) {
            uint8_t *dst = copied + 1 + n % 64;
            const uint8_t *src = data + n % 7;
            memset(copied, 0xEE, sizeof copied);
            CHECK(crc32c_copy(dst, src, n, 99, streaming) == bit_by_bit(99, src, n));
            copy_fence();
            CHECK(memcmp(dst, src, n) == 0);
            CHECK(dst[-1] == 0xEE && dst[n] == 0xEE);
        }
}

int main(void)
{
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(i * 2654435761u >> 13);
    known_values();
    every_implementation_agrees();
    parts_combine_to_the_whole();
    zeros_are_appended();
    copies_are_exact_and_stay_inside();
    return 0;
}
