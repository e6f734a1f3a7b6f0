# SPDX-License-Identifier: MIT
"""reader_path.py [BACKEND...]: lists the files of include/colt5 with code that runs in ConditionalRoutedFeedForward::forward.

A tool for developers: needs g++ and gcov, for `cuda` nvcc as well, and no GPU. BACKEND is `cpu` or `cuda`; default: both.
The call is `forward(tokens)` of a module with default options, 100 tokens, 8 of them heavy. What runs before, such as constructors,
does not count. A file counts with

- a line of the host that gcov has seen run, without optimization; on CUDA the runtime and cuBLASLt are replaced by functions that do
  nothing and succeed, the way a device of compute capability 9.0a with enough memory does;
- on CUDA, in bfloat16, a line in the PTX of a kernel that was launched (.loc, inlined functions included), whether or not these
  numbers reach it. Kernels that are compiled and not launched do not count.

Constants, types and checks at compile time do not count. With `mask`, the call has a mask (b, n), too.
On CUDA the list is made for a dimension of 64, and for 512, where the light branch is one fused kernel.
"""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

INCLUDE = pathlib.Path(__file__).resolve().parent.parent / 'include'

PROGRAM = '''
#include <colt5/HEADER>
#include <cstdio>
#include <cstdlib>
extern "C" void __gcov_reset();
extern "C" void __gcov_dump();
bool listing = false;
int main() {
    using namespace colt5;
    constexpr FeedForwardConfig config{.dim = DIM, .num_heavy_tokens = 8};
    const POLICY policy;
    const ConditionalRoutedFeedForward<config, SCALAR, POLICY> module(policy);
    SCALAR numbers[100 * DIM];
    bool real[100];
    for (int i = 0; i < 100 * DIM; ++i) numbers[i] = static_cast<SCALAR>(static_cast<float>(i % 17));
    for (int i = 0; i < 100; ++i) real[i] = i % 3 != 0;
    const auto tokens = from_host<Tensor<SCALAR, POLICY, dynamic, dynamic, DIM>>(policy, {1, 100, DIM}, numbers);
    const auto mask = from_host<Tensor<bool, POLICY, dynamic, dynamic>>(policy, {1, 100}, real);
    listing = true;
    __gcov_reset();
    const auto saved = module.forward(tokens MASK);
    __gcov_dump();
    std::fflush(nullptr);
    std::_Exit(0);
}
'''

# What the runtime answers; every other function of it returns 0.
RUNTIME = r'''
#include <cublasLt.h>
#include <cuda_runtime.h>
#include <cstdio>
#include <cstring>
#include <map>
extern bool listing;
static std::map<const void*, const char*>& names() { static std::map<const void*, const char*> of; return of; }
static cudaError_t launched(const void* kernel) { return listing ? std::puts(names()[kernel]) : 0, cudaSuccess; }
static int nothing() { return 0; }
static int granularity(std::size_t* bytes) { return *bytes = 1 << 21, 0; }
static int reserve(unsigned long long* address) { return *address = 1ull << 40, 0; }
extern "C" {
void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) { names()[host] = name; }
cudaError_t __cudaGetKernel(cudaKernel_t* to, const void* host) { return *to = (cudaKernel_t)host, cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, std::size_t, cudaStream_t) { return launched(kernel); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) { return launched(kernel); }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) { return *free = *total = std::size_t{1} << 36, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* to, cudaDeviceAttr which, int) { return *to = which == cudaDevAttrMultiProcessorCount ? 132 : 227 << 10, cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* to, const void*) { return *to = {}, to->maxThreadsPerBlock = 1024, to->ptxVersion = 90, cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** to, unsigned, unsigned long long, cudaDriverEntryPointQueryResult*) {
    *to = (void*)(std::strcmp(name, "cuMemGetAllocationGranularity") == 0 ? (void*)granularity : std::strcmp(name, "cuMemAddressReserve") == 0 ? (void*)reserve : (void*)nothing);
    return cudaSuccess;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t*, int* found) { return *found = 1, CUBLAS_STATUS_SUCCESS; }
}
'''


