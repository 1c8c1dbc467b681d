#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Tests of epx-bench:  bench_test.sh EPX_BENCH CASE ROUTING_DIRECTORY FLIP
# FLIP is the library that the cases "difference" and "leaks" preload.
# Figures are never judged here, only that they are there and well formed.
set -u
# shellcheck source=/dev/null
. "$(dirname "$0")/hosts.sh"
bench=$1
case=$2
routing=$3
flip=${4-}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
small=(--tokens 24 --hidden 256 --experts 12 --topk 3 --iters 2)

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

# The output is in $dir/out and $dir/err.
run() { # STATUS OPTION...
    local wanted=$1 status=0
    shift
    "$bench" "$@" >"$dir/out" 2>"$dir/err" || status=$?
    expect "the exit status of $*" $status "$wanted"
}

quietly() { # OPTION...
    run 0 "$@"
    expect "what $* says" "$(cat "$dir/err")" ""
}

wait_until() { # COMMAND...
    local tries
    for ((tries = 0; tries < 600; tries++)); do
        "$@" && return
        sleep 0.05
    done
    fail "did not come true in 30 s: $*"
}

has_children() { # PID COUNT
    [ "$(pgrep -c -P "$1")" = "$2" ]
}

all_gone() { # PID...
    ! kill -0 "$@" 2>/dev/null
}

# Starts four ranks that are busy for long; $bench_pid is their parent.
start_long() {
    "$bench" --ranks 4 --procs "${small[@]}" --iters 1000000 \
        >"$dir/out" 2>"$dir/err" &
    bench_pid=$!
    wait_until has_children "$bench_pid" 4
    mapfile -t ranks < <(pgrep -P "$bench_pid")
    sleep 0.3
}

case_usage() {
    quietly --help
    expect_match out '^usage: epx-bench'
    quietly --version
    expect_match out '^epx-bench [0-9]+\.[0-9]+\.[0-9]+$'
    run 2 --graph
    expect "the complaint" "$(cat "$dir/err")" \
        "epx-bench: --graph needs --device cuda"
    run 2 --device cuda --vs nccl
    expect "the complaint" "$(cat "$dir/err")" \
        "epx-bench: --vs nccl needs a card for each rank: 2 ranks on 1 card"
    run 2 --ranks 0
    expect "the complaint" "$(cat "$dir/err")" \
        "epx-bench: --ranks is '0'; allowed: 1 to 1024"
    run 2 --routing "$dir/none.csv"
    expect_match err 'none.csv: No such file'
    printf 'expert0,weight0\n4,1\n' >"$dir/r.csv"
    run 2 --routing "$dir/r.csv" --experts 4
    expect_match err "line 2: the expert is '4'; allowed: -1 to 3"
    run 2 --routing "$dir/r.csv" --experts 5 --topk 2
    expect_match err '--topk is 2'
}

number='[0-9]+\.[0-9]+'
shape='"mode": "(ht|ll)", "ranks": [0-9]+, "tokens": [0-9]+, "hidden": [0-9]+'
shape+=', "topk": [0-9]+, "experts": [0-9]+, "dtype": "[a-z0-9]+"'
shape+=', "workers": [0-9]+, "iters": [0-9]+'
times="\"min_us\": $number, \"p50_us\": $number, \"p99_us\": $number"
tail=', "layout": "[a-z]+", "quantize": null, "routing": "uniform"'
tail+=', "launch": "(call|graph)", "in_a_row": [0-9]+, "hosts": [0-9]+'
tail+=', "sms": null, "sm_us": null, "net_bytes": (null|[0-9]+)'
tail+=', "wire_bytes": (null|[0-9]+), "peer_way": (null|"[a-z]+")'
tail+=', "combine_quantize": null, "overlap_us": [0-9]+}$'

expect_json() { # OP FABRIC PEER, where the operation moves rows
    expect_match out "^\{\"op\": \"$1\", \"engine\": \"cpu\", \"fabric\": \
\"$2\", $shape, $times, \"bytes_moved\": [0-9]+, \"gbps\": $number, \
\"ceiling_gbps\": $number, \"ratio_ceiling\": $number, $3$tail"
}

no_peer='"peer": null, "peer_p50_us": null, "ratio_peer": null'

