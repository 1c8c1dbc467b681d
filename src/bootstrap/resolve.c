/* SPDX-License-Identifier: MIT */
#include "bootstrap/net.h"
#include "core/clock.h"
#include "core/thread.h"

#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Shared by the thread that looks up and the one that waits: the last to let go
 * frees it, since neither can wait for the other. */
typedef struct lookup {
    pthread_mutex_t mutex;
    pthread_cond_t finished_cond;
    int num_refs;
    bool finished;
    int error; /* of getaddrinfo */
    struct addrinfo *results;
    char host[EPX__MAX_HOST_BYTES];
    char service[8];
} lookup_t;

static int
look_up(const char *host, const char *service, int flags,
        struct addrinfo **results_p)
{
    struct addrinfo hints = { 0 };

    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = flags | AI_NUMERICSERV;
    *results_p = NULL;
    return getaddrinfo(host, service, &hints, results_p);
}

static void
lookup_release(lookup_t *lookup)
{
    bool last;

    (void)pthread_mutex_lock(&lookup->mutex);
    last = --lookup->num_refs == 0;
    (void)pthread_mutex_unlock(&lookup->mutex);
    if (last) {
        if (lookup->results != NULL) {
            freeaddrinfo(lookup->results);
        }
        (void)pthread_cond_destroy(&lookup->finished_cond);
        (void)pthread_mutex_destroy(&lookup->mutex);
        free(lookup);
    }
}

static void *
lookup_main(void *arg)
{
    lookup_t *lookup = arg;
    struct addrinfo *results;
    int error = look_up(lookup->host, lookup->service, 0, &results);

    (void)pthread_mutex_lock(&lookup->mutex);
    lookup->error = error;
    lookup->results = results;
    lookup->finished = true;
    (void)pthread_cond_signal(&lookup->finished_cond);
    (void)pthread_mutex_unlock(&lookup->mutex);
    lookup_release(lookup);
    return NULL;
}

static lookup_t *
lookup_new(const char *host, const char *service)
{
    lookup_t *lookup = calloc(1, sizeof(*lookup));
    pthread_condattr_t attributes;

    if (lookup == NULL) {
        return NULL;
    }
    (void)pthread_mutex_init(&lookup->mutex, NULL);
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&lookup->finished_cond, &attributes);
    (void)pthread_condattr_destroy(&attributes);
    lookup->num_refs = 2;
    (void)snprintf(lookup->host, sizeof(lookup->host), "%s", host);
    (void)snprintf(lookup->service, sizeof(lookup->service), "%s", service);
    return lookup;
}

/* Takes the results, or returns an error of getaddrinfo; EAI_AGAIN also when
 * the deadline came first. */
static int
look_up_name(const char *host, const char *service, int64_t deadline_ns,
             struct addrinfo **results_p)
{
    struct timespec until = { 0 };
    lookup_t *lookup = lookup_new(host, service);
    pthread_t thread;
    int error = 0;

    if (lookup == NULL) {
        return EAI_MEMORY;
    }
    if (epx__thread_start(&thread, lookup_main, lookup,
                          "the thread that looks up a host") != EPX_OK) {
        lookup->num_refs = 1;
        lookup_release(lookup);
        return EAI_MEMORY;
    }
    (void)pthread_detach(thread);
    if (deadline_ns > 0) {
        until.tv_sec = deadline_ns / EPX__NS_PER_SEC;
        until.tv_nsec = deadline_ns % EPX__NS_PER_SEC;
    }
    (void)pthread_mutex_lock(&lookup->mutex);
    while (!lookup->finished && error == 0) {
        error = pthread_cond_timedwait(&lookup->finished_cond, &lookup->mutex,
                                       &until);
    }
    error = lookup->finished ? lookup->error : EAI_AGAIN;
    *results_p = lookup->results;
    lookup->results = NULL;
    (void)pthread_mutex_unlock(&lookup->mutex);
    lookup_release(lookup);
    return error;
}

size_t
epx__resolve(const char *host, uint16_t port, int64_t deadline_ns,
             epx__address_t addresses[EPX__MAX_ADDRESSES], epx__reason_t *why)
{
    struct addrinfo *results = NULL;
    char service[8];
    size_t count = 0;
    int error;

    (void)snprintf(service, sizeof(service), "%u", port);
    /* An address needs no resolver, and no thread. */
    error = look_up(host, service, AI_NUMERICHOST, &results);
    if (error == EAI_NONAME) {
        error = look_up_name(host, service, deadline_ns, &results);
    }
    if (error != 0) {
        epx__reason_set(why, "the host name %s cannot be resolved: %s", host,
                        gai_strerror(error));
        return 0;
    }
    for (struct addrinfo *at = results;
         at != NULL && count < EPX__MAX_ADDRESSES; at = at->ai_next) {
        if (at->ai_family == AF_INET || at->ai_family == AF_INET6) {
            memcpy(&addresses[count].storage, at->ai_addr, at->ai_addrlen);
            addresses[count].bytes = at->ai_addrlen;
            count++;
        }
    }
    freeaddrinfo(results);
    if (count == 0) {
        epx__reason_set(why, "the host name %s has no IP address", host);
    }
    return count;
}
