/* SPDX-License-Identifier: MIT */
/* epx-info: what EPX finds on this machine.  See epx-info(1). */
#include "epx_info_report.h"
#include "epx_info_system.h"

#include <dlfcn.h>
#include <epx/epx.h>
#include <getopt.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#define EXIT_USAGE 2

static const char usage[] =
    "usage: epx-info [--json]\n"
    "\n"
    "Prints the version, engines, fabrics and limits of EPX, and what it "
    "finds\n"
    "on this machine.\n"
    "\n"
    "      --json     print one JSON object; sizes in bytes\n"
    "  -h, --help     print this and exit\n"
    "  -V, --version  print the version and exit\n";

static size_t
count_strings(const char *const *strings)
{
    size_t count = 0;

    while (strings[count] != NULL) {
        count++;
    }
    return count;
}

static void
report_library(const epx_library_info_t *info)
{
    epx__report_section("library");
    epx__report_string("version", info->version, "unknown");
    epx__report_strings("engines", info->engines, count_strings(info->engines));
    epx__report_strings("fabrics", info->fabrics, count_strings(info->fabrics));
    epx__report_string("cpu_kernels", info->cpu_isa, "unknown");
}

static void
report_limits(void)
{
    epx__report_section("limits");
    epx__report_number("max_topk", EPX_MAX_TOPK);
    epx__report_number("max_ranks", EPX_MAX_RANKS);
    epx__report_bytes("row_alignment_bytes", EPX_ROW_ALIGN);
    epx__report_number("max_bias_rows", EPX_MAX_BIAS);
    epx__report_number("channels_per_scale", EPX_SCALE_BLOCK);
}

/* The defaults are asked of a group that was made with them, which shows at the
 * same time that one can be made here. */
static void
report_defaults(void)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    epx_bootstrap_t *bootstrap = NULL;
    epx_group_t *group = NULL;
    const char *error = NULL;

    epx__report_section("default_group");
    if (epx_bootstrap_threads_create(1, &bootstrap) == EPX_OK) {
        config.bootstrap = bootstrap;
    }
    if (bootstrap == NULL || epx_group_create(&config, &group) != EPX_OK ||
        epx_group_query(group, &info) != EPX_OK) {
        error = epx_last_error();
    }
    epx__report_string("error", error, "none");
    if (error == NULL) {
        epx__report_string("engine", info.engine, "unknown");
        epx__report_number("workers", (uint64_t)info.num_workers);
        epx__report_number("max_experts", (uint64_t)info.max_experts);
        epx__report_bytes("heap_bytes", info.heap_bytes);
    }
    (void)epx_group_destroy(group);
    epx_bootstrap_destroy(bootstrap);
}

/* The bits of a mask, as numbers. */
static void
report_devices(const char *key, uint64_t mask)
{
    char texts[64][4];
    const char *list[64];
    size_t count = 0;

    for (int i = 0; i < 64; i++) {
        if ((mask >> i & 1) != 0) {
            (void)snprintf(texts[count], sizeof(texts[count]), "%d", i);
            list[count] = texts[count];
            count++;
        }
    }
    epx__report_strings(key, list, count);
}

static void
report_card(int32_t ordinal)
{
    epx_device_info_t info = EPX_DEVICE_INFO_INIT;
    epx_status_t status = epx_device_query(EPX_DEVICE_CUDA, ordinal, &info);
    uint64_t own = UINT64_C(1) << ordinal;
    char text[24];

    (void)snprintf(text, sizeof(text), "card_%d", (int)ordinal);
    epx__report_section(text);
    epx__report_string("error", status == EPX_OK ? NULL : epx_last_error(),
                       "none");
    if (status != EPX_OK) {
        return;
    }
    (void)snprintf(text, sizeof(text), "%d.%d", (int)info.compute_major,
                   (int)info.compute_minor);
    epx__report_string("name", info.name, "unknown");
    epx__report_string("pci", info.pci, "unknown");
    epx__report_string("compute_capability", text, "unknown");
    epx__report_number("sms", (uint64_t)info.num_workers);
    epx__report_bytes("memory_bytes", info.memory_bytes);
    epx__report_strings("fabrics", info.fabrics, count_strings(info.fabrics));
    report_devices("reaches_cards", info.reachable_devices & ~own);
    report_devices("reaches_with_atomics", info.fast_devices & ~own);
}

/* A section with how many there are, or why there is none; then one for each.
 */
static void
report_cards(void)
{
    epx_device_info_t info = EPX_DEVICE_INFO_INIT;
    epx_status_t status = epx_device_query(EPX_DEVICE_CUDA, 0, &info);
    int32_t count = status == EPX_OK ? info.num_devices : 0;

    epx__report_section("cards");
    epx__report_string("error", status == EPX_OK ? NULL : epx_last_error(),
                       "none");
    epx__report_number("count", (uint64_t)count);
    for (int32_t i = 0; i < count; i++) {
        report_card(i);
    }
}