case_json() {
    local op
    quietly --json --threads "${small[@]}"
    expect "the number of lines" "$(wc -l <"$dir/out")" 3
    for op in dispatch combine; do
        expect_json $op thread "$no_peer"
    done
    expect_match out "\"op\": \"plan\".*\"bytes_moved\": null, \"gbps\": null, \
\"ceiling_gbps\": null, \"ratio_ceiling\": null, $no_peer"
    quietly --json --procs --vs memcpy --ranks 3 "${small[@]}"
    for op in dispatch combine; do
        expect_json $op shm "\"peer\": \"memcpy\", \"peer_p50_us\": $number, \
\"ratio_peer\": $number"
    done
}

case_table() {
    quietly --vs memcpy --ranks 2 --workers 2 "${small[@]}"
    expect_match out '^cpu engine, thread fabric: 2 ranks x 2 workers, ht'
    expect_match out '^combine( +[0-9.]+){6}  memcpy( +[0-9.]+){2}$'
}

case_layouts() {
    local layout mode launch
    for layout in rank expert slots; do
        for mode in ht ll; do
            for launch in threads procs; do
                quietly --check --json --ranks 5 --$launch --mode $mode \
                    --layout $layout "${small[@]}"
            done
        done
    done
}

case_dtypes() {
    local dtype quantize
    for dtype in bf16 fp8 f32 f16; do
        quietly --check --dtype $dtype --ranks 3 --procs "${small[@]}"
        quietly --check --dtype $dtype --mode ll --workers 2 "${small[@]}"
    done
    for quantize in f32 pow2 ue8m0; do
        quietly --check --quantize=$quantize --layout expert "${small[@]}"
        quietly --check --quantize=$quantize --mode ll "${small[@]}"
    done
    quietly --check --logfmt --ranks 3 --layout expert "${small[@]}"
    quietly --check --json --logfmt --dtype fp8 --mode ll "${small[@]}"
    expect_match out '"combine_quantize": "logfmt10", '
}

case_routings() {
    local kind
    printf 'expert0,expert1,expert2,weight0,weight1,weight2\n%s\n%s\n%s\n' \
        0,5,11,.5,.25,.25 -1,-1,-1,0,0,0 11,-1,3,1,0,-.5 >"$dir/r.csv"
    for kind in zipf:1.2 group:4,1 "$dir/r.csv"; do
        quietly --check --ranks 4 --routing "$kind" "${small[@]}"
        quietly --check --ranks 4 --mode ll --routing "$kind" "${small[@]}"
    done
    # Fewer tokens than ranks.
    quietly --check --ranks 5 --routing "$dir/r.csv" --hidden 64 --iters 2
    expect_match out '^each 1 tokens x 64 bf16, top-3 of 256 experts'
}

case_recorded() {
    local file found=
    for file in "$routing"/*.csv; do
        [ -e "$file" ] || continue
        found=1
        quietly --check --routing "$file" --experts 60 --topk 4 --hidden 256 \
            --ranks 8 --iters 1
    done
    if [ -z "$found" ]; then
        echo "SKIPPED: there is no recorded routing in $routing" >&2
        exit 77
    fi
}

case_send_only() {
    local layout op
    for layout in rank expert slots; do
        quietly --check --send-only --json --mode ll --layout $layout \
            --ranks 3 --procs "${small[@]}"
        for op in dispatch-send dispatch-hook combine-hook; do
            expect_json $op shm "$no_peer"
        done
        expect_match out '"op": "combine-send".*"bytes_moved": null'
    done
}

case_hosts() {
    local layout launch
    # Without UCX there are no other hosts.
    if ! "$bench" --hosts 2 "${small[@]}" >"$dir/out" 2>"$dir/err"; then
        grep -q 'reached with UCX' "$dir/err" || {
            cat "$dir/err" >&2
            exit 1
        }
        echo "SKIPPED: there is no UCX" >&2
        exit 77
    fi
    for launch in threads procs; do
        for layout in rank expert slots; do
            quietly --check --hosts 3 --$launch --ranks 4 --layout $layout \
                "${small[@]}"
        done
        quietly --check --json --hosts 2 --$launch --ranks 4 --mode ll \
            "${small[@]}"
        expect_match out '"op": "dispatch".*"hosts": 2, .*"net_bytes": [1-9]'
    done
    run 2 --hosts 3 --ranks 2 "${small[@]}"
    expect_match err '--hosts is 3; allowed: 1 to the 2 ranks'
    run 2 --hosts 2 --ranks 4 --vs mpi "${small[@]}"
    expect_match err '--vs mpi with --hosts needs --netns'
    run 2 --hosts 2 --netns a,b "${small[@]}"
    expect_match err '--netns needs --procs'
    run 1 --hosts 2 --procs --netns no_such_a,no_such_b "${small[@]}"
    expect_match err "cannot enter the network namespace 'no_such_[ab]': No such"
}

field() { # OP NAME, of the first line with that OP
    sed -n "s/^{\"op\": \"$1\".*\"$2\": \([0-9.]*\).*/\1/p" "$dir/out" |
        head -1
}

