// SPDX-License-Identifier: MIT
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#ifdef __clang__
/// Clang's OpenMP keeps memory for teams of threads, which LeakSanitizer would report. Of an allocation only its caller
/// is recorded, so that this leaves out what OpenMP itself allocates, and not what its threads do when they run our
/// code. ASAN_OPTIONS=malloc_context_size=30 shows more of the callers.
extern "C" const char* __asan_default_options();
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __asan_default_options() {
    return "malloc_context_size=2";
}
extern "C" const char* __lsan_default_suppressions() {
    return "leak:libomp.so";
}
#endif
