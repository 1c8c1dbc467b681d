#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Tests of epx-run:  launcher_test.sh EPX_RUN CASE
# Every job carries a mark in its environment, by which what is left of it is
# found however it has named or detached itself.
#
# The ranks' own shells expand what is in single quotes:
# shellcheck disable=SC2016
set -u
run=$1
case=$2
mark=EPX_TEST_MARK=$$.$RANDOM
dir=$(mktemp -d)
trap 'kill_marked; rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM

fail() {
    echo "FAIL: $*" >&2
    sed 's/^/  stdout: /' "$dir/out" 2>/dev/null | cut -c1-200 | head -20 >&2
    sed 's/^/  stderr: /' "$dir/err" 2>/dev/null | cut -c1-200 | head -20 >&2
    exit 1
}

expect() { # WHAT ACTUAL WANTED
    [ "$2" = "$3" ] || fail "$1 is \"$2\", not \"$3\""
}

expect_match() { # FILE PATTERN
    grep -Eq -- "$2" "$1" || fail "no line of $(basename "$1") matches \"$2\""
}

# Runs a job to its end; its output is in $dir/out and $dir/err.
job() { # STATUS OPTION...
    local wanted=$1 status=0
    shift
    env "$mark" "$run" "$@" >"$dir/out" 2>"$dir/err" || status=$?
    expect "the exit status of $*" $status "$wanted"
    expect_nothing_left
}

# Starts a job in a process group of its own, so that the shell does not make
# it ignore SIGINT; $launcher is its process.
start_job() { # OPTION...
    set -m
    env "$mark" "$run" "$@" >"$dir/out" 2>"$dir/err" &
    launcher=$!
    set +m
}

finish_job() { # STATUS
    local status=0
    wait "$launcher" || status=$?
    expect "the exit status" $status "$1"
    expect_nothing_left
}

wait_until() { # COMMAND...
    local tries
    for ((tries = 0; tries < 600; tries++)); do
        "$@" && return
        sleep 0.05
    done
    fail "did not come true in 30 s: $*"
}

marked() {
    grep -lszF -- "$mark" /proc/[0-9]*/environ 2>/dev/null |
        cut -d/ -f3 | tr '\n' ' '
}

# Only a test that fails leaves any.
kill_marked() {
    local pid
    for pid in $(marked); do
        kill -KILL "$pid" 2>/dev/null
    done
}

expect_nothing_left() {
    expect "the list of processes left" "$(marked)" ""
}

nothing_left() {
    [ -z "$(marked)" ]
}

has_files() { # NAME...: each rank makes one to say that it has come that far
    local name
    for name; do
        [ -e "$dir/$name" ] || return 1
    done
}

is_stopped() { # PID
    [ "$(sed 's/.*) \(.\).*/\1/' "/proc/$1/stat")" = T ]
}

# A rank that says it is ready and then works for ever, with processes that have
# left its group and its session.
busy='setsid sleep 1000 & sh -c "sleep 1000; :" &
    touch "$0/ready.$RANK"; while :; do sleep 1000; done'
stubborn="trap '' INT TERM HUP QUIT; $busy"

test_exit_status() {
    job 0 -n 3 true
    expect "stderr" "$(cat "$dir/err")" ""
    job 7 -n 3 sh -c 'test $RANK != 2 || exit 7'
    expect_match "$dir/err" '^epx-run: rank 2 exited with status 7'
    job 137 -n 2 sh -c 'test $RANK != 1 || kill -KILL $$'
    expect_match "$dir/err" '^epx-run: rank 1 was killed by signal 9 \(Killed\)'
    # Rank 0 fails too, but later: when it is told of the failure of rank 1.
    job 3 --grace 0 -n 2 bash -c \
        'trap "exit 9" TERM; test $RANK = 0 || exit 3; sleep 1000 & wait'
    expect "failures told" "$(grep -c 'exited with' "$dir/err")" 1
    job 127 -n 2 "$dir/missing"
    expect_match "$dir/err" "cannot run $dir/missing: No such file"
    touch "$dir/plain"
    job 126 -n 2 "$dir/plain"
    expect_match "$dir/err" "cannot run $dir/plain: Permission denied"
}

