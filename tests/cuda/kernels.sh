#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# kernels.sh OBJECT...: whether every kernel that the host code of an object can launch is in its device code. nvcc 13.0
# leaves out a kernel whose template it instantiates for the host alone, and says nothing; to launch it is an "invalid
# device function". Needs nm, and cuobjdump of the CUDA Toolkit.
set -euo pipefail
export LC_ALL=C
code=0
# Where its condition is false, nvcc 13.0 drops not only the loop, but all that follows in the function.
if grep -n -A1 -E '^ *(\} )?(if constexpr .*\)|else)$' "$(dirname "$0")"/../../include/colt5/cuda/{,attention/,attention/sliding/}*.cuh | grep '#pragma'; then
    echo '`if constexpr` needs braces around a #pragma' >&2
    code=1
fi
if ! command -v cuobjdump >/dev/null; then
    echo 'skipped: there is no cuobjdump' >&2
    exit $code
fi
for object; do
    # The host's stub of a kernel template has the kernel's name, but is static, which adds an L to one part of it.
    missing=$(comm -23 \
        <(nm "$object" | sed -nE 's/.* [a-zA-Z] (_ZN5colt5.*4cuda)L([^ ]*)$/\1\2/p' | grep -v -e '\.cold$' -e __wrapper__device_stub | sort -u) \
        <(cuobjdump -symbols "$object" | grep -o '_ZN5colt5[^ ]*' | sort -u) | c++filt)
    [ -z "$missing" ] && continue
    printf '%s: no device code for\n%s\n' "$object" "$missing" >&2
    code=1
done
exit $code
