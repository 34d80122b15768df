#include "finite.h"

#include <string.h>

#include "check.h"

enum { ELEMENTS = 40000 };

static const size_t widths[FLOAT_KINDS] = {2, 2, 4, 8};
static uint8_t data[ELEMENTS * 8 + 3];

static void put(size_t element, size_t width, size_t shift, uint64_t bits)
{
    memcpy(data + shift + element * width, &bits, width); /* little-endian */
}

/* For each kind: infinity, a quiet and a negative signalling NaN, then what is just finite: the largest and -0. */
static const uint64_t specials[FLOAT_KINDS][5] = {
    {0x7c00, 0x7e00, 0xfc01, 0x7bff, 0x8000},
    {0x7f80, 0x7fc0, 0xff81, 0x7f7f, 0x8000},
    {0x7f800000, 0x7fc00000, 0xff800001, 0x7f7fffff, 0x80000000},
    {0x7ff0000000000000, 0x7ff8000000000000, 0xfff0000000000001, 0x7fefffffffffffff, 0x8000000000000000},
};

static void test_counts(finite_function *count, enum float_kind kind, size_t shift, size_t elements)
{
    size_t width = widths[kind];
    uint64_t expected = 0;
    memset(data, 0, sizeof data);
    for (size_t i = 0; i < elements; i++) {
        size_t which = (i * 7 + i / 11) % 9;
        if (which < 5)
            put(i, width, shift, specials[kind][which]);
        expected += which < 3;
    }
    CHECK(count(data + shift, elements * width, kind) == expected);
}

static void test_all_nonfinite(finite_function *count, enum float_kind kind)
{
    memset(data, 0xff, sizeof data);
    CHECK(count(data, ELEMENTS * widths[kind], kind) == ELEMENTS);
}

static void test_ranges(void)
{
    char message[256];
    struct float_range ranges[] = {{0, 8, FLOAT32, 0}, {8, 8, FLOAT64, 0}, {16, 4, BFLOAT16, 0}};
    memset(data, 0, sizeof data);
    put(1, 4, 0, specials[FLOAT32][1]);
    put(1, 8, 0, specials[FLOAT64][0]);
    put(9, 2, 0, specials[BFLOAT16][0]);
    put(10, 2, 0, specials[BFLOAT16][0]); /* behind the last range */
    CHECK(finite_check(ranges, 3, 20, message, sizeof message) == 0);
    CHECK(count_nonfinite(data, ranges, 3) == 3);
    CHECK(count_nonfinite(data, ranges, 0) == 0);
    CHECK(finite_check(ranges, 3, 19, message, sizeof message) == -1);
    CHECK(strstr(message, "range 2") != NULL);
    struct float_range bad[] = {
        {0, 6, FLOAT32, 0}, {0, 4, FLOAT_KINDS, 0}, {0, 4, FLOAT32, 1}, {24, 4, FLOAT32, 0}, {UINT64_MAX, 4, FLOAT32, 0},
        {4, UINT64_MAX - 3, FLOAT32, 0},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(finite_check(&bad[i], 1, 20, message, sizeof message) == -1);
}

int main(void)
{
    static const size_t lengths[] = {0, 1, 2, 3, 7, 8, 15, 16, 31, 33, 63, 65, 1000, 16384, 16385, ELEMENTS};
    const char *name;
    finite_function *count;
    for (size_t number = 0; (count = finite_implementation(number, &name)) != NULL; number++)
        for (int kind = 0; kind < FLOAT_KINDS; kind++) {
            for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
                for (size_t shift = 0; shift < 4; shift++)
                    test_counts(count, (enum float_kind)kind, shift, lengths[i]);
            test_all_nonfinite(count, (enum float_kind)kind);
        }
    test_ranges();
    return 0;
}
