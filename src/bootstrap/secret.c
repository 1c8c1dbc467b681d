/* SPDX-License-Identifier: MIT */
#include "bootstrap/secret.h"

#include "core/env.h"
#include "core/status.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pwd.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEX_BYTES 64

_Static_assert(HEX_BYTES == 2 * EPX__SECRET_BYTES, "two digits a byte");

typedef struct path {
    char text[PATH_MAX];
} path_t;

static bool
parse_secret(const char *text, size_t length,
             unsigned char secret[EPX__SECRET_BYTES])
{
    size_t bytes;

    return length == HEX_BYTES &&
           sodium_hex2bin(secret, EPX__SECRET_BYTES, text, length, NULL, &bytes,
                          NULL) == 0 &&
           bytes == EPX__SECRET_BYTES;
}

/* A file that others can read or change holds no secret. */
static epx_status_t
check_file(int fd, const char *path)
{
    struct stat file;

    if (fstat(fd, &file) != 0) {
        return epx__fail(EPX_ERR_SYSTEM, "the secret file %s: %m", path);
    }
    if (!S_ISREG(file.st_mode)) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "the secret file %s is not a regular file", path);
    }
    if (file.st_uid != geteuid()) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "the secret file %s belongs to user %u; it must "
                         "belong to user %u",
                         path, (unsigned)file.st_uid, (unsigned)geteuid());
    }
    if ((file.st_mode & 077) != 0) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "the secret file %s has mode %03o; nobody but its "
                         "owner may have access (chmod 600)",
                         path, (unsigned)file.st_mode & 0777);
    }
    return EPX_OK;
}

static epx_status_t
read_content(int fd, const char *path, unsigned char secret[EPX__SECRET_BYTES])
{
    char text[HEX_BYTES + 2]; /* a line end, and one byte too many */
    size_t length = 0;
    ssize_t n;
    bool valid;

    do {
        n = read(fd, text + length, sizeof(text) - length);
        length += n > 0 ? (size_t)n : 0;
    } while (length < sizeof(text) && (n > 0 || (n < 0 && errno == EINTR)));
    if (n < 0) {
        sodium_memzero(text, sizeof(text));
        return epx__fail(EPX_ERR_SYSTEM, "the secret file %s: %m", path);
    }
    if (length == HEX_BYTES + 1 && text[HEX_BYTES] == '\n') {
        length--;
    }
    valid = parse_secret(text, length, secret);
    sodium_memzero(text, sizeof(text));
    return valid ? EPX_OK
                 : epx__fail(EPX_ERR_ENVIRONMENT,
                             "the secret file %s must hold one line of %d "
                             "hexadecimal digits",
                             path, HEX_BYTES);
}