# What the interfaces count is what the routing asks for, and the frames.
check_wire() { # OP
    local rows wire
    rows=$(field "$1" net_bytes)
    wire=$(field "$1" wire_bytes)
    if [ "$wire" -lt "$rows" ] || [ $((wire * 100)) -gt $((rows * 106)) ]; then
        fail "$1: $rows bytes of rows, $wire bytes on the wire"
    fi
}

case_netns() {
    local op uniform grouped
    "$bench" --hosts 2 "${small[@]}" >"$dir/out" 2>"$dir/err" || {
        echo "SKIPPED: there is no UCX" >&2
        exit 77
    }
    trap 'remove_hosts; rm -rf "$dir"' EXIT
    make_hosts
    local shape=(--hosts 2 --ranks 4 --procs --netns "${hosts[0]},${hosts[1]}"
        --tokens 256 --hidden 4096 --experts 64 --iters 2 --json)
    quietly "${shape[@]}" --check --vs ucx
    for op in dispatch combine; do
        expect_match out "\"op\": \"$op\".*\"peer\": \"ucx\", \
\"peer_p50_us\": $number, \"ratio_peer\": $number"
        check_wire $op
    done
    uniform=$(field dispatch wire_bytes)
    quietly "${shape[@]}" --routing group:8,1 --topk 4
    check_wire dispatch
    check_wire combine
    grouped=$(field dispatch wire_bytes)
    # Half of the tokens have experts on the other host, instead of all.
    [ $((grouped * 10)) -le $((uniform * 6)) ] ||
        fail "$grouped bytes on the wire in place of $uniform"
    run 0 "${shape[@]}" --vs mpi
    grep -q 'no figures' "$dir/err" && exit 0 # case mpi tells why
    expect_match out '"op": "combine".*"peer": "mpi", "peer_p50_us": [0-9]'
}

case_outside() {
    quietly --check --buffers outside --ranks 3 "${small[@]}"
    quietly --check --buffers outside --mode ll --procs --no-bind "${small[@]}"
}

# The library refuses such rows; one rank tells, and all end.
case_failure() {
    local launch
    for launch in threads procs; do
        run 1 --$launch --ranks 3 "${small[@]}" --hidden 7
        expect "the number of complaints" "$(wc -l <"$dir/err")" 1
        expect_match err '^epx-bench: rank [0-2]: .*(7|14)'
        expect "the output" "$(cat "$dir/out")" ""
    done
}

# --check finds a single bit, and says where.
case_difference() {
    local call
    export LD_PRELOAD=$flip
    quietly --check "${small[@]}"
    for call in counts dispatch weights combine; do
        export EPX_TEST_FLIP=$call
        run 1 --check "${small[@]}"
        expect "the number of complaints" "$(wc -l <"$dir/err")" 1
        expect_match err '^epx-bench: rank [01]: checked iteration 0: '
        case $call in
        counts) expect_match err "the plan's num_recv_tokens is [0-9]+; it " ;;
        combine) expect_match err 'combine differs: .' ;;
        *) expect_match err 'dispatch differs: .' ;;
        esac
        run 0 "${small[@]}"
    done
}

shapes=(--hidden 256 --experts 12 --topk 3)

case_soak() {
    local launch
    for launch in threads procs; do
        quietly --soak 1 --$launch --ranks 3 "${shapes[@]}"
        expect_match out '^memory of .*: [0-9.]+ MiB in the first half, '
    done
    quietly --soak 1 --json "${shapes[@]}"
    expect_match out '^{"op": "soak", "engine": "cpu", "fabric": "thread", '\
'"ranks": 2, "workers": [0-9]+, "seconds": [0-9.]+, "groups": [0-9]+, '\
'"turns": [0-9]+, "first_bytes": [0-9]+, "last_bytes": [0-9]+}$'
    run 2 --soak 1 --tokens 1,2
    run 2 --soak 1 --vs memcpy
    expect_match err '--soak cannot go with'
}

