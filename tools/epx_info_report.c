/* SPDX-License-Identifier: MIT */
#include "epx_info_report.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <wchar.h>

#define TEXT_KEY_WIDTH 26

static bool as_json;
static bool in_section;
static bool after_value; /* a comma is due */

void
epx__report_begin(bool json)
{
    as_json = json;
    in_section = false;
    after_value = false;
    if (as_json) {
        (void)printf("{\n");
    }
}

static void
end_section(void)
{
    if (as_json && in_section) {
        (void)printf("\n  }");
    }
}

bool
epx__report_end(void)
{
    end_section();
    if (as_json) {
        (void)printf("\n}\n");
    }
    return fflush(stdout) == 0 && ferror(stdout) == 0;
}

/* Variables of the environment keep their names. */
static void
put_words(const char *name, size_t length)
{
    bool is_variable = isupper((unsigned char)name[0]) != 0;

    for (size_t i = 0; i < length; i++) {
        (void)putchar(name[i] == '_' && !is_variable ? ' ' : name[i]);
    }
}

void
epx__report_section(const char *name)
{
    end_section();
    if (as_json) {
        (void)printf("%s  \"%s\": {\n", in_section ? ",\n" : "", name);
    } else {
        (void)printf("%s", in_section ? "\n" : "");
        put_words(name, strlen(name));
        (void)putchar('\n');
    }
    in_section = true;
    after_value = false;
}

/* Values come from the system and the environment: what is not a character of
 * UTF-8, and in text what could steer a terminal, is replaced. */
static void
put_character(const char *bytes, size_t length)
{
    unsigned char byte = (unsigned char)bytes[0];

    if (length > 1) {
        (void)fwrite(bytes, 1, length, stdout);
    } else if (length == 0) {
        (void)fputs(as_json ? "\\ufffd" : "?", stdout);
    } else if (iscntrl(byte)) {
        if (as_json) {
            (void)printf("\\u%04x", byte);
        } else {
            (void)putchar('?');
        }
    } else {
        if (as_json && (byte == '"' || byte == '\\')) {
            (void)putchar('\\');
        }
        (void)putchar(byte);
    }
}

static void
put_string(const char *text)
{
    size_t left = strlen(text);
    mbstate_t state;

    memset(&state, 0, sizeof(state));
    if (as_json) {
        (void)putchar('"');
    }
    while (left > 0) {
        size_t length = mbrlen(text, left, &state);

        if (length == (size_t)-1 || length == (size_t)-2) {
            memset(&state, 0, sizeof(state));
            put_character(text, 0);
            length = 1;
        } else {
            put_character(text, length);
        }
        text += length;
        left -= length;
    }
    if (as_json) {
        (void)putchar('"');
    }
}

static void
put_key(const char *key)
{
    static const char unit[] = "_bytes";
    size_t length = strlen(key);
    size_t unit_length = sizeof(unit) - 1;

    if (as_json) {
        (void)printf("%s    ", after_value ? ",\n" : "");
        put_string(key);
        (void)printf(": ");
        after_value = true;
        return;
    }
    if (length > unit_length && strcmp(key + length - unit_length, unit) == 0) {
        length -= unit_length;
    }
    (void)printf("  ");
    put_words(key, length);
    (void)printf("%*s",
                 length < TEXT_KEY_WIDTH ? (int)(TEXT_KEY_WIDTH - length) : 1,
                 "");
}

static void
end_value(void)
{
    if (!as_json) {
        (void)putchar('\n');
    }
}

static void
put_size(uint64_t value)
{
    static const char *const units[] = { "B", "KiB", "MiB", "GiB", "TiB" };
    size_t unit = 0;
    double scaled = (double)value;

    if (as_json) {
        (void)printf("%" PRIu64, value);
        return;
    }
    while (scaled >= 1024.0 && unit + 1 < sizeof(units) / sizeof(*units)) {
        scaled /= 1024.0;
        unit++;
    }
    (void)printf("%.*f %s", scaled == (double)(uint64_t)scaled ? 0 : 1, scaled,
                 units[unit]);
}

void
epx__report_string(const char *key, const char *value, const char *absent)
{
    put_key(key);
    if (value != NULL) {
        put_string(value);
    } else {
        (void)printf("%s", as_json ? "null" : absent);
    }
    end_value();
}

void
epx__report_number(const char *key, uint64_t value)
{
    put_key(key);
    (void)printf("%" PRIu64, value);
    end_value();
}

void
epx__report_limit(const char *key, uint64_t value)
{
    if (value == EPX__UNLIMITED) {
        epx__report_string(key, NULL, "unlimited");
    } else {
        epx__report_number(key, value);
    }
}

void
epx__report_bytes(const char *key, uint64_t value)
{
    if (value == EPX__UNLIMITED) {
        epx__report_string(key, NULL, "unlimited");
        return;
    }
    put_key(key);
    put_size(value);
    end_value();
}

void
epx__report_strings(const char *key, const char *const *values, size_t count)
{
    put_key(key);
    (void)printf("%s", as_json ? "[" : count == 0 ? "none" : "");
    for (size_t i = 0; i < count; i++) {
        (void)printf("%s", i == 0 ? "" : as_json ? ", " : " ");
        put_string(values[i]);
    }
    (void)printf("%s", as_json ? "]" : "");
    end_value();
}

void
epx__report_sizes(const char *key, const uint64_t *values, size_t count)
{
    put_key(key);
    (void)printf("%s", as_json ? "[" : count == 0 ? "none" : "");
    for (size_t i = 0; i < count; i++) {
        (void)printf("%s", i == 0 ? "" : ", ");
        put_size(values[i]);
    }
    (void)printf("%s", as_json ? "]" : "");
    end_value();
}
