# SPDX-License-Identifier: MIT
"""Compiles generated C++ files into libraries, and keeps them.

A library is one module. It only declares the kernels; those of a scalar type are compiled once, into an object that all
libraries of this type are linked with. Both are found again by a hash of their source, the headers, the compiler with its
version, the processor as the compiler sees it, and the flags. Processes that want the same file at the same time wait for
the first of them, by a lock on a file; it appears under its name as a whole or not at all.

Environment: COLT5_CACHE (folder of these files; default ~/.cache/colt5), CXX and NVCC (compilers), COLT5_CXXFLAGS (more
flags), COLT5_INCLUDE_PATH (folders with Eigen and xsimd), COLT5_GPU_ARCHITECTURES (such as 90a;80; default: that of the
device), COLT5_QUIET=1 (no line of progress).
"""
import concurrent.futures
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
import typing

from .errors import BuildError

PACKAGE = pathlib.Path(__file__).resolve().parent


class Tools(typing.NamedTuple):
    """Commands, without the files: of modules, of kernels, and that of linking both."""
    module: list
    kernels: list
    link: list
    libraries: list  # behind the objects
    header: str  # of the kernels
    suffix: str  # of files that include it
    identity: str  # what tells compilers and processors apart, beside the commands

    def name(self, suffix, *parts):
        """Of the file that the cache keeps for what is made of these parts."""
        return hashlib.sha256('\0'.join((headers_digest(), self.identity, *parts)).encode()).hexdigest()[:32] + suffix


def load(source, scalars, title, architecture=''):
    """The library of a source, compiled if there is none yet, with the kernels of these scalar types. `architecture` is that
    of a GPU, for sources of CUDA."""
    tools = cuda_tools(architecture) if architecture else host_tools()
    parts = source, *scalars, *tools.module, *tools.kernels, *tools.link, *tools.libraries
    library = kept(tools.name('.so', *parts),
                   lambda result: compile_library(tools, source, scalars, title, result))
    return ctypes.CDLL(str(library), mode=os.RTLD_LOCAL | os.RTLD_NOW)


def compile_library(tools, source, scalars, title, result):
    """The module beside kernels that are not there yet: with two processors, the first module takes hardly longer."""
    kernels = [f'#define COLT5_KERNEL_SCALAR {scalar}\n#include <colt5/{tools.header}>\n' for scalar in scalars]
    of_kernels = [tools.name('.o', text, *tools.kernels) for text in kernels]
    first = not all((cache_folder() / name).exists() for name in of_kernels)
    start = time.monotonic()
    say(f'colt5: compiling {title} ...' + (' and, once for all modules, the kernels ...' if first else ''), end='')
    try:
        with concurrent.futures.ThreadPoolExecutor(len(kernels)) as pool:
            objects = [pool.submit(kept, name, functools.partial(compile_object, tools.kernels, text, tools.suffix,
                                                                 f'the kernels of {scalar}'))
                       for scalar, text, name in zip(scalars, kernels, of_kernels)]
            module = result.with_name('module.o')
            compile_object(tools.module, source, '.cpp', title, module)
            files = [module, *(object.result() for object in objects)]
        execute([*tools.link, *map(str, files), '-o', str(result), *tools.libraries], title)
    except BuildError:
        say(' failed')
        raise
    say(f' {time.monotonic() - start:.0f} s')


def compile_object(command, source, suffix, title, result):
    file = result.with_name('source' + suffix)
    file.write_text(source)
    execute([*command, '-c', str(file), '-o', str(result)], title)


def execute(command, title):
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise BuildError(f'colt5: {command[0]} could not compile {title}: {reason(done.stderr)}')


def say(text, end='\n'):
    if os.environ.get('COLT5_QUIET') != '1':
        print(text, end=end, file=sys.stderr, flush=True)


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


def kept(name, make):
    """The file of this name in the cache; if it is not there yet, make(path) writes it."""
    file = cache_folder() / name
    if not file.exists():
        with locked(file.with_suffix('.lock')):
            if not file.exists():
                with tempfile.TemporaryDirectory(prefix='build-', dir=file.parent) as folder:
                    make(pathlib.Path(folder, name))
                    os.replace(pathlib.Path(folder, name), file)
    return file


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
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.glob('*.hpp')):
        digest.update(path.read_bytes())
    for path in sorted(headers().rglob('*')):
        if path.is_file():
            digest.update(str(path.relative_to(headers())).encode() + b'\0' + path.read_bytes())
    return digest.hexdigest()


