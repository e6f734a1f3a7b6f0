# SPDX-License-Identifier: MIT
"""Compiles generated C++ files into libraries, and keeps them.

A library is found again by a hash of its source, the headers, the compiler with its version, the processor as the
compiler sees it, and the flags. Processes that want the same one at the same time wait for the first of them, by a lock
on a file; a library appears under its name as a whole or not at all.

Environment: COLT5_CACHE (folder of the libraries; default ~/.cache/colt5), CXX and NVCC (compilers), COLT5_CXXFLAGS (more
flags), COLT5_INCLUDE_PATH (folders with Eigen and xsimd), COLT5_GPU_ARCHITECTURES (such as 90a;80; default: that of the
device), COLT5_QUIET=1 (no line of progress).
"""
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time

from .errors import BuildError

PACKAGE = pathlib.Path(__file__).resolve().parent


def load(source, title, architecture=None):
    """The library of a source, compiled if there is none yet. `architecture` is that of a GPU, for sources of CUDA."""
    compiler = cuda_compiler(architecture) if architecture else host_compiler()
    digest = hashlib.sha256('\0'.join((source, headers_digest(), *compiler)).encode()).hexdigest()[:32]
    library = cache_folder() / f'{digest}.so'
    if not library.exists():
        with locked(cache_folder() / f'{digest}.lock'):
            if not library.exists():
                compile_library(source, compiler, title, library, '.cu' if architecture else '.cpp')
    return ctypes.CDLL(str(library), mode=os.RTLD_LOCAL | os.RTLD_NOW)


def cache_folder():
    folder = os.environ.get('COLT5_CACHE')
    if not folder:
        folder = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'colt5')
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    return pathlib.Path(folder)


@contextlib.contextmanager
def locked(path):
    """The system gives the lock back when the process ends, however it does."""
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_library(source, compiler, title, library, suffix):
    command = [argument for argument in compiler if not argument.startswith('#')]
    quiet = os.environ.get('COLT5_QUIET') == '1'
    start = time.monotonic()
    if not quiet:
        print(f'colt5: compiling {title} ...', end='', file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix='build-', dir=library.parent) as folder:
        file, result = pathlib.Path(folder, 'module' + suffix), pathlib.Path(folder, 'module.so')
        file.write_text(source)
        done = subprocess.run([*command, str(file), '-o', str(result), *link_flags(suffix)], capture_output=True, text=True)
        if not quiet:
            print(f' {time.monotonic() - start:.0f} s' if done.returncode == 0 else ' failed', file=sys.stderr, flush=True)
        if done.returncode != 0:
            raise BuildError(f'colt5: {command[0]} could not compile {title}: {reason(done.stderr)}')
        os.replace(result, library)


def reason(said):
    """What the compiler said of a wrong configuration in one line, or else the end of what it said."""
    for line in said.splitlines():
        at = line.find('colt5: ')
        if at >= 0 and 'error' in line:
            return line[at:]
    return '\n' + said[-4000:]


@functools.lru_cache(maxsize=None)
def headers():
    """Those of the package, or of the checkout that it is part of."""
    for folder in PACKAGE / 'include', PACKAGE.parent.parent / 'include':
        if (folder / 'colt5' / 'colt5.hpp').exists():
            return folder
    raise BuildError('colt5: the package has no C++ headers: install it again with `pip install ./python`')


@functools.lru_cache(maxsize=None)
def headers_digest():
    digest = hashlib.sha256((PACKAGE / 'bridge.hpp').read_bytes())
    for path in sorted(headers().rglob('*')):
        if path.is_file():
            digest.update(str(path.relative_to(headers())).encode() + b'\0' + path.read_bytes())
    return digest.hexdigest()


def output_of(*command):
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


@functools.lru_cache(maxsize=None)
def host_compiler():
    """The command, and behind it arguments with # that tell compilers and processors apart."""
    wanted = [os.environ['CXX']] if os.environ.get('CXX') else ['g++', 'clang++']
    found = [words for words in map(shlex.split, wanted) if words and shutil.which(words[0])]
    if not found:
        raise BuildError(f'colt5: there is no C++ compiler ({" or ".join(wanted)}): install g++ 12 or clang 16, or newer, '
                         'and Eigen and xsimd (Debian: apt-get install g++ libeigen3-dev libxsimd-dev)')
    flags = ['-std=c++20', '-O2', '-march=native', '-fPIC', '-shared', '-fvisibility=hidden', '-w', *include_flags()]
    flags += ['-fopenmp'] if takes_openmp(tuple(found[0])) else []
    flags += shlex.split(os.environ.get('COLT5_CXXFLAGS', ''))
    seen = output_of(*found[0], '-march=native', '-###', '-E', '-x', 'c++', os.devnull)  # -march=native written out
    return *found[0], *flags, '#' + output_of(*found[0], '--version'), '#' + seen


def takes_openmp(command):
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, 'openmp.cpp')
        file.write_text('#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n')
        return subprocess.run([*command, '-fopenmp', '-shared', '-fPIC', str(file), '-o', os.path.join(folder, 'openmp.so')],
                              capture_output=True).returncode == 0


def include_flags():
    """Folders with our headers, and those of Eigen and xsimd where they do not stand in the compiler's own."""
    given = os.environ.get('COLT5_INCLUDE_PATH', '').split(os.pathsep)
    prefixes = [path for path in (*given, os.path.join(sys.prefix, 'include'), '/usr/local/include', '/usr/include',
                                  sysconfig.get_path('include')) if path]
    flags = ['-I' + str(headers()), '-I' + str(PACKAGE)]
    for name, header, folders in (('Eigen', 'Eigen/Core', ('', 'eigen3')), ('xsimd', 'xsimd/xsimd.hpp', ('',))):
        places = [os.path.join(prefix, folder) for prefix in prefixes for folder in folders]
        place = next((place for place in places if os.path.exists(os.path.join(place, header))), None)
        if place is None:
            raise BuildError(f'colt5: there is no {name}: install it (Debian: apt-get install libeigen3-dev libxsimd-dev), or '
                             f'say in COLT5_INCLUDE_PATH where {header} is')
        if place.rstrip('/') != '/usr/include':
            flags += ['-isystem', place.rstrip('/')]
    return flags


@functools.lru_cache(maxsize=None)
def cuda_compiler(architecture):
    nvcc = os.environ.get('NVCC') or shutil.which('nvcc') or '/usr/local/cuda/bin/nvcc'
    if not shutil.which(nvcc):
        raise BuildError('colt5: there is no nvcc: tensors on a GPU need the CUDA toolkit, 12.5 or newer')
    flags = ['-std=c++20', '-O3', '--expt-relaxed-constexpr', '-shared', '-Xcompiler', '-fPIC,-fvisibility=hidden,-w', '-w']
    flags += ['-I' + str(headers()), '-I' + str(PACKAGE)]
    for name in os.environ.get('COLT5_GPU_ARCHITECTURES', architecture).split(';'):
        flags.append(f'-gencode=arch=compute_{name},code=sm_{name}')
    return nvcc, *flags, '#' + output_of(nvcc, '--version')


def link_flags(suffix):
    return ['-lcublasLt'] if suffix == '.cu' else []
