# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# Two hosts of their own, as far as the network can tell: network namespaces
# that a pair of interfaces joins.  To be sourced; $dir is the caller's folder,
# which its trap removes.

# Their names go to hosts, their addresses are 10.79.0.1 and .2.  A system that
# allows none ends the caller with 77.
make_hosts() {
    local i tries
    hosts=("epx$$a" "epx$$b")
    ip netns add "${hosts[0]}" 2>/dev/null && ip netns add "${hosts[1]}" &&
        ip -n "${hosts[0]}" link add eth7 type veth peer name eth7 \
            netns "${hosts[1]}" || {
        echo "SKIPPED: no right to make network namespaces" >&2
        exit 77
    }
    for i in 0 1; do
        ip -n "${hosts[i]}" link set lo up
        ip -n "${hosts[i]}" addr add "10.79.0.$((i + 1))/24" dev eth7
        ip -n "${hosts[i]}" link set eth7 up
    done
    for ((tries = 0; tries < 100; tries++)); do
        ip -n "${hosts[1]}" link show eth7 | grep -q 'state UP' && return
        sleep 0.1
    done
    echo "FAIL: eth7 does not come up" >&2
    exit 1
}

# For the caller's trap.
remove_hosts() {
    local host
    for host in "${hosts[@]-}"; do
        [ -z "$host" ] || ip netns del "$host" 2>/dev/null
    done
}