/* *found_p is false, and nothing has failed, when there is no such file. */
static epx_status_t
read_file(const char *path, unsigned char secret[EPX__SECRET_BYTES],
          bool *found_p)
{
    /* Without O_NONBLOCK a fifo would keep us waiting. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    epx_status_t status;

    *found_p = fd >= 0;
    if (fd < 0) {
        return errno == ENOENT ? EPX_OK
                               : epx__fail(EPX_ERR_ENVIRONMENT,
                                           "the secret file %s: %m", path);
    }
    status = check_file(fd, path);
    if (status == EPX_OK) {
        status = read_content(fd, path, secret);
    }
    (void)close(fd);
    return status;
}

static epx_status_t
find_home(path_t *home)
{
    const char *variable = epx__env_string("HOME");
    struct passwd entry;
    struct passwd *found = NULL;
    char buffer[4096];

    if (variable == NULL &&
        getpwuid_r(geteuid(), &entry, buffer, sizeof(buffer), &found) == 0 &&
        found != NULL) {
        variable = entry.pw_dir;
    }
    if (variable == NULL || variable[0] != '/' ||
        strlen(variable) >= sizeof(home->text) - 64) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "the job's secret is in the home directory, and HOME "
                         "is not an absolute path; EPX_SECRET or "
                         "EPX_SECRET_FILE can give it");
    }
    (void)snprintf(home->text, sizeof(home->text), "%s", variable);
    return EPX_OK;
}

/* Appends to a path that has room for it. */
static void
append(path_t *path, const char *part)
{
    size_t length = strlen(path->text);

    (void)snprintf(path->text + length, sizeof(path->text) - length, "%s",
                   part);
}

static epx_status_t
make_directory(const char *path)
{
    if (mkdir(path, 0700) != 0 && errno != EEXIST) {
        return epx__fail(EPX_ERR_SYSTEM,
                         "the directory %s for the job's secret cannot be "
                         "made: %m; EPX_SECRET or EPX_SECRET_FILE can give the "
                         "secret",
                         path);
    }
    return EPX_OK;
}

static bool
write_random_line(int fd)
{
    unsigned char secret[EPX__SECRET_BYTES];
    char line[HEX_BYTES + 1];
    size_t written = 0;

    randombytes_buf(secret, sizeof(secret));
    (void)sodium_bin2hex(line, sizeof(line), secret, sizeof(secret));
    line[HEX_BYTES] = '\n';
    while (written < sizeof(line)) {
        ssize_t n = write(fd, line + written, sizeof(line) - written);

        if (n < 0 && errno != EINTR) {
            break;
        }
        written += n > 0 ? (size_t)n : 0;
    }
    sodium_memzero(secret, sizeof(secret));
    sodium_memzero(line, sizeof(line));
    return written == sizeof(line) && fsync(fd) == 0;
}

/* Ranks that start together all come here.  Each writes a file of its own, and
 * link() lets exactly one of them have the name, whole; the others find it
 * taken, which is as good. */
static epx_status_t
make_file(const char *path)
{
    path_t own;
    epx_status_t status = EPX_OK;
    int fd;

    (void)snprintf(own.text, sizeof(own.text), "%s", path);
    append(&own, ".XXXXXX");
    fd = mkostemp(own.text, O_CLOEXEC); /* mode 0600 */
    if (fd < 0) {
        return epx__fail(EPX_ERR_SYSTEM, "the secret file %s: %m", own.text);
    }
    if (!write_random_line(fd) ||
        (link(own.text, path) != 0 && errno != EEXIST)) {
        status = epx__fail(EPX_ERR_SYSTEM,
                           "the secret file %s cannot be made: %m", path);
    }
    (void)close(fd);
    (void)unlink(own.text);
    return status;
}

static epx_status_t
load_default(unsigned char secret[EPX__SECRET_BYTES])
{
    static const char *const directories[] = { "/.config", "/epx" };
    path_t path;
    bool found;
    epx_status_t status = find_home(&path);

    for (size_t i = 0; status == EPX_OK && i < 2; i++) {
        append(&path, directories[i]);
        status = make_directory(path.text);
    }
    if (status != EPX_OK) {
        return status;
    }
    append(&path, "/secret");
    status = read_file(path.text, secret, &found);
    if (status != EPX_OK || found) {
        return status;
    }
    status = make_file(path.text);
    if (status != EPX_OK) {
        return status;
    }
    status = read_file(path.text, secret, &found);
    if (status != EPX_OK || found) {
        return status;
    }
    return epx__fail(EPX_ERR_SYSTEM, "the secret file %s went away", path.text);
}

epx_status_t
epx__secret_load(unsigned char secret[EPX__SECRET_BYTES])
{
    const char *text = epx__env_string("EPX_SECRET");
    const char *path = epx__env_string("EPX_SECRET_FILE");
    epx_status_t status;
    bool found;

    if (text != NULL) {
        return parse_secret(text, strlen(text), secret)
                   ? EPX_OK
                   : epx__fail(EPX_ERR_ENVIRONMENT,
                               "EPX_SECRET has %zu characters; it must be %d "
                               "hexadecimal digits",
                               strlen(text), HEX_BYTES);
    }
    if (path == NULL) {
        return load_default(secret);
    }
    status = read_file(path, secret, &found);
    if (status != EPX_OK || found) {
        return status;
    }
    return epx__fail(EPX_ERR_ENVIRONMENT,
                     "EPX_SECRET_FILE is \"%.200s\", and there is no such file",
                     path);
}
