/* SPDX-License-Identifier: MIT */
#include "epx_info_system.h"

#include <ctype.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool
epx__read_line(const char *path, char *line, size_t size)
{
    FILE *file = fopen(path, "re");
    bool found;

    if (file == NULL) {
        return false;
    }
    found = fgets(line, (int)size, file) != NULL;
    (void)fclose(file);
    if (found) {
        line[strcspn(line, "\n")] = '\0';
    }
    return found;
}

/* The value, if the line is of that name. */
static const char *
match_field(const char *line, const char *name)
{
    size_t length = strlen(name);

    if (strncmp(line, name, length) != 0) {
        return NULL;
    }
    line += length;
    line += strspn(line, " \t");
    return *line == ':' ? line + 1 + strspn(line + 1, " \t") : NULL;
}

bool
epx__read_field(const char *path, const char *name, char *value, size_t size)
{
    FILE *file = fopen(path, "re");
    char *line = NULL;
    size_t capacity = 0;
    bool found = false;

    if (file == NULL) {
        return false;
    }
    while (!found && getline(&line, &capacity, file) > 0) {
        const char *text = match_field(line, name);

        if (text != NULL) {
            (void)snprintf(value, size, "%.*s", (int)strcspn(text, "\n"), text);
            found = true;
        }
    }
    free(line);
    (void)fclose(file);
    return found;
}

uint64_t
epx__parse_size(const char *text)
{
    char *unit;
    uint64_t value;

    if (strcmp(text, "max") == 0) {
        return UINT64_MAX;
    }
    if (!isdigit((unsigned char)text[0])) {
        return 0;
    }
    value = strtoull(text, &unit, 10);
    unit += strspn(unit, " ");
    switch (toupper((unsigned char)*unit)) {
    case 'G':
        return value << 30;
    case 'M':
        return value << 20;
    case 'K':
        return value << 10;
    default:
        return value;
    }
}

bool
epx__read_choice(const char *path, char *word, size_t size)
{
    char line[256];
    const char *start;

    if (!epx__read_line(path, line, sizeof(line))) {
        return false;
    }
    start = strchr(line, '[');
    if (start == NULL) {
        return false;
    }
    start++;
    (void)snprintf(word, size, "%.*s", (int)strcspn(start, "]"), start);
    return true;
}

static bool
read_cache_field(int index, const char *name, char *value, size_t size)
{
    char path[96];

    (void)snprintf(path, sizeof(path),
                   "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index,
                   name);
    return epx__read_line(path, value, size);
}

uint64_t
epx__cache_bytes(int level)
{
    char value[32];

    for (int i = 0; read_cache_field(i, "level", value, sizeof(value)); i++) {
        if (atoi(value) != level ||
            !read_cache_field(i, "type", value, sizeof(value)) ||
            strcmp(value, "Instruction") == 0) {
            continue;
        }
        if (read_cache_field(i, "size", value, sizeof(value))) {
            return epx__parse_size(value);
        }
    }
    return 0;
}

static int
compare_sizes(const void *a, const void *b)
{
    const uint64_t *left = a;
    const uint64_t *right = b;

    return (*left > *right) - (*left < *right);
}

size_t
epx__huge_page_sizes(uint64_t *sizes, size_t max)
{
    static const char prefix[] = "hugepages-";
    DIR *directory = opendir("/sys/kernel/mm/hugepages");
    struct dirent *entry;
    size_t count = 0;

    if (directory == NULL) {
        return 0;
    }
    while (count < max && (entry = readdir(directory)) != NULL) {
        if (strncmp(entry->d_name, prefix, sizeof(prefix) - 1) == 0) {
            sizes[count++] =
                epx__parse_size(entry->d_name + sizeof(prefix) - 1);
        }
    }
    (void)closedir(directory);
    qsort(sizes, count, sizeof(*sizes), compare_sizes);
    return count;
}

/* The limit of a parent binds as well, so go up to the root. */
uint64_t
epx__cgroup_memory_bytes(void)
{
    char group[512];
    uint64_t limit = UINT64_MAX;

    /* "0::/path" */
    if (!epx__read_field("/proc/self/cgroup", "0:", group, sizeof(group))) {
        return limit;
    }
    for (;;) {
        char path[600];
        char text[32];
        char *slash;

        (void)snprintf(path, sizeof(path), "/sys/fs/cgroup%s/memory.max",
                       group);
        if (epx__read_line(path, text, sizeof(text)) &&
            epx__parse_size(text) < limit) {
            limit = epx__parse_size(text);
        }
        slash = strrchr(group, '/');
        if (slash == NULL) {
            return limit;
        }
        *slash = '\0';
    }
}
