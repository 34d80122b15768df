#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

enum { SIZE = 3 << 20 };

static char directory[] = "/tmp/offstep-test-io-XXXXXX";

static const char *in_directory(const char *name)
{
    static char paths[4][128];
    static unsigned turn;
    char *path = paths[turn++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", directory, name);
    return path;
}

static uint8_t *new_pattern(size_t n)
{
    uint8_t *data = malloc(n);
    CHECK(data != NULL);
    for (size_t i = 0; i < n; i++)
        data[i] = (uint8_t)(i * 2654435761u >> 11);
    return data;
}

static void prefault_keeps_what_is_there(void)
{
    size_t n = (40 << 20) + 123;
    uint8_t *data = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(data != MAP_FAILED);
    memset(data + 5000, 7, 10000);
    CHECK(prefault(data + 1, n - 1, 3) == 0);
    for (size_t i = 0; i < n; i += 100)
        CHECK(data[i] == (i >= 5000 && i < 15000 ? 7 : 0));
    CHECK(prefault(data, 0, 1) == 0);
    munmap(data, n);
}

static void prefault_reports_memory_that_cannot_be_written(void)
{
    uint8_t *data = mmap(NULL, 8192, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(data != MAP_FAILED);
#ifdef MADV_POPULATE_WRITE
    CHECK(prefault(data, 8192, 1) != 0);
#endif
    munmap(data, 8192);
}

static void blocks_land_where_they_belong(void)
{
    uint8_t *data = new_pattern(SIZE);
    uint8_t *found = malloc(SIZE);
    static const size_t blocks[] = {SIZE, 1 << 20, 4096, 65537};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        int fd = open(in_directory("file"), O_RDWR | O_CREAT | O_TRUNC, 0600);
        CHECK(fd >= 0);
        CHECK(write_at(fd, data, SIZE, 777, blocks[i], 3) == 0);
        CHECK(pread(fd, found, SIZE, 777) == SIZE);
        CHECK(memcmp(data, found, SIZE) == 0);
        CHECK(lseek(fd, 0, SEEK_END) == SIZE + 777);
        close(fd);
    }
    free(found);
    free(data);
}

static void the_first_error_is_returned(void)
{
    uint8_t byte = 1;
    CHECK(write_at(-1, &byte, 1, 0, 1, 2) == EBADF);
    int fd = open("/dev/full", O_WRONLY);
    if (fd >= 0) {
        CHECK(write_at(fd, &byte, 1, 0, 1, 1) == ENOSPC);
        close(fd);
    }
}

static void exchanged_paths_swap_their_contents(void)
{
    const char *first = in_directory("first");
    const char *second = in_directory("second");
    CHECK(mkdir(first, 0700) == 0);
    int fd = open(second, O_WRONLY | O_CREAT, 0600);
    CHECK(fd >= 0);
    close(fd);
    int error = rename_exchange(AT_FDCWD, first, second);
    if (error == ENOSYS || error == EINVAL) {
        fprintf(stderr, "SKIPPED: no RENAME_EXCHANGE here\n");
        return;
    }
    CHECK(error == 0);
    struct stat status;
    CHECK(stat(second, &status) == 0 && S_ISDIR(status.st_mode));
    CHECK(stat(first, &status) == 0 && S_ISREG(status.st_mode));
    CHECK(rename_exchange(AT_FDCWD, first, in_directory("none")) == ENOENT);
}

static void remove_directory(void)
{
    unlink(in_directory("file"));
    unlink(in_directory("first"));
    rmdir(in_directory("first"));
    unlink(in_directory("second"));
    rmdir(in_directory("second"));
    rmdir(directory);
}

int main(void)
{
    CHECK(mkdtemp(directory) != NULL);
    prefault_keeps_what_is_there();
    prefault_reports_memory_that_cannot_be_written();
    blocks_land_where_they_belong();
    the_first_error_is_returned();
    exchanged_paths_swap_their_contents();
    remove_directory();
    return 0;
}