def run(*command, **options):
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def ours(path):
    return path.split('include/colt5/')[1] if 'include/colt5/' in path else None


def lines_of_host(folder):
    data = next(folder.glob('*.gcda'))
    files = json.loads(run('gcov', '--json-format', '--stdout', data.name, cwd=folder))['files']
    return {ours(f['file']) for f in files if any(line['count'] for line in f['lines'])} - {None}


def lines_of_kernels(ptx, kernels):
    """The files of the .loc lines in the bodies of kernels, and in the functions that these call."""
    ptx = re.sub(r'// begin inline asm.*?// end inline asm', '', ptx, flags=re.S)  # its braces are not those of bodies
    names = {number: ours(path) for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.M)}
    bodies = {name: (kind, body) for kind, name, body in
              re.findall(r'^[. \w]*\.(entry|func)[^\n]*?\b(_Z\w+)\(?$(.*?)^\}', ptx, re.M | re.S)}
    found, left = set(), list(kernels)
    for name in left:
        body = bodies[name][1]
        found |= {names[number] for number in re.findall(r'^\s*\.loc\s+(\d+) [1-9]', body, re.M)}
        left += {other for other in re.findall(r'\b_Z\w+', body) if bodies.get(other, '?')[0] == 'func'} - set(left)
    return found - {None}


def cpu(folder, text):
    text = text.replace('HEADER', 'colt5.hpp').replace('POLICY', 'Cpu').replace('SCALAR', 'float')
    (folder / 'call.cpp').write_text(text)
    run('g++', '-std=c++20', '-O0', '--coverage', '-march=native', '-fopenmp', '-I', INCLUDE, '-isystem', '/usr/include/eigen3',
        'call.cpp', '-o', 'call', cwd=folder)
    run(folder / 'call', cwd=folder)
    return lines_of_host(folder)


def cuda(folder, text):
    text = text.replace('HEADER', 'cuda.cuh').replace('POLICY', 'Cuda').replace('SCALAR', 'bfloat16')
    (folder / 'call.cu').write_text(text)
    (folder / 'runtime.cpp').write_text(RUNTIME)
    run('nvcc', '-std=c++20', '--expt-relaxed-constexpr', '-gencode=arch=compute_90a,code=compute_90a', '-lineinfo', '-keep',
        '-Xcompiler', '--coverage,-O0', '-I', INCLUDE, '-c', 'call.cu', '-o', 'call.o', cwd=folder)
    run('nvcc', '-std=c++20', '-c', 'runtime.cpp', '-o', 'runtime.o', cwd=folder)
    symbols = [set(re.findall(r'\b(?:__cuda|cuda|cublas)\w+', run('nm', *kind, cwd=folder)))
               for kind in (('-u', 'call.o'), ('--defined-only', 'runtime.o'))]
    (folder / 'rest.c').write_text(''.join(f'long {name}() {{ return 0; }}\n' for name in symbols[0] - symbols[1]))
    run('gcc', '-w', '-c', 'rest.c', cwd=folder)
    run('g++', '--coverage', 'call.o', 'runtime.o', 'rest.o', '-o', 'call', cwd=folder)
    launched = run(folder / 'call', cwd=folder).split()
    return lines_of_host(folder) | lines_of_kernels((folder / 'call.ptx').read_text(), launched)


if __name__ == '__main__':
    words = sys.argv[1:]
    for backend, dim in (('cpu', 64), ('cuda', 64), ('cuda', 512)):
        if backend in words or not set(words) - {'mask'}:
            with tempfile.TemporaryDirectory() as scratch:
                text = PROGRAM.replace('DIM', str(dim)).replace('MASK', ', mask' if 'mask' in words else '')
                files = sorted({'cpu': cpu, 'cuda': cuda}[backend](pathlib.Path(scratch), text))
            print(f'{backend}, dimension {dim}: {len(files)} files', *files, sep='\n    ')