# What a soak must find.
case_leaks() {
    export LD_PRELOAD=$flip
    EPX_TEST_FLIP=memory run 1 --soak 2 "${shapes[@]}"
    expect_match err "rank 0: the process's memory has grown from [0-9]+ to"
    EPX_TEST_FLIP='file' run 1 --soak 1 "${shapes[@]}"
    expect_match err 'rank 0: [0-9]+ files are open after 2 groups, and'
    EPX_TEST_FLIP=heap run 1 --soak 1 "${shapes[@]}"
    expect_match err 'turn [0-9]: the heap has [0-9]+ bytes left, and had'
    EPX_TEST_FLIP=dispatch run 1 --soak 1 "${shapes[@]}"
    expect_match err 'turn 0, round 1: dispatch differs: .'
}

case_rank_killed() {
    local status=0
    start_long
    kill -KILL "${ranks[2]}"
    wait "$bench_pid" || status=$?
    expect "the exit status" $status 1
    # Who notices first: the launcher, or its peers.
    expect_match err 'rank 2 (is lost: its process ended|was ended by signal 9)'
    wait_until all_gone "${ranks[@]}"
}

case_launcher_killed() {
    start_long
    kill -KILL "$bench_pid"
    wait_until all_gone "${ranks[@]}"
}

case_mpi() {
    if [ ! -x "$(dirname "$bench")/epx-bench-mpi-peer" ] ||
        ! command -v mpirun >/dev/null; then
        echo "SKIPPED: the MPI peer is not here" >&2
        exit 77
    fi
    local layout peer op
    peer="\"peer\": \"mpi\", \"peer_p50_us\": $number, \"ratio_peer\": $number"
    for layout in rank expert slots; do
        quietly --vs mpi --json --ranks 3 --layout $layout "${small[@]}"
        for op in dispatch combine; do
            expect_json $op thread "$peer"
        done
    done
    # A peer that cannot be had is no failure.
    run 0 --vs mpi --json --dtype f16 "${small[@]}"
    expect_match err 'no figures of the mpi peer: it has no f16'
    expect_match out '"peer": "mpi", "peer_p50_us": null, "ratio_peer": null'
}

# Ranks share card 0.
case_card() {
    local status=0 launch layout options op
    "$bench" --device cuda "${small[@]}" >"$dir/out" 2>"$dir/err" || status=$?
    if [ $status = 1 ] &&
        grep -Eq 'built without CUDA|cudaGetDeviceCount' "$dir/err"; then
        echo "SKIPPED: $(cat "$dir/err")" >&2
        exit 77
    fi
    expect "the exit status" $status 0
    for launch in threads procs; do
        for layout in rank expert slots; do
            for options in "--mode ht" "--mode ll" "--mode ll --send-only" \
                "--graph" "--mode ll --graph" "--buffers outside" \
                "--mode ll --graph --send-only --overlap 50" \
                "--dtype fp8" "--quantize=ue8m0"; do
                # Processes take turns on a card, slowly.
                [ $launch = threads ] || [ "$layout $options" = "rank --graph" ] ||
                    [ "$layout $options" = "slots --mode ll" ] || continue
                # shellcheck disable=SC2086 # several words
                quietly --device cuda:0 --check --$launch --ranks 3 \
                    --workers 2 --layout $layout $options "${small[@]}"
            done
        done
    done
    for launch in threads procs; do
        quietly --device cuda --soak 3 --$launch --ranks 3 --workers 2 \
            "${shapes[@]}"
    done
    quietly --device cuda --json --graph --signals --vs memcpy "${small[@]}"
    for op in plan plan-device dispatch combine layer signals; do
        expect_match out "\"op\": \"$op\", \"engine\": \"cuda\""
    done
    expect_match out "\"op\": \"layer\".*\"ratio_ceiling\": $number, \
\"peer\": \"memcpy\".*\"launch\": \"graph\".*\"sms\": [0-9]+"
    run 0 --device cuda --vs mpi "${small[@]}"
    expect_match err 'no figures of the mpi peer: it has no --device cuda'
}

"case_$case"
