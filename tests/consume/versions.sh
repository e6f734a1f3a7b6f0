#!/bin/sh
# SPDX-License-Identifier: MIT
# versions.sh SOURCE_ROOT COMPILER...: the installed package takes Eigen 3.4 to 5 and xsimd from 8.1 on, and no others, in CMake
# and pkg-config. Their packages are made up, of a name and a version. And CITATION.cff,
# vcpkg.json and pyproject.toml have the version of VERSION. Exit status 77: skipped.
set -eu
root=$1
shift
grep -x "version: $(cat "$root/VERSION")" "$root/CITATION.cff"
grep -F "\"version\": \"$(cat "$root/VERSION")\"" "$root/packaging/vcpkg/colt5/vcpkg.json"
grep -x "version = \"$(cat "$root/VERSION")\"" "$root/python/pyproject.toml"
if ! command -v cmake || ! command -v pkg-config; then
    echo 'skipped: there is no cmake or no pkg-config'
    exit 77
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CXX="$*"
meson setup "$work/colt5" "$root" --prefix "$work/prefix" -Dtests=disabled -Dexamples=disabled -Dbench=disabled
meson install -C "$work/colt5" --quiet
mkdir "$work/consumer"
cat >"$work/consumer/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.20)
project(consumer CXX)
find_package(colt5 REQUIRED)
CMAKE

# package NAME TARGET VERSION: as Eigen and xsimd do it, compatible with the same major version only.
package() {
    mkdir -p "$fake/share/cmake/$1" "$fake/share/pkgconfig"
    cat >"$fake/share/cmake/$1/$1Config.cmake" <<CMAKE
if(NOT TARGET $2)
  add_library($2 INTERFACE IMPORTED)
  set_target_properties($2 PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "$fake/include")
endif()
CMAKE
    cat >"$fake/share/cmake/$1/$1ConfigVersion.cmake" <<CMAKE
set(PACKAGE_VERSION $3)
string(REGEX MATCH "^[0-9]+" major $3)
if(PACKAGE_FIND_VERSION VERSION_LESS_EQUAL PACKAGE_VERSION AND PACKAGE_FIND_VERSION_MAJOR STREQUAL major)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
else()
  set(PACKAGE_VERSION_COMPATIBLE FALSE)
endif()
CMAKE
    printf 'Name: %s\nDescription: made up\nVersion: %s\n' "$1" "$3" >"$fake/share/pkgconfig/$4.pc"
}

# try WANTED EIGEN XSIMD: whether both build systems take these versions, `yes` or `no`.
try() {
    fake=$work/eigen-$2-xsimd-$3
    mkdir -p "$fake/include"
    package Eigen3 Eigen3::Eigen "$2" eigen3
    package xsimd xsimd "$3" xsimd
    by_cmake=no by_pkg_config=no
    if cmake -S "$work/consumer" -B "$fake/build" -DEigen3_DIR="$fake/share/cmake/Eigen3" -Dxsimd_DIR="$fake/share/cmake/xsimd" \
        -DCMAKE_PREFIX_PATH="$work/prefix" >"$fake/log" 2>&1; then
        by_cmake=yes
    elif ! grep -q 'colt5 needs' "$fake/log"; then
        by_cmake='failed otherwise'
    fi
    if PKG_CONFIG_PATH="$work/prefix/share/pkgconfig:$fake/share/pkgconfig" pkg-config --exists colt5; then by_pkg_config=yes; fi
    echo "Eigen $2, xsimd $3: CMake $by_cmake, pkg-config $by_pkg_config, wanted $1"
    if [ "$by_cmake" = "$1" ] && [ "$by_pkg_config" = "$1" ]; then return 0; fi
    cat "$fake/log"
    exit 1
}
try no 3.3.9 8.1.0
try yes 3.4.0 8.1.0
try yes 3.4.90 14.3.0
try yes 5.0.1 14.3.0
try no 6.0.0 14.3.0
try no 3.4.0 8.0.5