/* Those that tell which kernels could be used, in the kernel's spelling. */
static void
report_cpu_features(void)
{
    static const char *const known[] = {
        "sse2",        "sse4_2",   "avx",      "avx2",        "fma",
        "f16c",        "avx512f",  "avx512bw", "avx512dq",    "avx512vl",
        "avx512_bf16", "amx_bf16", "asimd",    "asimdhp",     "sve",
        "sve2",        "bf16",     "svebf16",  "avx512_fp16",
    };
    const char *seen[sizeof(known) / sizeof(*known)];
    char flags[8192] = "";
    char *rest = NULL;
    size_t count = 0;

    if (!epx__read_field("/proc/cpuinfo", "flags", flags, sizeof(flags))) {
        (void)epx__read_field("/proc/cpuinfo", "Features", flags,
                              sizeof(flags));
    }
    for (char *flag = strtok_r(flags, " ", &rest); flag != NULL;
         flag = strtok_r(NULL, " ", &rest)) {
        for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++) {
            if (strcmp(flag, known[i]) == 0) {
                seen[count++] = known[i];
                break;
            }
        }
    }
    epx__report_strings("features", seen, count);
}

static void
report_cache(const char *key, int level)
{
    uint64_t bytes = epx__cache_bytes(level);

    if (bytes > 0) {
        epx__report_bytes(key, bytes);
    } else {
        epx__report_string(key, NULL, "unknown");
    }
}

static void
report_cpu(const epx_library_info_t *info)
{
    struct utsname system;
    char model[128];
    bool found =
        epx__read_field("/proc/cpuinfo", "model name", model, sizeof(model));

    epx__report_section("cpu");
    epx__report_string("architecture",
                       uname(&system) == 0 ? system.machine : NULL, "unknown");
    epx__report_string("model", found ? model : NULL, "unknown");
    report_cpu_features();
    epx__report_number("cores_online", (uint64_t)sysconf(_SC_NPROCESSORS_ONLN));
    epx__report_number("cores_usable", (uint64_t)info->num_cores);
    report_cache("l1d_cache_bytes", 1);
    report_cache("l2_cache_bytes", 2);
    report_cache("l3_cache_bytes", 3);
}

static void
report_rlimit(const char *key, int resource, bool hard,
              void (*report)(const char *key, uint64_t value))
{
    struct rlimit limit;
    rlim_t value;

    if (getrlimit(resource, &limit) != 0) {
        epx__report_string(key, NULL, "unknown");
        return;
    }
    value = hard ? limit.rlim_max : limit.rlim_cur;
    report(key, value == RLIM_INFINITY ? EPX__UNLIMITED : value);
}

static void
report_choice(const char *key, const char *path)
{
    char word[32];
    bool found = epx__read_choice(path, word, sizeof(word));

    epx__report_string(key, found ? word : NULL, "not supported");
}

static void
report_memory_field(const char *key, const char *name)
{
    char value[64];

    if (epx__read_field("/proc/meminfo", name, value, sizeof(value))) {
        epx__report_bytes(key, epx__parse_size(value));
    } else {
        epx__report_string(key, NULL, "unknown");
    }
}

static void
report_memory(void)
{
    uint64_t sizes[16];
    size_t count = epx__huge_page_sizes(sizes, sizeof(sizes) / sizeof(*sizes));

    epx__report_section("memory");
    report_memory_field("total_bytes", "MemTotal");
    report_memory_field("available_bytes", "MemAvailable");
    epx__report_bytes("cgroup_limit_bytes", epx__cgroup_memory_bytes());
    report_rlimit("address_space_limit_bytes", RLIMIT_AS, false,
                  epx__report_bytes);
    report_rlimit("locked_limit_bytes", RLIMIT_MEMLOCK, false,
                  epx__report_bytes);
    report_rlimit("locked_hard_limit_bytes", RLIMIT_MEMLOCK, true,
                  epx__report_bytes);
    epx__report_bytes("page_bytes", (uint64_t)sysconf(_SC_PAGESIZE));
    epx__report_sizes("huge_pages_bytes", sizes, count);
    report_choice("transparent_huge_pages",
                  "/sys/kernel/mm/transparent_hugepage/enabled");
    report_choice("shared_huge_pages",
                  "/sys/kernel/mm/transparent_hugepage/shmem_enabled");
}

static void
report_files(void)
{
    epx__report_section("open_files");
    report_rlimit("limit", RLIMIT_NOFILE, false, epx__report_limit);
    report_rlimit("hard_limit", RLIMIT_NOFILE, true, epx__report_limit);
}

/* ------------------------------------------------------------------------- */
/* Optional pieces                                                           */
/* ------------------------------------------------------------------------- */

/* Each turns a symbol of its library into a version. */
typedef bool describe_fn(void *symbol, char *text, size_t size);

static bool
describe_mpi(void *symbol, char *text, size_t size)
{
    int (*get_version)(char *, int *);
    char version[8192]; /* no MPI needs more than this */
    int length = 0;

    memcpy(&get_version, &symbol, sizeof(symbol));
    if (get_version(version, &length) != 0) {
        return false;
    }
    (void)snprintf(text, size, "%.*s", (int)strcspn(version, ",\n"), version);
    return true;
}

