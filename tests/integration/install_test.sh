#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Installs a build, moves it, and uses it as a stranger would:
#     install_test.sh CMAKE BUILD_DIRECTORY CC CXX
set -eu
cmake=$1
build=$2
export CC=$3 CXX=$4
source=$(cd "$(dirname "$0")/../.." && pwd)
consumer=$source/tests/integration/install_consumer
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

fail() {
    echo "FAIL: $*" >&2
    exit 1
}

step() {
    echo "== $*"
}

# Runs a program that was built against the installed library.
check_program() { # PROGRAM
    local said
    said=$("$1") || fail "$1 ended with status $?"
    [[ $said == "version $version, round trip right" ]] ||
        fail "$1 says \"$said\""
    if ldd "$1" 2>&1 | grep -F libepx.so | grep -vF "$prefix/"; then
        fail "$1 does not take the libepx.so of $prefix"
    fi
}

step "install and move"
"$cmake" --install "$build" --prefix "$dir/first" >"$dir/log" ||
    fail "$(cat "$dir/log")"
prefix=$dir/moved
mv "$dir/first" "$prefix"
library=$(find "$prefix" -name libepx.so)
[ -n "$library" ] || fail "there is no libepx.so below the prefix"
libdir=$(dirname "$library")
export PKG_CONFIG_PATH=$libdir/pkgconfig
version=$(pkg-config --modversion epx)
if grep -rlI -e "$dir/first" -e "$build" "$prefix"; then
    fail "these files name the place they were built or installed in"
fi

step "files"
for file in include/epx/epx.h include/epx/epx_mpi.h bin/epx-run bin/epx-info \
    bin/epx-bench share/man/man1/epx-run.1 share/man/man1/epx-info.1 \
    share/man/man1/epx-bench.1; do
    # A build may leave out the tools, but no tool its manual.
    case $file in
    *epx-*) [ -e "$build/tools/$(basename "$file" .1)" ] || continue ;;
    esac
    [ -e "$prefix/$file" ] || fail "$file is not installed"
done
[ -e "$libdir/libepx.a" ] || fail "libepx.a is not installed"

step "dynamic section"
soname=$(readelf -d "$library" | sed -n 's/.*SONAME.*\[\(.*\)\]/\1/p')
[ "$soname" = libepx.so.0 ] || fail "the soname is \"$soname\""
# check_needs FILE NAME...: the file needs these libraries at most.
check_needs() {
    local file=$1
    shift
    readelf -d "$file" | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' >"$dir/needed"
    if grep -vE "^($(IFS='|' && echo "$*"))\.so\." "$dir/needed"; then
        fail "$(basename "$file") needs these libraries"
    fi
}
system=(libc libm libpthread libdl librt 'ld-linux.*')
check_needs "$library" "${system[@]}" libsodium

step "exported symbols"
grep -v '^#' "$prefix/include/epx/epx.h" | tr '\n' ' ' |
    grep -oE 'EPX_API [^;]*;' | sed -E 's/[^(]*\b(epx_[a-z0-9_]+) *\(.*/\1/' |
    sort >"$dir/declared"
# What modules use has names and a version of its own, not for programs.
touch "$dir/private"
nm -D --defined-only --with-symbol-versions "$library" |
    awk -v dir="$dir" '$2 != "A" { split($3, part, /@+/)
        print part[1] >(dir (part[2] == "EPX_0" ? "/public" : "/private")) }'
sort "$dir/public" >"$dir/exported"
if grep -v '^epx__' "$dir/private"; then
    fail "libepx.so exports these to its modules"
fi
[ -s "$dir/declared" ] || fail "no declaration was found in epx.h"
diff -u "$dir/declared" "$dir/exported" ||
    fail "libepx.so does not export what epx.h declares (-), or more (+)"

if [ -e "$build/src/libepx_cuda.so.0" ]; then
    step "module for CUDA"
    module=$libdir/libepx_cuda.so.0
    [ -e "$module" ] || fail "libepx_cuda.so.0 is not installed"
    check_needs "$module" "${system[@]}" libepx
    [ "$(nm -D --defined-only "$module" | cut -d' ' -f3)" = \
        epx__engine_cuda ] || fail "libepx_cuda.so.0 exports something else"
