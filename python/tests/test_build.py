# SPDX-License-Identifier: MIT
"""Compiling and keeping libraries."""
import os
import pathlib
import shutil
import subprocess
import sys

import colt5
import pytest
import torch
from colt5 import build, library

PROGRAM = '''
import sys, torch, colt5
dim = int(sys.argv[1])
module = colt5.ConditionalRoutedFeedForward(dim, num_heavy_tokens=2)
print(module(torch.ones(1, 4, dim)).shape)
'''


def start(cache, dim=8, **environment):
    return subprocess.Popen([sys.executable, '-c', PROGRAM, str(dim)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, 'COLT5_CACHE': str(cache), 'COLT5_CXXFLAGS': '-O0', **environment})


def test_processes_at_once_compile_once(tmp_path):
    log, compiler = tmp_path / 'log', tmp_path / 'g++'
    compiler.write_text(f'#!/bin/sh\necho "$*" >>{log}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    dims = 8, 8, 16
    processes = [start(tmp_path, dim, CXX=str(compiler)) for dim in dims]
    outputs = [process.communicate() for process in processes]
    assert all(f'torch.Size([1, 4, {dim}])' in out for dim, (out, _) in zip(dims, outputs)), outputs
    said = ''.join(error for _, error in outputs)
    assert said.count('colt5: compiling ConditionalRoutedFeedForward (float, CPU) ...') == 2
    compiled = [line for line in log.read_text().splitlines() if ' -c ' in line and 'source.cpp' in line]
    assert len(compiled) == 3 and sum('-DCOLT5_DECLARE_KERNELS' in line for line in compiled) == 2, compiled
    assert len(list(tmp_path.glob('*.so'))) == 2 and len(list(tmp_path.glob('*.o'))) == 1
    assert not list(tmp_path.glob('build-*'))
    out, error = start(tmp_path, CXX=str(compiler)).communicate()
    assert 'torch.Size' in out and 'compiling' not in error


@pytest.mark.parametrize('environment, wanted', [
    ({'CXX': '/nowhere/g++'}, 'BuildError: colt5: there is no C++ compiler (/nowhere/g++): install g++ 12 or clang 16, or newer'),
    ({'CXX': 'false'}, 'BuildError: colt5: false could not compile ConditionalRoutedFeedForward (float, CPU)'),
])
def test_a_machine_without_a_compiler(tmp_path, environment, wanted):
    out, error = start(tmp_path, **environment).communicate()
    assert wanted in error.splitlines()[-1] or wanted in error, error
    assert not list(tmp_path.glob('*.so'))


NVCC = shutil.which('nvcc') or shutil.which('/usr/local/cuda/bin/nvcc')


def test_a_machine_without_nvcc(monkeypatch):
    monkeypatch.setenv('NVCC', '/nowhere/nvcc')
    with pytest.raises(colt5.BuildError, match='^colt5: there is no nvcc: tensors on a GPU need the CUDA toolkit, 12.5 or newer$'):
        build.load('', ['float'], 'a module', '90')


def source_for_a_gpu(dim):
    module = colt5.ConditionalRoutedFeedForward(dim, num_heavy_tokens=2)
    return library.source_of(library.spec_of(module._key), torch.float32, torch.device('cuda'))


@pytest.mark.skipif(not NVCC, reason='there is no nvcc')
def test_modules_for_a_gpu_want_kernels_only(tmp_path, monkeypatch):
    monkeypatch.setenv('NVCC', NVCC)
    build.compile_object(build.cuda_tools('90a').module, source_for_a_gpu(32), '.cpp', 'a module', tmp_path / 'module.o')
    names = subprocess.run(['nm', '-C', '--undefined-only', str(tmp_path / 'module.o')], capture_output=True, text=True).stdout
    wanted = [line for line in names.splitlines() if 'colt5::' in line]
    assert len(wanted) > 5 and all('_kernel<' in line or 'make_matmul_plans' in line for line in wanted), wanted


@pytest.mark.skipif(not NVCC or bool(os.environ.get('COLT5_QUICK')), reason='nvcc takes minutes')
def test_kernels_for_a_gpu_are_compiled_once(tmp_path, monkeypatch):
    nvcc = tmp_path / 'nvcc'
    fast = '-Ofc=max' if '--Ofast-compile' in build.output_of(NVCC, '--help') else ''  # what is compiled does not run
    nvcc.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/log\nexec {NVCC} "$@" {fast}\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv('COLT5_CACHE', str(tmp_path))
    monkeypatch.setenv('NVCC', str(nvcc))
    build.cuda_tools.cache_clear()  # which an earlier test may have asked for
    for dim in 32, 48:
        build.compile_library(build.cuda_tools('90a'), source_for_a_gpu(dim), ['float'], 'a module', tmp_path / f'{dim}.so')
    build.cuda_tools.cache_clear()
    assert sum('source.cu' in line for line in (tmp_path / 'log').read_text().splitlines()) == 1


def test_the_installed_package_has_its_headers():
    folder = pathlib.Path(colt5.__file__).parent
    if 'site-packages' in str(folder):
        assert (folder / 'include' / 'colt5' / 'colt5.hpp').exists()
