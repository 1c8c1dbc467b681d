/* SPDX-License-Identifier: MIT */
#include "net/net_internal.h"

#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

static bool
is_eligible(const struct ifaddrs *entry, const char *wanted, int family)
{
    return entry->ifa_addr != NULL && entry->ifa_addr->sa_family == family &&
           (wanted != NULL ? strcmp(entry->ifa_name, wanted) == 0
                           : (entry->ifa_flags & IFF_UP) != 0 &&
                                 (entry->ifa_flags & IFF_LOOPBACK) == 0);
}

bool
epx__net_interface(const char *wanted, char *name, size_t name_bytes,
                   struct sockaddr_storage *address_p)
{
    static const int families[] = { AF_INET, AF_INET6 };
    struct ifaddrs *list = NULL;
    bool found = false;

    if (getifaddrs(&list) != 0) {
        return false;
    }
    for (int i = 0; i < 2 && !found; i++) {
        for (struct ifaddrs *e = list; e != NULL && !found; e = e->ifa_next) {
            if (is_eligible(e, wanted, families[i])) {
                memset(address_p, 0, sizeof(*address_p));
                memcpy(address_p, e->ifa_addr,
                       families[i] == AF_INET ? sizeof(struct sockaddr_in)
                                              : sizeof(struct sockaddr_in6));
                (void)snprintf(name, name_bytes, "%s", e->ifa_name);
                found = true;
            }
        }
    }
    freeifaddrs(list);
    return found;
}
