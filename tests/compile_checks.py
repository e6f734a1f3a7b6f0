# SPDX-License-Identifier: MIT
"""Compiles sources, for what the compiler says; reports in the Test Anything Protocol.

compile_checks.py headers BUILD INCLUDE FOLDER COMPILER...   each header of INCLUDE/colt5/FOLDER compiles alone, without
                                                             warnings, behind macros of others
compile_checks.py all_headers BUILD INCLUDE COMPILER...      a program of all headers compiles behind macros of others, without
                                                             warnings
compile_checks.py compile_fail BUILD FOLDER COMPILER...      each source fails with the TEXT of its lines `// expect: TEXT`
                                                             (`// expect 2: TEXT`: in case 2), its first error with that of
                                                             `// first: TEXT`, and compiles with COLT5_COMPILE_FAIL_CONTROL
                                                             defined; `// flags: FLAG…` is for the wrong program only
compile_checks.py strict BUILD INCLUDE SOURCE COMPILER...     the program compiles without warnings at -O0 to -O3 with -I, and
                                                             at -O3 with -isystem, which does not silence all of them
compile_checks.py kernels INCLUDE                            no kernel is for any policy, and of a backend each is in one header
compile_checks.py symbols BUILD SOURCE COMPILER...           with COLT5_WHOLE_BACKEND defined, the source has the same symbols
compile_checks.py cuda INCLUDE NVCC FOLDER...                nvcc compiles the headers of each FOLDER, without Eigen and xsimd
compile_checks.py cuda_headers INCLUDE NVCC                  nvcc parses each header of the CUDA backend alone, without warnings

The flags of the first three are those with which BUILD compiles the link test.
"""
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile


def flags(build):
    commands = json.loads((pathlib.Path(build) / 'compile_commands.json').read_text())
    command = next(c for c in commands if c['file'].endswith('tests/link/one.cpp'))
    words = iter(shlex.split(command['command']))
    kept = []
    for word in words:
        if word in ('-o', '-MF', '-MQ', '-MT'):
            next(words)
        elif word.startswith('-') and word not in ('-c', '-MD', '-MMD', '-fdiagnostics-color=always') and not word.startswith('-O'):
            kept.append(word)
    return kept


def compile(compiler, build, *arguments, text=None):
    # xsimd 8.1 does not compile for AVX-512 without an -O; nothing is optimized here.
    command = [*compiler, *flags(build), '-O1', '-fsyntax-only', '-x', 'c++', *arguments]
    result = subprocess.run(command, cwd=build, input=text, capture_output=True, text=True)
    return result.returncode == 0, result.stdout + result.stderr


def precompiled(compiler, build, scratch):
    """The flags with which a program that begins with <colt5/colt5.hpp> compiles in half the time."""
    header = pathlib.Path(scratch) / 'colt5.hpp'
    header.write_text('#include <colt5/colt5.hpp>\n')
    command = [*compiler, *flags(build), '-O1', '-x', 'c++-header', header, '-o', f'{header}.gch']
    return ['-include', str(header)] if subprocess.run(command, cwd=build, capture_output=True).returncode == 0 else []


def report(number, name, good, output):
    print(f'{"ok" if good else "not ok"} {number} - {name}', flush=True)
    if not good:
        print(*('# ' + line for line in output.splitlines()[:40]), sep='\n', flush=True)


def headers_of(include, folder):
    return sorted(str(path.relative_to(include)) for path in (pathlib.Path(include) / 'colt5' / folder).glob('*.hpp'))


# Of Windows' headers and <complex.h>
macros_of_others = '''#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define small char
#define near
#define far
#define I (__extension__ 1.0iF)
'''


def headers(build, include, folder, *compiler):
    names = headers_of(include, folder)
    print(f'1..{len(names)}')
    for number, name in enumerate(names, 1):
        good, output = compile(compiler, build, '-Werror', '-Wno-unknown-warning-option', '-', text=f'{macros_of_others}#include <{name}>\n#include <{name}>\n')
        report(number, name, good, output)


def all_headers(build, include, *compiler):
    print('1..1')
    includes = ''.join(f'#include <{path.relative_to(include)}>\n' for path in sorted((pathlib.Path(include) / 'colt5').rglob('*.hpp')))
    report(1, 'all headers', *compile(compiler, build, '-Werror', '-Wno-unknown-warning-option', '-', text=macros_of_others + includes))


def compile_fail(build, folder, *compiler):
    with tempfile.TemporaryDirectory() as scratch:
        check_programs(build, folder, compiler, precompiled(compiler, build, scratch))


def check_programs(build, folder, compiler, with_header):
    programs = []  # name, flags, what is expected, and of the first error; the right program expects nothing
    for path in sorted(pathlib.Path(folder).glob('*.cpp')):
        said = lambda what: re.findall(f'^// {what}: (.+)$', path.read_text(), re.MULTILINE)
        flags_of_wrong = ' '.join(said('flags')).split()
        header = with_header if '#include "wrong.hpp"' in path.read_text() and not flags_of_wrong else []
        cases = [(f'{path.stem}, case {i}', [f'-DCOLT5_CASE={i}'], said(f'expect {i}')) for i in range(1, int(*said('cases')) + 1)]
        for name, flag, of_case in cases or [(path.stem, [], [])]:
            programs.append((name, [*header, *flags_of_wrong, *flag, str(path)], said('expect') + of_case, said('first')))
        programs.append((f'{path.stem}, the right program', [*header, '-DCOLT5_COMPILE_FAIL_CONTROL', str(path)], None, []))
    print(f'1..{len(programs)}')
    for number, (name, arguments, expected, first) in enumerate(programs, 1):
        compiled, output = compile(compiler, build, *arguments)
        if expected is None:
            report(number, name, compiled, output)
        else:
            first_error = next((line for line in output.splitlines() if 'error: ' in line), '')
            missing = [text for text in expected if text not in output] + [text for text in first if text not in first_error]
            report(number, name, (expected or first) and not compiled and not missing,
                   'it compiled' if compiled else 'missing: ' + '\n'.join([*missing, output]))


