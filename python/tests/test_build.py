# SPDX-License-Identifier: MIT
"""Compiling and keeping libraries."""
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = '''
import sys, torch, colt5
module = colt5.ConditionalRoutedFeedForward(8, num_heavy_tokens=2)
print(module(torch.ones(1, 4, 8)).shape)
'''


def start(cache, **environment):
    return subprocess.Popen([sys.executable, '-c', PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, 'COLT5_CACHE': str(cache), 'COLT5_CXXFLAGS': '-O0', **environment})


def test_processes_at_once_compile_once(tmp_path):
    processes = [start(tmp_path) for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert all('torch.Size([1, 4, 8])' in out for out, _ in outputs), outputs
    said = ''.join(error for _, error in outputs)
    assert said.count('colt5: compiling ConditionalRoutedFeedForward (float, CPU) ...') == 1
    assert len(list(tmp_path.glob('*.so'))) == 1
    assert not list(tmp_path.glob('build-*'))
    out, error = start(tmp_path).communicate()
    assert 'torch.Size' in out and 'compiling' not in error


@pytest.mark.parametrize('environment, wanted', [
    ({'CXX': '/nowhere/g++'}, 'BuildError: colt5: there is no C++ compiler (/nowhere/g++): install g++ 12 or clang 16, or newer'),
    ({'CXX': 'false'}, 'BuildError: colt5: false could not compile ConditionalRoutedFeedForward (float, CPU)'),
])
def test_a_machine_without_a_compiler(tmp_path, environment, wanted):
    out, error = start(tmp_path, **environment).communicate()
    assert wanted in error.splitlines()[-1] or wanted in error, error
    assert not list(tmp_path.glob('*.so'))


def test_the_installed_package_has_its_headers():
    import colt5
    folder = pathlib.Path(colt5.__file__).parent
    if 'site-packages' in str(folder):
        assert (folder / 'include' / 'colt5' / 'colt5.hpp').exists()
