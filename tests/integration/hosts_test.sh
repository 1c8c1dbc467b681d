#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# How ranks of two hosts are started:  hosts_test.sh EPX_RUN MEET CASE
# The hosts are network namespaces; MEET is hosts_meet.
#
# The ranks' own shells expand what is in single quotes:
# shellcheck disable=SC2016
set -u
run=$1
meet=$2
case=$3
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=/dev/null
. "$here/hosts.sh"
dir=$(mktemp -d)
trap 'kill -KILL $(marked) 2>/dev/null; remove_hosts; rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
export EPX_TEST_MARK=$$.$RANDOM
unset EPX_NET_DEVICE

fail() {
    echo "FAIL: $*" >&2
    sed 's/^/  stdout: /' "$dir/out" 2>/dev/null | cut -c1-300 | head -20 >&2
    sed 's/^/  stderr: /' "$dir/err" 2>/dev/null | cut -c1-300 | head -20 >&2
    exit 1
}

expect() { # WHAT ACTUAL WANTED
    [ "$2" = "$3" ] || fail "$1 is \"$2\", not \"$3\""
}

expect_match() { # FILE PATTERN
    grep -Eq -- "$2" "$dir/$1" || fail "no line of $1 matches \"$2\""
}

# What this test has started and left, if it failed.
marked() {
    grep -lszF -- "EPX_TEST_MARK=$EPX_TEST_MARK" /proc/[0-9]*/environ |
        cut -d/ -f3
}

wait_until() { # COMMAND...
    local tries
    for ((tries = 0; tries < 400; tries++)); do
        "$@" && return
        sleep 0.05
    done
    fail "did not come true in 20 s: $*"
}

files_exist() { # NAME...
    local name
    for name; do
        [ -e "$dir/$name" ] || return 1
    done
}

ranks_are_gone() {
    ! kill -0 "$(cat "$dir/pid.r0")" "$(cat "$dir/pid.r1")" 2>/dev/null
}

# A job of two ranks on each host; its output is in $dir/out and $dir/err.
job() { # STATUS ARGUMENT...
    local wanted=$1 status=0
    shift
    "$run" --hosts "${hosts[0]}:2,${hosts[1]}:2" --address 10.79.0.1 \
        --agent "${agent:-ip netns exec}" "$@" >"$dir/out" 2>"$dir/err" ||
        status=$?
    expect "the exit status of $*" $status "$wanted"
}

expect_all_met() { # PREFIX: true where each line has its rank in front
    local rank
    for rank in 0 1 2 3; do
        expect_match out \
            "^${1:+\\[$rank\\] }rank $rank of 4 on node $((rank / 2)) of 2$"
    done
}

case_run() {
    job 0 "$meet" 20
    expect_all_met prefix
    job 0 --no-prefix "$meet" 20
    expect_all_met ''
    # Arguments and variables come as they are, whatever is in them.
    EPX_ODD='a "b"
$c' PASSED=on job 0 --env PASSED sh -c \
        'printf "%s|%s|%s|%s\n" "$1" "$PASSED" "$PWD" "$(echo "$EPX_ODD" | wc -l)"
         [ -z "${EPX_SECRET##????????????????????????????????*}" ]' \
        sh "it's; \$(x)"
    expect "the lines" \
        "$(grep -cF "it's; \$(x)|on|$PWD|2" "$dir/out")" 4
    # Nobody sees the secret in a list of processes.
    job 0 sh -c 'tr "\0" " " <"/proc/$PPID/cmdline"'
    expect "the words with a secret" "$(grep -cE '[0-9a-f]{64}' "$dir/out")" 0
}

