#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# check.sh COMPILER [examples]: it compiles a strict program in several ways, and perhaps the examples, without warnings. What
# g++ makes of it with optimization runs, if the processor can. Eigen, xsimd and nlohmann-json are those of the system.
set -euo pipefail
cd "$(dirname "$0")/../.."
export compiler=$1 with=${2:-}
strict='-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wdouble-promotion -Wold-style-cast -Wcast-align
    -Wcast-qual -Wnon-virtual-dtor -Woverloaded-virtual -Wredundant-decls -Wextra-semi -Wundef -Wformat=2'
strict=$(echo $strict)
baseline='' widest=''
if [ "$(uname -m)" = x86_64 ]; then baseline=-march=x86-64-v3 widest=-march=x86-64-v4; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export work

# The flags and the source of each compilation, the longest one first.
compilations() {
    local program=tests/compilers/strict.cpp source
    case $compiler in
        g++*)  # warns of some things only where it optimizes
            echo "-std=gnu++2b $strict -O2 $baseline -fopenmp -fno-rtti -I include $program -o $work/strict"
            echo "-std=c++20 $strict -O0 $widest -fopenmp -isystem include -c $program"
            ;;
        *)
            echo "-std=gnu++2b $strict $baseline -fno-rtti -I include -fsyntax-only $program"
            echo "-std=c++20 $strict $baseline -isystem include -fsyntax-only $program"
            ;;
    esac
    [ "$with" = examples ] || return 0
    for source in examples/*.cpp examples/demo/*.cpp; do
        echo "-std=c++20 -Wall -Wextra -Wshadow -Wconversion -Wno-unknown-pragmas $baseline -I include -fsyntax-only $source"
    done
}

compile() {
    local result=(-o /dev/null)
    if [[ $* = *" -o "* ]]; then result=(); fi
    if ! "$compiler" -Werror -isystem /usr/include/eigen3 "$@" "${result[@]}"; then
        echo "failed: $compiler $*"
        return 1
    fi
}
export -f compile
compilations | xargs -P "$(nproc)" -L 1 bash -c 'compile "$@"' compile

[ -x "$work/strict" ] || exit 0
native=$("$compiler" -march=native -dM -E -x c++ /dev/null)
if [ -z "$baseline" ] || [[ $native == *__AVX2__* && $native == *__FMA__* && $native == *__BMI2__* ]]; then
    "$work/strict"
else
    echo 'not run: the strict program needs a processor with AVX2, FMA and BMI2'
fi
