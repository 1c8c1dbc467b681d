/* SPDX-License-Identifier: MIT */
#include "conformance/routing_file.h"
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE_BYTES = 4096 };

/* The number behind `key` in a comment, 0 if it is not there. */
static int32_t
find_value(const char *line, const char *key)
{
    const char *at = strstr(line, key);

    return at ? (int32_t)strtol(at + strlen(key), NULL, 10) : 0;
}

static bool
add_token(routing_file_t *file, const char *line)
{
    size_t bytes =
        (size_t)(file->num_tokens + 1) * (size_t)file->topk * sizeof(int32_t);
    int32_t *idx = realloc(file->topk_idx, bytes);

    if (!idx) {
        return false;
    }
    file->topk_idx = idx;
    for (int32_t k = 0; k < file->topk; k++) {
        char *end;
        long expert = strtol(line, &end, 10);

        if (end == line || *end != ',' || expert < 0 ||
            expert >= file->num_experts) {
            return false;
        }
        idx[file->num_tokens * file->topk + k] = (int32_t)expert;
        line = end + 1;
    }
    file->num_tokens++;
    return true;
}

static bool
read_file(const char *path, routing_file_t *file)
{
    char line[LINE_BYTES];
    FILE *stream = fopen(path, "r");
    bool ok = stream != NULL;
    int64_t number = 0;

    *file = (routing_file_t){ 0 };
    while (ok && fgets(line, sizeof(line), stream)) {
        number++;
        if (line[0] == '#') {
            if (file->topk == 0) {
                file->num_experts = find_value(line, "num_experts=");
                file->topk = find_value(line, "top_k=");
            }
        } else if (strncmp(line, "expert", 6) != 0) {
            ok = file->topk > 0 && file->topk <= EPX_MAX_TOPK &&
                 add_token(file, line);
        }
    }
    if (!ok) {
        printf("%s:%lld: not a routing file\n", path, (long long)number);
        free(file->topk_idx);
    }
    if (stream) {
        fclose(stream);
    }
    return ok;
}

int
routing_files_read(const char *folder, routing_file_t *files, int max_files)
{
    char pattern[4096];
    glob_t found;
    int count = 0;

    snprintf(pattern, sizeof(pattern), "%s/*.csv", folder);
    if (glob(pattern, 0, NULL, &found) != 0) {
        return 0;
    }
    for (size_t i = 0; i < found.gl_pathc && count < max_files; i++) {
        if (!read_file(found.gl_pathv[i], &files[count])) {
            while (count > 0) {
                free(files[--count].topk_idx);
            }
            count = -1;
            break;
        }
        count++;
    }
    globfree(&found);
    return count;
}