case_failure() {
    job 3 --grace 0.5 sh -c '[ "$RANK" != 2 ] || exit 3; sleep 60'
    expect_match err '^epx-run: rank 2 exited with status 3; still running: 1'
    expect_match err "^epx-run: host ${hosts[1]} exited with status 3; still"
    agent="$dir/no_such_agent" job 127 "$meet" 20
    expect_match err 'cannot run .*no_such_agent: No such file'
    job 127 "$dir/no_such_program"
    expect_match err 'cannot run .*no_such_program: No such file'
    status=0
    "$run" --hosts "no_such_host:2" --agent 'ip netns exec' true \
        2>"$dir/err" || status=$?
    [ $status != 0 ] || fail "a host that there is not is no failure"
    expect_match err '^epx-run: host no_such_host exited with status'
}

# Whatever is between the launcher and the member, it hears of the end.
case_launcher_killed() {
    printf '%s\n' '#!/bin/sh' 'exec 3<&0' 'ip netns exec "$@" <&3 &' \
        'wait $!' >"$dir/agent"
    chmod +x "$dir/agent"
    "$run" --hosts "${hosts[0]}:1,${hosts[1]}:1" --address 10.79.0.1 \
        --agent "$dir/agent" sh -c "echo \$\$ >$dir/pid.\$RANK
            mv $dir/pid.\$RANK $dir/pid.r\$RANK; exec sleep 60" \
        >"$dir/out" 2>"$dir/err" &
    launcher=$!
    wait_until files_exist pid.r0 pid.r1
    kill -KILL $launcher
    wait $launcher 2>/dev/null
    wait_until ranks_are_gone
}

# Open MPI's launcher reaches the other host by an agent; EPX finds the ranks
# by its variables.
case_mpirun() {
    command -v mpirun >/dev/null || {
        echo "SKIPPED: there is no mpirun" >&2
        exit 77
    }
    # A host has a name of its own, which MPI knows it by.
    printf '%s\n' '#!/bin/sh' 'host=$1; shift' \
        'exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"' \
        >"$dir/agent"
    chmod +x "$dir/agent"
    (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' \
        >"$dir/secret")
    PMIX_MCA_gds=hash EPX_SECRET_FILE="$dir/secret" \
        MASTER_ADDR=10.79.0.1 MASTER_PORT=21311 timeout 100 \
        "$dir/agent" "${hosts[0]}" mpirun --allow-run-as-root \
        --oversubscribe --mca plm_rsh_agent "$dir/agent" \
        --mca oob_tcp_if_include eth7 --host "${hosts[0]}:2,${hosts[1]}:2" \
        -n 4 -x EPX_SECRET_FILE -x MASTER_ADDR -x MASTER_PORT "$meet" 20 \
        >"$dir/out" 2>"$dir/err" || fail "mpirun"
    expect_all_met ''
}

# One rank by hand, as torchrun would start it on host $1.
start_rank() { # HOST RANK SECONDS
    RANK=$2 LOCAL_RANK=$(($2 % 2)) WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 \
        MASTER_ADDR=10.79.0.1 MASTER_PORT=21321 TORCHELASTIC_RUN_ID=$$ \
        EPX_SECRET=$secret ip netns exec "${hosts[$1]}" "$meet" "$3" \
        >"$dir/out.$2" 2>"$dir/err.$2" &
}

case_torchrun() {
    local rank
    secret=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
    for rank in 0 1 2 3; do
        start_rank $((rank / 2)) $rank 20
    done
    wait
    cat "$dir"/out.? >"$dir/out"
    cat "$dir"/err.? >"$dir/err"
    expect_all_met ''
}

# Everybody that did come is told who did not.
case_missing() {
    local rank
    secret=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
    for rank in 0 1 3; do
        start_rank $((rank / 2)) $rank 3
    done
    wait
    for rank in 0 1 3; do
        cp "$dir/err.$rank" "$dir/err"
        expect_match err 'rank 2'
        if grep -Eq 'ranks' "$dir/err"; then
            fail "ranks that came are missed"
        fi
    done
}

"$run" --version >/dev/null || fail "epx-run"
hosts=()
make_hosts
"case_$case"