test_prefix() {
    job 0 -n 2 sh -c 'echo out $RANK; echo; printf "no end"; echo err >&2'
    printf '[0] out 0\n[0] \n[0] no end\n[1] out 1\n[1] \n[1] no end\n' \
        >"$dir/wanted"
    sort -s -k1,1 "$dir/out" | diff -u "$dir/wanted" - || fail "stdout differs"
    printf '[0] err\n[1] err\n' >"$dir/wanted"
    sort "$dir/err" | diff -u "$dir/wanted" - || fail "stderr differs"
    job 0 --no-prefix -n 1 printf 'as\nit is'
    expect "stdout" "$(cat "$dir/out")" $'as\nit is'
}

# Lines that are far longer than a pipe holds, from all ranks at once.
test_long_lines() {
    job 0 -n 4 sh -c 'line=$(head -c 200000 /dev/zero | tr "\0" $RANK)
        for i in 1 2 3 4 5 6 7 8 9 10; do echo $line; echo $line >&2; done'
    for stream in out err; do
        awk '{
            rank = substr($0, 2, 1); line = $0; whole = "[" rank "] "
            sub(/^\[.\] /, "", line); gsub(rank, "", line)
            if (substr($0, 1, 4) != whole || length($0) != 200004 ||
                line != "") { bad++ }
            count[rank]++
        } END {
            print bad + 0, count[0], count[1], count[2], count[3]
        }' "$dir/$stream" >"$dir/counts"
        expect "broken lines and lines of each rank" \
            "$(cat "$dir/counts")" "0 10 10 10 10"
    done
    # One without an end comes in pieces, and nothing of it is lost.
    job 0 -n 1 head -c 2500000 /dev/zero
    expect "lines" "$(wc -l <"$dir/out")" 3
    expect "bytes" "$(tr -dc '\0' <"$dir/out" | wc -c)" 2500000
}

test_environment() {
    export RANK=77 WORLD_SIZE=77 EPX_SECRET_FILE=/nowhere
    job 0 -n 2 env
    unset RANK WORLD_SIZE EPX_SECRET_FILE
    for rank in 0 1; do
        for setting in "RANK=$rank" "LOCAL_RANK=$rank" WORLD_SIZE=2 \
            LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 'MASTER_PORT=[0-9]+' \
            'EPX_PORT=[0-9]+' 'EPX_SECRET=[0-9a-f]{64}' 'EPX_JOB_ID=.+'; do
            expect_match "$dir/out" "^\\[$rank\\] $setting\$"
        done
    done
    ! grep -q EPX_SECRET_FILE "$dir/out" || fail "EPX_SECRET_FILE is passed on"
    for name in MASTER_PORT EPX_PORT EPX_SECRET EPX_JOB_ID; do
        expect "values of $name in one job" \
            "$(sed -n "s/^.*\\] $name=//p" "$dir/out" | sort -u | wc -l)" 1
    done
    expect "ports" "$(grep -oE '_PORT=.*' "$dir/out" | sort -u |
        cut -d= -f2 | sort -u | wc -l)" 2
    cp "$dir/out" "$dir/first"
    job 0 -n 2 env
    for name in EPX_SECRET EPX_JOB_ID; do
        expect "values of $name in two jobs" "$(cat "$dir/first" "$dir/out" |
            sed -n "s/^.*\\] $name=//p" | sort -u | wc -l)" 2
    done
}

