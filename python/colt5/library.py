# SPDX-License-Identifier: MIT
"""Compiled modules: the C interface of bridge.hpp by ctypes, on the memory of tensors."""
import ctypes
import functools
import struct

import torch

from . import build
from .errors import Error, ShapeError, shape_error, value_error

SCALARS = {torch.float32: 'float', torch.float64: 'double', torch.bfloat16: 'colt5::bfloat16', torch.float16: 'colt5::float16'}
ON_CPU = (torch.float32, torch.float64)
SOURCE = '''// Written by the Python package colt5.
#include <colt5/{header}>
namespace colt5_python {{
using Policy = colt5::{policy};
using ModuleOfCall = colt5::{module}<colt5::{config}, {scalar}, Policy>;
using CountsOfCall = colt5::{counts};
}}
#include "bridge.hpp"
'''


class Spec:
    """What is compiled: a module with its configuration. Two of the same `key` are one library."""

    def __init__(self, module, config, counts, num_inputs, draws_noise):
        """config: C++ text, such as FeedForwardConfig{.dim = 64, …}; counts: C++ type; draws_noise: by the Sinkhorn router"""
        self.key = '|'.join((module, config, counts, str(num_inputs), str(int(draws_noise))))
        self.module, self.config, self.counts = module, config, counts
        self.num_inputs, self.draws_noise = num_inputs, draws_noise


@functools.lru_cache(maxsize=None)
def spec_of(key):
    module, config, counts, num_inputs, draws_noise = key.split('|')
    return Spec(module, config, counts, int(num_inputs), draws_noise == '1')


def architecture_of(device):
    """Of a GPU, as nvcc names it; '' on the host."""
    if device.type == 'cpu':
        return ''
    major, minor = torch.cuda.get_device_capability(device)
    return f'{major}{minor}' + ('a' if major == 9 else '')


@functools.lru_cache(maxsize=None)
def library_of(key, dtype, device):
    """The library of a Spec's key for tensors of this type on this device."""
    if device.type not in ('cpu', 'cuda'):
        raise value_error('x.device', 'cpu or cuda', device)
    if dtype not in SCALARS or (device.type == 'cpu' and dtype not in ON_CPU):
        raise value_error('x.dtype', 'float32 or float64 on the CPU, on a GPU also bfloat16 or float16', dtype)
    return Library(spec_of(key), dtype, device)


def trailing(numbers):
    return numbers[len(numbers) - 1]