def strict(build, include, source, *compiler):
    others = [word for word in flags(build) if word.startswith(('-isystem', '-fopenmp'))]
    warnings = ['-Wall', '-Wextra', '-Wconversion', '-Wsign-conversion', '-Wshadow', '-Werror']
    ways = [('-O0', '-I'), ('-O1', '-I'), ('-O2', '-I'), ('-O3', '-I'), ('-O3', '-isystem')]
    print(f'1..{len(ways)}')
    for number, (level, way) in enumerate(ways, 1):
        command = [*compiler, '-std=c++20', *warnings, *others, level, way, include, '-c', source, '-o', os.devnull]
        result = subprocess.run(command, cwd=build, capture_output=True, text=True)
        report(number, f'{level} {way}', result.returncode == 0, result.stderr)


def kernels(include):
    root = pathlib.Path(include) / 'colt5'
    kernel = re.compile(r'^(?:inline )?(?:void|bool|double|auto) (\w+_kernel)\(const (\w+)&[^,)]*(, \.\.\.)?', re.MULTILINE)
    found = [(path, *match) for path in sorted(root.rglob('*.[hc]*')) if not path.stem.startswith('declared') for match in kernel.findall(path.read_text())]
    names = sorted({name for _, name, _, _ in found})
    print(f'1..{len(names)}')
    for number, name in enumerate(names, 1):
        wrong, homes = [], {'Cpu': set(), 'Cuda': set()}
        for path, of, policy, rest in found:
            if of == name and policy in homes:
                homes[policy].add(path)
            elif of == name and not (rest and f'no `{name.removesuffix("_kernel")}` kernel for this policy' in path.read_text()):
                wrong.append(f'{path} has one for any policy')
        for policy, backend in ('Cpu', 'cpu.hpp'), ('Cuda', 'cuda.cuh'):
            included = (root / backend).read_text()
            if len(homes[policy]) > 1 or (policy == 'Cpu' and not homes[policy]):
                wrong.append(f'for {policy} it is in {sorted(map(str, homes[policy]))}')
            wrong += [f'{backend} does not include {path}' for path in homes[policy] if f'<{path.relative_to(include)}>' not in included]
        report(number, name, not wrong, '\n'.join(wrong))


def symbols(build, source, *compiler):
    print('1..1')
    ways, output = [], ''
    with tempfile.TemporaryDirectory() as scratch:
        for define in '-UCOLT5_WHOLE_BACKEND', '-DCOLT5_WHOLE_BACKEND':
            program = str(pathlib.Path(scratch) / 'program.o')
            result = subprocess.run([*compiler, *flags(build), '-O1', define, '-c', source, '-o', program], cwd=build, capture_output=True, text=True)
            output += result.stdout + result.stderr
            if result.returncode == 0:
                named = subprocess.run(['nm', '--format=posix', program], capture_output=True, text=True, check=True).stdout
                ways.append({line.split()[0] for line in named.splitlines() if 'colt5' in line})
    good = len(ways) == 2 and len(ways[0]) > 0 and ways[0] == ways[1]
    report(1, 'single headers and the whole backend', good, output if len(ways) < 2 else '\n'.join(sorted(ways[0] ^ ways[1])))


def cuda(include, nvcc, *folders):
    print(f'1..{len(folders)}')
    with tempfile.TemporaryDirectory() as scratch:
        source = pathlib.Path(scratch) / 'headers.cu'
        for number, folder in enumerate(folders, 1):
            source.write_text(''.join(f'#include <{name}>\n' for name in headers_of(include, folder)))
            command = [nvcc, '-std=c++20', '--expt-relaxed-constexpr', '-I', include, '-c', source, '-o', source.with_suffix('.o')]
            result = subprocess.run(command, capture_output=True, text=True)
            report(number, folder, result.returncode == 0 and 'warning' not in result.stderr, result.stdout + result.stderr)


def cuda_headers(include, nvcc):
    # kernels.cuh compiles all kernels, which takes minutes: tests/cuda/once does that.
    names = sorted(str(path.relative_to(include)) for path in pathlib.Path(include).rglob('*.cuh') if path.name != 'kernels.cuh')
    print(f'1..{len(names)}')
    with tempfile.TemporaryDirectory() as scratch:
        source = pathlib.Path(scratch) / 'header.cu'
        for number, name in enumerate(names, 1):
            source.write_text(f'#include <{name}>\n#include <{name}>\n')
            # The device's side alone: it parses what the host's side does, and nothing calls a template.
            command = [nvcc, '-std=c++20', '--expt-relaxed-constexpr', '-arch=compute_90a', '-ptx', '-I', include, source, '-o', os.devnull]
            result = subprocess.run(command, capture_output=True, text=True)
            report(number, name, result.returncode == 0 and 'warning' not in result.stderr, result.stdout + result.stderr)


if __name__ == '__main__':
    check, *arguments = sys.argv[1:]
    {'headers': headers, 'all_headers': all_headers, 'compile_fail': compile_fail, 'strict': strict, 'cuda': cuda, 'kernels': kernels, 'symbols': symbols,
     'cuda_headers': cuda_headers}[check](*arguments)
