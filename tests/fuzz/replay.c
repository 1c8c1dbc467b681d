/* SPDX-License-Identifier: MIT */
/* Runs a fuzz target over files and directories of files, where there is no
 * libFuzzer: what a fuzzer once found stays found. */
#include <dirent.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Returns the number of inputs, -1 after an error. */
static long
replay_file(const char *path, size_t size)
{
    FILE *file = fopen(path, "rb");
    /* Of just this size, so that a sanitizer sees who reads past the end. */
    uint8_t *data = malloc(size);
    long count = -1;

    if (file != NULL && (data != NULL || size == 0) &&
        fread(data, 1, size, file) == size) {
        (void)LLVMFuzzerTestOneInput(data, size);
        count = 1;
    } else {
        (void)fprintf(stderr, "%s: %s\n", path, strerror(errno));
    }
    free(data);
    if (file != NULL) {
        (void)fclose(file);
    }
    return count;
}

static long replay(const char *path);

static long
replay_directory(const char *path)
{
    DIR *directory = opendir(path);
    const struct dirent *entry;
    char inside[4096];
    long count = 0;

    if (directory == NULL) {
        (void)fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return -1;
    }
    while (count >= 0 && (entry = readdir(directory)) != NULL) {
        long more;

        if (entry->d_name[0] == '.') {
            continue;
        }
        (void)snprintf(inside, sizeof(inside), "%s/%s", path, entry->d_name);
        more = replay(inside);
        count = more < 0 ? -1 : count + more;
    }
    (void)closedir(directory);
    return count;
}

static long
replay(const char *path)
{
    struct stat file;

    if (stat(path, &file) != 0) {
        (void)fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return -1;
    }
    return S_ISDIR(file.st_mode) ? replay_directory(path)
                                 : replay_file(path, (size_t)file.st_size);
}

int
main(int argc, char **argv)
{
    long count = 0;

    for (int i = 1; i < argc; i++) {
        long more = replay(argv[i]);

        if (more < 0) {
            return 1;
        }
        count += more;
    }
    (void)printf("%ld inputs replayed\n", count);
    if (count == 0) {
        (void)fprintf(stderr, "usage: %s FILE_OR_DIRECTORY...\n", argv[0]);
    }
    return count == 0;
}
