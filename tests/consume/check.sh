#!/bin/sh
# SPDX-License-Identifier: MIT
# check.sh WAY SOURCE_ROOT COMPILER...: builds and runs main.cpp in a project of its own. Exit status 77: skipped.
set -eu
way=$1 root=$2
shift 2
here=$root/tests/consume
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CXX="$*" CXXFLAGS=-O0

if [ "$way" = meson ]; then
    cp -r "$here/meson/." "$here/main.cpp" "$work"
    mkdir "$work/subprojects"
    ln -s "$root" "$work/subprojects/colt5"
    meson setup "$work/build" "$work"
    ninja -C "$work/build"
    exec "$work/build/program"
fi

if [ "$way" = cmake ] && ! command -v cmake; then
    echo 'skipped: there is no cmake'
    exit 77
fi
meson setup "$work/colt5" "$root" --prefix "$work/prefix" -Dtests=disabled -Dexamples=disabled -Dbench=disabled
meson install -C "$work/colt5" --quiet
if [ "$way" = cmake ]; then
    cmake -G Ninja -S "$here/cmake" -B "$work/build" -DCMAKE_PREFIX_PATH="$work/prefix"
    cmake --build "$work/build"
else
    mkdir "$work/build"
    export PKG_CONFIG_PATH="$work/prefix/share/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
    # Words of flags, not one word.
    # shellcheck disable=SC2046
    "$@" -std=c++20 "$here/main.cpp" -o "$work/build/program" $(pkg-config --cflags --libs colt5)
fi
"$work/build/program"