fi

step "headers alone"
# MPI's own header is not ours to judge.
read -ra mpi <<<"$(mpicc --showme:compile 2>/dev/null | sed 's/-I/-isystem /g')"
for header in "$prefix"/include/epx/*.h; do
    if [ "$(basename "$header")" = epx_mpi.h ] && [ ${#mpi[@]} = 0 ]; then
        echo "mpicc was not found: epx_mpi.h is not tried"
        continue
    fi
    flags=(-Wall -Wextra -pedantic -Werror -fsyntax-only "-I$prefix/include")
    echo "#include <epx/$(basename "$header")>" |
        tee "$dir/alone.c" >"$dir/alone.cpp"
    # epx_mpi.h asks for the POSIX clocks, as its comment says.
    "$CC" -std=c11 -D_POSIX_C_SOURCE=200809L "${flags[@]}" "${mpi[@]}" \
        "$dir/alone.c"
    "$CXX" -std=c++11 "${flags[@]}" "${mpi[@]}" "$dir/alone.cpp"
done

for kind in OFF ON; do
    step "find_package, static $kind"
    "$cmake" -S "$consumer" -B "$dir/cmake-$kind" \
        "-DCMAKE_PREFIX_PATH=$prefix" "-DCONSUMER_STATIC=$kind" >"$dir/log" ||
        fail "$(cat "$dir/log")"
    "$cmake" --build "$dir/cmake-$kind" >"$dir/log" || fail "$(cat "$dir/log")"
    check_program "$dir/cmake-$kind/consumer_c"
    check_program "$dir/cmake-$kind/consumer_cpp"
done

step "pkg-config"
read -ra flags <<<"$(pkg-config --cflags --libs epx)"
"$CC" -std=c11 "$consumer/main.c" "${flags[@]}" "-Wl,-rpath,$libdir" \
    -o "$dir/shared_c"
"$CXX" -std=c++11 "$consumer/main.cpp" "${flags[@]}" "-Wl,-rpath,$libdir" \
    -o "$dir/shared_cpp"
check_program "$dir/shared_c"
check_program "$dir/shared_cpp"

step "pkg-config --static"
rm "$library" # so that the linker can only take libepx.a
read -ra flags <<<"$(pkg-config --static --cflags --libs epx)"
"$CC" -std=c11 "$consumer/main.c" "${flags[@]}" -o "$dir/static_c"
"$CXX" -std=c++11 "$consumer/main.cpp" "${flags[@]}" -o "$dir/static_cpp"
check_program "$dir/static_c"
check_program "$dir/static_cpp"

step "tools"
for tool in "$prefix"/bin/*; do
    [ -e "$tool" ] || continue
    said=$("$tool" --version) || fail "$tool --version ended with status $?"
    [ "$said" = "$(basename "$tool") $version" ] || fail "$tool says \"$said\""
    "$tool" --help >/dev/null || fail "$tool --help ended with status $?"
done
if [ -x "$prefix/bin/epx-info" ]; then
    EPX_SECRET=hidden-value "$prefix/bin/epx-info" --json >"$dir/json"
    EPX_SECRET=hidden-value "$prefix/bin/epx-info" >"$dir/text"
    for form in json text; do
        grep -q EPX_SECRET "$dir/$form" || fail "$form: no EPX_SECRET"
        ! grep -q hidden-value "$dir/$form" || fail "$form shows the secret"
        grep -q "$version" "$dir/$form" || fail "$form: no version"
    done
    if [ -e "$build/src/libepx_cuda.so.0" ]; then
        grep -q '"engines".*"cuda"' "$dir/json" ||
            fail "the module for CUDA is not found where it is installed"
    fi
    status=0
    "$prefix/bin/epx-info" --what 2>"$dir/err" || status=$?
    [ $status = 2 ] || fail "epx-info --what ends with status $status, not 2"
    if command -v python3 >/dev/null; then
        python3 -m json.tool <"$dir/json" >/dev/null
    fi
fi
if command -v mandoc >/dev/null; then
    mandoc -T lint -W error "$prefix"/share/man/man1/epx-*.1
fi