static bool
describe_ucx(void *symbol, char *text, size_t size)
{
    const char *(*get_version)(void);

    memcpy(&get_version, &symbol, sizeof(symbol));
    (void)snprintf(text, size, "%s", get_version());
    return true;
}

static bool
describe_cuda(void *symbol, char *text, size_t size)
{
    int (*get_version)(int *);
    int version = 0;

    memcpy(&get_version, &symbol, sizeof(symbol));
    if (get_version(&version) != 0) {
        return false;
    }
    (void)snprintf(text, size, "%d.%d", version / 1000, version % 1000 / 10);
    return true;
}

static const struct {
    const char *key;
    const char *files[4]; /* the first that loads */
    const char *symbol;
    describe_fn *describe;
} pieces[] = {
    { "mpi",
      { "libmpi.so.40", "libmpi.so.12", "libmpi.so" },
      "MPI_Get_library_version",
      describe_mpi },
    { "ucx", { "libucp.so.0" }, "ucp_get_version_string", describe_ucx },
    { "cuda_driver", { "libcuda.so.1" }, "cuDriverGetVersion", describe_cuda },
};

static void
report_pieces(void)
{
    epx__report_section("optional");
    for (size_t i = 0; i < sizeof(pieces) / sizeof(*pieces); i++) {
        char text[256] = "present, version unknown";
        void *library = NULL;

        for (int j = 0; library == NULL && pieces[i].files[j] != NULL; j++) {
            library = dlopen(pieces[i].files[j], RTLD_LAZY | RTLD_LOCAL);
        }
        if (library != NULL) {
            void *symbol = dlsym(library, pieces[i].symbol);

            if (symbol != NULL) {
                (void)pieces[i].describe(symbol, text, sizeof(text));
            }
        }
        /* Left open: not all of these can be unloaded. */
        epx__report_string(pieces[i].key, library == NULL ? NULL : text,
                           "not found");
    }
}

/* ------------------------------------------------------------------------- */
/* Environment                                                               */
/* ------------------------------------------------------------------------- */

static int
compare_strings(const void *a, const void *b)
{
    const char *const *left = a;
    const char *const *right = b;

    return strcmp(*left, *right);
}

static void
report_variable(const char *assignment)
{
    char name[128];
    const char *value = strchr(assignment, '=') + 1;

    (void)snprintf(name, sizeof(name), "%.*s", (int)(value - 1 - assignment),
                   assignment);
    /* The name of a file tells nothing. */
    if (strstr(name, "SECRET") != NULL &&
        strcmp(name, "EPX_SECRET_FILE") != 0) {
        value = "(set, not shown)";
    }
    epx__report_string(name, value, "");
}

static void
report_environment(void)
{
    static const char prefix[] = "EPX_";
    const char *found[256];
    size_t count = 0;

    for (char **entry = environ; *entry != NULL; entry++) {
        if (strncmp(*entry, prefix, sizeof(prefix) - 1) == 0 &&
            strchr(*entry, '=') != NULL &&
            count < sizeof(found) / sizeof(*found)) {
            found[count++] = *entry;
        }
    }
    qsort(found, count, sizeof(*found), compare_strings);
    epx__report_section("environment");
    for (size_t i = 0; i < count; i++) {
        report_variable(found[i]);
    }
}

static int
print_info(bool json)
{
    epx_library_info_t info = EPX_LIBRARY_INFO_INIT;

    if (epx_library_query(&info) != EPX_OK) {
        (void)fprintf(stderr, "epx-info: %s\n", epx_last_error());
        return EXIT_FAILURE;
    }
    epx__report_begin(json);
    report_library(&info);
    report_limits();
    report_defaults();
    report_cpu(&info);
    report_cards();
    report_memory();
    report_files();
    report_pieces();
    report_environment();
    if (!epx__report_end()) {
        perror("epx-info: cannot write");
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}

/* Prints a text and leaves. */
static int
finish(bool printed)
{
    return printed && fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

int
main(int argc, char **argv)
{
    static const struct option long_options[] = {
        { "json", no_argument, NULL, 'j' },
        { "help", no_argument, NULL, 'h' },
        { "version", no_argument, NULL, 'V' },
        { NULL, 0, NULL, 0 },
    };
    bool json = false;
    int option;

    while ((option = getopt_long(argc, argv, "hV", long_options, NULL)) != -1) {
        switch (option) {
        case 'j':
            json = true;
            break;
        case 'h':
            return finish(fputs(usage, stdout) >= 0);
        case 'V':
            return finish(printf("epx-info %d.%d.%d\n", EPX_VERSION_MAJOR,
                                 EPX_VERSION_MINOR, EPX_VERSION_PATCH) > 0);
        default:
            (void)fprintf(stderr, "Try 'epx-info --help'.\n");
            return EXIT_USAGE;
        }
    }
    if (optind < argc) {
        (void)fprintf(stderr,
                      "epx-info: \"%s\" is one argument too many\n"
                      "Try 'epx-info --help'.\n",
                      argv[optind]);
        return EXIT_USAGE;
    }
    /* Only to tell characters of more than one byte; numbers stay as in C. */
    (void)setlocale(LC_CTYPE, "C.UTF-8");
    return print_info(json);
}
