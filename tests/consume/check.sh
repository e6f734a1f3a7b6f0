#!/bin/sh
# SPDX-License-Identifier: MIT
# check.sh WAY SOURCE_ROOT COMPILER...: builds and runs main.cpp in a project of its own; for the way `cuda`, whose first word of
# COMPILER is nvcc, cuda.cu. Exit status 77: skipped.
set -eu
way=$1 root=$2
shift 2
here=$root/tests/consume
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ "$way" = cuda ]; then
    export CUDACXX="$1"
    PATH=$PATH:$(dirname "$1")
    shift
fi
export CXX="$*" CXXFLAGS=-O0

case $way in
    meson | pkg-config) ;;
    *) if ! command -v cmake; then
        echo 'skipped: there is no cmake'
        exit 77
    fi ;;
esac

# by_meson OPTION...: installs into $work/prefix.
by_meson() {
    meson setup "$work/colt5" "$root" --prefix "$work/prefix" -Dtests=disabled -Dexamples=disabled -Dbench=disabled "$@"
    meson install -C "$work/colt5" --quiet
    export PKG_CONFIG_PATH="$work/prefix/share/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
}

# by_cmake WAY OPTION...: the program of cmake/CMakeLists.txt.
by_cmake() {
    way=$1 build=$work/build-$1
    shift
    cmake -G Ninja -S "$here/cmake" -B "$build" -DWAY="$way" "$@" -DCOLT5_ROOT="$root" -DOWN_EIGEN="$work/eigen" \
        -DCMAKE_PREFIX_PATH="$work/prefix" -DCMAKE_INSTALL_PREFIX="$work/prefix"
    cmake --build "$build"
    "$build/program"
}

case $way in
    meson)
        cp -r "$here/meson/." "$here/main.cpp" "$work"
        mkdir "$work/subprojects"
        ln -s "$root" "$work/subprojects/colt5"
        meson setup "$work/build" "$work"
        ninja -C "$work/build"
        "$work/build/program"
        ;;
    pkg-config)
        by_meson
        # Words of flags, not one word.
        # shellcheck disable=SC2046
        "$@" -std=c++20 "$here/main.cpp" -o "$work/program" $(pkg-config --cflags --libs colt5)
        "$work/program"
        ;;
    cmake)
        by_meson
        by_cmake package
        ;;
    snippet)
        # What the README says, but from this folder. It asks for optimization; to be quick, the program is built without.
        sed -n '/^```cmake$/,/^```$/{/^```/d;s|GIT_REPOSITORY URL GIT_TAG main|SOURCE_DIR "'"$root"'"|;p}' "$root/README.md" >"$work/CMakeLists.txt"
        cp "$here/main.cpp" "$work/program.cpp"
        cmake -G Ninja -S "$work" -B "$work/build"
        grep 'FLAGS = .* -O3 .*-march=native' "$work/build/build.ninja"
        cmake -DCMAKE_BUILD_TYPE= "$work/build"
        cmake --build "$work/build"
        "$work/build/program"
        ;;
    add_subdirectory)
        # An Eigen that is not the system's, and what CMake installs is a package, too.
        eigen=$(pkg-config --variable=includedir eigen3)
        cp -r "${eigen:-/usr/include}/eigen3" "$work/eigen"
        printf '#define OWN_EIGEN\n' | cat - "$work/eigen/Eigen/Core" >"$work/core"
        mv "$work/core" "$work/eigen/Eigen/Core"
        by_cmake add_subdirectory
        cmake --install "$build" >"$work/log"
        by_cmake package
        ;;
    cuda)
        by_meson -Dcuda=enabled
        # shellcheck disable=SC2046
        "$CUDACXX" -std=c++20 -arch=sm_90a "$here/cuda.cu" -o "$work/program" $(pkg-config --cflags --libs colt5-cuda)
        "$work/program"
        for source in package fetch_content; do by_cmake $source -DCUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90a; done
        ;;
esac