def output_of(*command):
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


@functools.lru_cache(maxsize=None)
def host_tools():
    wanted = [os.environ['CXX']] if os.environ.get('CXX') else ['g++', 'clang++']
    found = [words for words in map(shlex.split, wanted) if words and shutil.which(words[0])]
    if not found:
        raise BuildError(f'colt5: there is no C++ compiler ({" or ".join(wanted)}): install g++ 12 or clang 16, or newer, '
                         'and Eigen and xsimd (Debian: apt-get install g++ libeigen3-dev libxsimd-dev)')
    compiler = found[0]
    openmp = ['-fopenmp'] if takes_openmp(tuple(compiler)) else []
    flags = ['-std=c++20', '-march=native', '-fPIC', '-fvisibility=hidden', '-w', *include_flags(), *openmp,
             *shlex.split(os.environ.get('COLT5_CXXFLAGS', ''))]
    seen = output_of(*compiler, '-march=native', '-###', '-E', '-x', 'c++', os.devnull)  # -march=native written out
    # What takes time when it runs is in the kernels, so modules need not be optimized as much.
    return Tools([*compiler, '-O1', *flags, '-DCOLT5_DECLARE_KERNELS'], [*compiler, '-O2', *flags], [*compiler, *openmp, '-shared'], [],
                 'kernels.hpp', '.cpp', output_of(*compiler, '--version') + seen + dependencies()[1])


def takes_openmp(command):
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, 'openmp.cpp')
        file.write_text('#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n')
        return subprocess.run([*command, '-fopenmp', '-shared', '-fPIC', str(file), '-o', os.path.join(folder, 'openmp.so')],
                              capture_output=True).returncode == 0


@functools.lru_cache(maxsize=None)
def dependencies():
    """The folders with the headers of Eigen and xsimd, and a digest of the headers that say their versions."""
    given = os.environ.get('COLT5_INCLUDE_PATH', '').split(os.pathsep)
    prefixes = [path for path in (*given, os.path.join(sys.prefix, 'include'), '/usr/local/include', '/usr/include',
                                  sysconfig.get_path('include')) if path]
    found, digest = [], hashlib.sha256()
    for name, header, folders, versions in (
            ('Eigen', 'Eigen/Core', ('', 'eigen3'), ('Eigen/Version', 'Eigen/src/Core/util/Macros.h')),
            ('xsimd', 'xsimd/xsimd.hpp', ('',), ('xsimd/config/xsimd_config.hpp',))):
        places = [os.path.join(prefix, folder) for prefix in prefixes for folder in folders]
        place = next((place for place in places if os.path.exists(os.path.join(place, header))), None)
        if place is None:
            raise BuildError(f'colt5: there is no {name}: install it (Debian: apt-get install libeigen3-dev libxsimd-dev), or '
                             f'say in COLT5_INCLUDE_PATH where {header} is')
        found.append(place.rstrip('/'))
        for version in versions:  # not every version has each of them
            with contextlib.suppress(OSError):
                digest.update(pathlib.Path(place, version).read_bytes())
    return found, digest.hexdigest()


def include_flags():
    """Folders with our headers, and those of Eigen and xsimd where they do not stand in the compiler's own."""
    flags = ['-I' + str(headers()), '-I' + str(PACKAGE)]
    for place in dependencies()[0]:
        if place != '/usr/include':
            flags += ['-isystem', place]
    return flags


@functools.lru_cache(maxsize=None)
def cuda_tools(architecture):
    """nvcc has its host compiler compile modules, which hold no device code."""
    nvcc = os.environ.get('NVCC') or shutil.which('nvcc') or '/usr/local/cuda/bin/nvcc'
    if not shutil.which(nvcc):
        raise BuildError('colt5: there is no nvcc: tensors on a GPU need the CUDA toolkit, 12.5 or newer')
    flags = [nvcc, '-std=c++20', '-Xcompiler', '-fPIC,-fvisibility=hidden,-w', '-w', '-I' + str(headers()), '-I' + str(PACKAGE)]
    architectures = [f'-gencode=arch=compute_{name},code=sm_{name}'
                     for name in os.environ.get('COLT5_GPU_ARCHITECTURES', architecture).split(';')]
    return Tools([*flags, '-O2'], [*flags, '-O3', '--expt-relaxed-constexpr', *architectures], [nvcc, *architectures, '-shared'],
                 ['-lcublasLt'], 'kernels.cuh', '.cu', output_of(nvcc, '--version'))