test_stdin() {
    echo hello >"$dir/in"
    job 0 -n 3 sh -c 'echo "got $(cat)"' <"$dir/in"
    expect "stdout" "$(sort "$dir/out" | tr '\n' ,)" \
        "[0] got hello,[1] got ,[2] got ,"
    job 0 -n 2 sh -c 'readlink /proc/$$/fd/0' <"$dir/in"
    expect "stdin of the ranks" "$(sort "$dir/out" | tr '\n' ,)" \
        "[0] $dir/in,[1] /dev/null,"
}

test_failure_ends_job() {
    job 5 --grace 0 -n 3 bash -c "if [ \$RANK = 1 ]; then
            until [ -e $dir/ready.0 ] && [ -e $dir/ready.2 ]; do
                sleep 0.05
            done
            exit 5
        fi; $stubborn" "$dir"
    expect_match "$dir/err" 'rank 1 exited with status 5; still running: 2 of 3'
    # Within the grace time the others may say what they have to say.
    job 5 --grace 1000 -n 2 bash -c 'test $RANK = 0 || exit 5
        until grep -q "exited with" "$0/err"; do sleep 0.05; done
        echo last words; exit 6' "$dir"
    expect "stdout" "$(cat "$dir/out")" "[0] last words"
}

test_left_behind() {
    job 0 -n 2 sh -c 'setsid sleep 1000 & sleep 1000 & exit 0'
}

test_interrupt() {
    for signal in INT TERM HUP QUIT; do
        rm -f "$dir"/ready.*
        start_job -n 2 bash -c "trap 'echo got $signal; exit 4' $signal; $busy" \
            "$dir"
        wait_until has_files ready.0 ready.1
        kill -s $signal "$launcher"
        finish_job $((128 + $(kill -l $signal)))
    done
}

test_interrupt_stubborn() {
    start_job --grace 0.1 -n 2 bash -c "$stubborn" "$dir"
    wait_until has_files ready.0 ready.1
    kill -INT "$launcher"
    finish_job 130
    # The second time means now.
    rm -f "$dir"/ready.*
    start_job --grace 1000 -n 2 bash -c "$stubborn" "$dir"
    wait_until has_files ready.0 ready.1
    kill -INT "$launcher"
    wait_until grep -q 'ending the job' "$dir/err"
    kill -INT "$launcher"
    finish_job 130
}

test_ignored_signal() {
    trap '' HUP
    start_job -n 2 bash -c 'touch "$0/ready.$RANK"
        until [ -e "$0/go" ]; do sleep 0.05; done' "$dir"
    trap 'exit 1' HUP
    wait_until has_files ready.0 ready.1
    kill -HUP "$launcher"
    touch "$dir/go"
    finish_job 0
}

test_suspend() {
    start_job -n 1 bash -c 'echo $$ >"$0/pid"; touch "$0/ready.0"
        until [ -e "$0/go" ]; do sleep 0.05; done' "$dir"
    wait_until has_files ready.0
    kill -TSTP "$launcher"
    wait_until is_stopped "$launcher"
    wait_until is_stopped "$(cat "$dir/pid")"
    touch "$dir/go"
    kill -CONT "$launcher"
    finish_job 0
}

test_killed() {
    start_job -n 3 bash -c 'touch "$0/ready.$RANK"; exec sleep 1000' "$dir"
    wait_until has_files ready.0 ready.1 ready.2
    kill -KILL "$launcher"
    wait "$launcher" 2>/dev/null
    wait_until nothing_left
}

test_timeout() {
    job 124 --timeout 0.2 -n 2 bash -c "$busy" "$dir"
    expect_match "$dir/err" '^epx-run: the job did not end within 0.2 s$'
    job 124 --timeout 0.2 -n 2 bash -c "$stubborn" "$dir"
    job 0 --timeout 1000 -n 2 true
}