class Library:
    """Calls of one compiled module. Knows its parameters: names, and shapes, in the order in which calls take them."""

    def __init__(self, spec, dtype, device):
        self.spec, self.dtype, self.device = spec, dtype, device
        self.gradient_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        on_cpu = device.type == 'cpu'
        source = SOURCE.format(header='colt5.hpp' if on_cpu else 'cuda.cuh', policy='Cpu' if on_cpu else 'Cuda',
                               module=spec.module, config=spec.config, scalar=SCALARS[dtype], counts=spec.counts)
        title = f'{spec.module} ({SCALARS[dtype].removeprefix("colt5::")}, {"CPU" if on_cpu else "GPU"})'
        library = build.load(source, title, architecture_of(device))
        self._message = library.colt5_message
        self._message.restype = ctypes.c_char_p
        for name in 'parameters', 'forward', 'backward':
            function = getattr(library, 'colt5_' + name)
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
            setattr(self, '_' + name, function)
        self._as_tensor = library.colt5_as_tensor
        self._as_tensor.argtypes, self._as_tensor.restype = [ctypes.c_int64], ctypes.c_void_p
        self._release_memory = library.colt5_release_memory
        self._release_memory.argtypes, self._release_memory.restype = [], None

        self._call(self._parameters, self._place(device))
        lines = [line.split('\t') for line in self._message().decode().splitlines()]
        self.names = [name for name, _ in lines]
        self.shapes = [torch.Size(map(int, shape.split())) for _, shape in lines]
        # All gradients are in one tensor, each at a multiple of 64 numbers: sizes of gradients and of the gaps behind them.
        self.gradient_sizes = []
        for shape in self.shapes:
            self.gradient_sizes += [shape.numel(), -shape.numel() % 64]
        self.gradient_size = sum(self.gradient_sizes)
        self.dim = self._dim_of_tokens()

    def _dim_of_tokens(self):
        return next(trailing(shape) for name, shape in zip(self.names, self.shapes) if name.endswith('routing_token'))

    def forward(self, inputs, masks, counts, parameters, noise, save):
        """Returns the output and, with `save`, a tensor that stands for what backward reads, otherwise None. `noise`: of
        training, by this seed, or None for that of evaluation."""
        out = torch.empty_like(inputs[0])
        numbers = self._place(inputs[0].device)
        numbers += (save, 1, 0) if noise is None else (save, 0, noise)
        for x, mask in zip(inputs, masks):
            numbers += (x.data_ptr(), *x.shape, 0 if mask is None else mask.data_ptr())
        handle = self._call(self._forward, [*numbers, *counts, out.data_ptr(), *[p.data_ptr() for p in parameters]])
        return out, (tensor_of_handle(self._as_tensor(handle)) if save else None)

    def backward(self, saved, d_out, inputs, masks, parameters, keep):
        """Returns the gradients of the inputs, and those of the parameters as one tensor: see split_gradients."""
        d_inputs = [torch.empty_like(x) for x in inputs]
        gradients = torch.zeros(self.gradient_size, dtype=self.gradient_dtype, device=d_out.device)
        numbers = self._place(d_out.device)
        numbers += (saved.data_ptr(), keep)
        for x, mask in zip(inputs, masks):
            numbers += (x.data_ptr(), *x.shape, 0 if mask is None else mask.data_ptr())
        numbers.append(d_out.data_ptr())
        numbers += [d.data_ptr() for d in d_inputs]
        numbers += [p.data_ptr() for p in parameters]
        at, size = gradients.data_ptr(), gradients.element_size()
        for index in range(0, len(self.gradient_sizes), 2):
            numbers.append(at)
            at += (self.gradient_sizes[index] + self.gradient_sizes[index + 1]) * size
        self._call(self._backward, numbers)
        return d_inputs, gradients

    def split_gradients(self, gradients):
        pieces = gradients.split_with_sizes(self.gradient_sizes)[::2]
        return [piece if len(shape) == 1 else piece.view(shape) for piece, shape in zip(pieces, self.shapes)]

    def expect_inputs(self, names, inputs, masks):
        """Throws unless inputs (b, n, d) and masks (b, n) fit the module and each other."""
        x = inputs[0]
        for name, tensor, mask in zip(names, inputs, masks):
            shape = tensor.shape
            if len(shape) != 3 or shape[2] != self.dim or shape[0] != x.shape[0]:
                raise shape_error(name, (None if tensor is x else x.shape[0], None, self.dim), shape)
            if tensor.dtype != x.dtype or tensor.device != x.device:
                raise value_error(name, f'{x.dtype} on {x.device}, as `{names[0]}`', f'{tensor.dtype} on {tensor.device}')
            if mask is not None:
                name = 'mask' if tensor is x else f'{name}_mask'
                if mask.shape != shape[:2]:
                    raise shape_error(name, shape[:2], mask.shape)
                if mask.dtype != torch.bool or mask.device != x.device:
                    raise value_error(name, f'torch.bool on {x.device}', f'{mask.dtype} on {mask.device}')

    def expect_parameters(self, parameters):
        dtype, device = self.dtype, self.device
        for p, shape in zip(parameters, self.shapes):
            if p.shape != shape or p.dtype != dtype or p.device != device or not p.is_contiguous():
                self._refuse_parameters(parameters)

    def _refuse_parameters(self, parameters):
        for name, p, shape in zip(self.names, parameters, self.shapes):
            if p.shape != shape:
                raise shape_error(name, shape, p.shape)
            if p.dtype != self.dtype or p.device != self.device:
                raise value_error(name, f'{self.dtype} on {self.device}, as the tokens', f'{p.dtype} on {p.device}')
            if not p.is_contiguous():
                raise value_error(name, 'contiguous', f'of strides {tuple(p.stride())}')

    def release_memory(self):
        self._release_memory()

    @staticmethod
    def _place(device):
        """Device, stream, threads, and whether float products may be tf32."""
        if device.type == 'cpu':
            return [0, 0, torch.get_num_threads(), 0]
        return [device.index, torch.cuda.current_stream(device).cuda_stream, 0, torch.backends.cuda.matmul.allow_tf32]

    def _call(self, function, numbers):
        result = function(struct.pack(f'{len(numbers)}q', *numbers))
        if result < 0:
            message = self._message().decode(errors='replace')
            kind = {-1: ShapeError, -2: ValueError, -3: torch.OutOfMemoryError if self.device.type == 'cuda' else MemoryError}
            raise kind.get(result, Error)(message)
        return result


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def tensor_of_handle(managed):
    """Of a DLManagedTensor: the tensor owns it, and frees it in the end."""
    return torch.utils.dlpack.from_dlpack(new_capsule(managed, b'dltensor', None))
