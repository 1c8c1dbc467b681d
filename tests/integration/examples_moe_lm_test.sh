#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Tests of examples/moe_lm:
#   examples_moe_lm_test.sh EPX_RUN MOE_LM MOE_LM_REPORT CASE
set -u
run=$1 moe_lm=$2 report=$3 case=$4
text=$(cd "$(dirname "$0")/../../include/epx" && pwd)/epx.h
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

fail() {
    echo "FAIL: $*" >&2
    sed 's/^/  /' "$dir/out" >&2
    exit 1
}

expect() { # STATUS COMMAND...
    local wanted=$1 status=0
    shift
    "$@" >"$dir/out" 2>&1 || status=$?
    [ $status = "$wanted" ] || fail "$* ended with $status, not $wanted"
}

expect_line() { # PATTERN
    grep -q -- "$1" "$dir/out" || fail "no line of the output matches \"$1\""
}

train() { # RANKS
    expect 0 "$run" -n "$1" -- "$moe_lm" --text "$text" --steps 8 \
        --log "$dir/$1.csv"
    grep -E '^(loss|load),' "$dir/$1.csv" >"$dir/$1.losses"
}

# A log whose losses halve at every step.
log() { # RANKS
    echo "ranks,$1"
    echo "unigram_bits,4.5"
    awk 'BEGIN { for (i = 0; i < 20; i++) printf "loss,%d,%.9g\n", i, 5 / 2^i }'
    echo "load,0,0,7"
    echo "seconds,plan,1.5"
}

case $case in
same_bits) # on any number of ranks, whether it divides the shards or not
    for ranks in 1 2 3 4; do
        train $ranks
        cmp "$dir/1.losses" "$dir/$ranks.losses" ||
            fail "$ranks ranks train otherwise than one"
    done
    first=$(awk -F, '/^loss/ { print $3; exit }' "$dir/1.losses")
    last=$(awk -F, '/^loss/ { loss = $3 } END { print loss }' "$dir/1.losses")
    awk "BEGIN { exit !($last < 0.9 * $first) }" ||
        fail "the loss is $first at first and $last at last"
    ;;
report_verdict) # which is an exit status
    log 4 >"$dir/a.csv"
    log 1 >"$dir/b.csv"
    expect 0 "$report" "$dir/a.csv" "$dir/b.csv"
    expect_line '^ok .*differ by at most 0 '
    sed 's/^loss,7,.*/loss,7,0.0390625037/' "$dir/b.csv" >"$dir/c.csv"
    expect 1 "$report" "$dir/a.csv" "$dir/c.csv"
    expect_line '^FAIL .*differ'
    sed 's/^loss,7,.*/loss,7,nan/' "$dir/b.csv" >"$dir/c.csv"
    expect 1 "$report" "$dir/c.csv" "$dir/c.csv"
    expect_line '^FAIL .*differ'
    sed 's/^loss,19,.*/loss,19,9/' "$dir/a.csv" >"$dir/c.csv"
    expect 1 "$report" "$dir/c.csv" "$dir/c.csv"
    expect_line '^FAIL .*not below'
    sed '/^loss,19/d' "$dir/b.csv" >"$dir/c.csv"
    expect 1 "$report" "$dir/a.csv" "$dir/c.csv"
    expect_line 'different trainings'
    sed '/^seconds/d' "$dir/b.csv" >"$dir/c.csv"
    expect 1 "$report" "$dir/a.csv" "$dir/c.csv"
    expect_line 'ends before the training does'
    ;;
no_text)
    expect 1 "$run" -n 2 -- "$moe_lm" --text "$dir/none"
    expect_line "there is no text at $dir/none"
    printf 'short' >"$dir/short"
    expect 1 "$run" -n 2 -- "$moe_lm" --text "$dir/short"
    expect_line 'has 5 bytes; it needs at least'
    ;;
too_many_ranks)
    expect 1 "$run" -n 5 -- "$moe_lm" --text "$text"
    expect_line 'there are 5 ranks'
    ;;
*)
    fail "there is no case $case"
    ;;
esac