# Nobody reads on: the job ends, and does not hang.
test_output_closed() {
    env "$mark" "$run" -n 2 yes 2>"$dir/err" | head -n 1 >"$dir/out"
    expect "the exit status" "${PIPESTATUS[0]}" 125
    expect_nothing_left
    expect_match "$dir/err" "cannot write the ranks' output: Broken pipe"
    mkfifo "$dir/fifo"
    exec 9<>"$dir/fifo"
    set -m
    env "$mark" "$run" -n 2 sh -c 'touch "$0/ready.$RANK"; exec yes' "$dir" \
        >"$dir/fifo" 2>"$dir/err" &
    launcher=$!
    set +m
    wait_until has_files ready.0 ready.1
    kill -INT "$launcher"
    finish_job 130
}

test_bind() {
    local cores
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
    [ "$cores" -le 1023 ] || exit 77
    job 0 --bind -n 1 grep Cpus_allowed_list /proc/self/status
    expect "cores of a single rank" "$(sed 's/^\[0\] //' "$dir/out")" \
        "$(grep Cpus_allowed_list /proc/self/status)"
    job 0 --bind -n "$cores" grep Cpus_allowed_list /proc/self/status
    expect "different cores of $cores ranks" \
        "$(sed 's/.*://' "$dir/out" | sort -u | grep -vc '[-,]')" "$cores"
    job 0 --bind -n $((cores + 1)) grep Cpus_allowed_list /proc/self/status
    expect "ranks with one core" \
        "$(sed 's/.*://' "$dir/out" | grep -vc '[-,]')" $((cores + 1))
}

# More pipes than this process may have files open; the ranks keep the limit.
test_many_ranks() {
    local hard
    hard=$(ulimit -H -n)
    [ "$hard" = unlimited ] || [ "$hard" -ge 512 ] || exit 77
    ulimit -S -n 128
    # shellcheck disable=SC2039,SC3045
    job 0 -n 200 sh -c 'ulimit -n'
    expect "different lines" "$(sed 's/.*\] //' "$dir/out" | sort -u)" 128
    expect "lines" "$(wc -l <"$dir/out")" 200
}

test_options() {
    while IFS='|' read -r options sentence; do
        # shellcheck disable=SC2086
        job 125 $options
        expect_match "$dir/err" "$sentence"
        expect_match "$dir/err" "Try 'epx-run --help'"
    done <<'END'
|-n N, the number of ranks, is missing
true|-n N, the number of ranks, is missing
-n 2|the program to run is missing
-n 2 --|the program to run is missing
-n 0 true|-n is "0"; it must be a whole number from 1 to 1024
-n 1025 true|-n is "1025"; it must be
-n -1 true|-n is "-1"; it must be
-n +1 true|-n is "\+1"; it must be
-n 2x true|-n is "2x"; it must be
-n 1.5 true|-n is "1.5"; it must be
-n 99999999999999999999 true|-n is "99999999999999999999"; it must be
-n 2 --grace -1 true|--grace is "-1"; it must be a number of seconds from 0 to
-n 2 --grace inf true|--grace is "inf"; it must be
-n 2 --grace 1e3 true|--grace is "1e3"; it must be
-n 2 --grace 1.2.3 true|--grace is "1.2.3"; it must be
-n 2 --timeout 0 true|--timeout is "0"; it must be a number of seconds from 0.001
-n 2 --timeout 99999999999 true|--timeout is "99999999999"; it must be
-n 2 --what true|unrecognized option '--what'
-n|option requires an argument -- 'n'
END
    job 0 --help
    expect_match "$dir/out" '^usage: epx-run -n N'
    job 0 --version
    expect_match "$dir/out" '^epx-run [0-9]+\.[0-9]+\.[0-9]+$'
    # Options behind the program's name are the program's.
    job 0 -n 1 echo --grace x
    expect "stdout" "$(cat "$dir/out")" "[0] --grace x"
}

if ! declare -F "test_$case" >/dev/null; then
    echo "launcher_test.sh: there is no case \"$case\"" >&2
    exit 2
fi
"test_$case"
