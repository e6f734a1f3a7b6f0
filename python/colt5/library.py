# SPDX-License-Identifier: MIT
"""Compiled modules: the C interface of bridge.hpp by ctypes, on the memory of tensors."""
import ctypes
import functools
import itertools
import operator
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

    def __init__(self, module, config, counts, inputs, parameters, layout):
        """config: C++ text, such as FeedForwardConfig{.dim = 64, …}; counts: C++ type; inputs and parameters: their names;
        layout: the dimensions of inputs, such as bnd"""
        self.key = '|'.join((module, config, counts, ','.join(inputs), ','.join(parameters), layout))
        self.module, self.config, self.counts, self.inputs, self.parameters = module, config, counts, inputs, parameters
        self.rank, self.axis = len(layout), layout.index('d')


def spec_of(key):
    module, config, counts, inputs, parameters, layout = key.split('|')
    return Spec(module, config, counts, inputs.split(','), parameters.split(','), layout)


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


def kernels_of(dtype):
    """The scalar types whose kernels a module uses: logits, scores and gradients of parameters of a 16-bit one are float."""
    scalar = SCALARS[dtype].removeprefix('colt5::')
    return [scalar, 'float'] if dtype.itemsize == 2 else [scalar]


def source_of(spec, dtype, device):
    """What is compiled for tensors of this type on this device."""
    on_cpu, scalar = device.type == 'cpu', SCALARS[dtype]
    source = SOURCE.format(header='colt5.hpp' if on_cpu else 'cuda.cuh', policy='Cpu' if on_cpu else 'Cuda', module=spec.module,
                           config=spec.config, scalar=scalar, counts=spec.counts)
    return source


def gradient_dtype(dtype):
    """Of the gradients of parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_sizes(shapes):
    """All gradients are in one tensor, each at a multiple of 64 numbers: the sizes of gradients and of the gaps behind them,
    and where they begin."""
    sizes = []
    for shape in shapes:
        sizes += [shape.numel(), -shape.numel() % 64]
    return sizes, [0, *itertools.accumulate(sizes)][:-1:2]


def split_gradients(gradients, shapes):
    pieces = gradients.split_with_sizes(gradient_sizes(shapes)[0])[::2]
    return [piece if len(shape) == 1 else piece.view(shape) for piece, shape in zip(pieces, shapes)]


class Calls:
    """The functions of a compiled library, which take one array of 64-bit numbers: see call.hpp."""

    all = []

    def __init__(self, source, kernels, name, dtype, device):
        self.dtype, self.device = dtype, device
        title = f'{name} ({kernels[0]}, {"CPU" if device.type == "cpu" else "GPU"})'
        self._library = library = build.load(source, kernels, title, architecture_of(device))
        self._message = library.colt5_message
        self._message.restype = ctypes.c_char_p
        self._forward, self._backward = self._function('forward'), self._function('backward')
        self._release_memory = self._function('release_memory')
        self.all.append(self)

    def _function(self, name):
        function = getattr(self._library, 'colt5_' + name)
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
        return function

    def release_memory(self):
        self.call(self._release_memory, [])

    @staticmethod
    def place(device):
        """Device, stream, threads, and whether float products may be tf32."""
        if device.type == 'cpu':
            return [0, 0, torch.get_num_threads(), 0]
        return [device.index, torch.cuda.current_stream(device).cuda_stream, 0, torch.backends.cuda.matmul.allow_tf32]

    def call(self, function, numbers):
        result = function(struct.pack(f'{len(numbers)}q', *numbers))
        if result < 0:
            message = self._message().decode(errors='replace')
            kind = {-1: ShapeError, -2: ValueError, -3: torch.cuda.OutOfMemoryError if self.device.type == 'cuda' else MemoryError}
            raise kind.get(result, Error)(message)
        return result


class Library(Calls):
    """Calls of one compiled module. `names` and `shapes` are those of the parameters in Python's order; C++ takes them in
    another one."""

    def __init__(self, spec, dtype, device):
        super().__init__(source_of(spec, dtype, device), kernels_of(dtype), spec.module, dtype, device)
        self.spec = spec
        self._no_mask = (0,) * spec.rank
        self.gradient_dtype = gradient_dtype(dtype)
        self._as_tensor = self._library.colt5_as_tensor
        self._as_tensor.argtypes, self._as_tensor.restype = [ctypes.c_int64], ctypes.c_void_p

        self.call(self._function('parameters'), self.place(device))
        lines = [line.split('\t') for line in self._message().decode().splitlines()]
        shapes = {name: torch.Size(map(int, shape.split())) for name, shape in lines}
        self.names = spec.parameters
        if set(shapes) != set(self.names):
            raise Error(f'colt5: the parameters of {spec.module} must be {", ".join(shapes)}, but are {", ".join(self.names)}')
        self.shapes = [shapes[name] for name in self.names]
        self._in_order = operator.itemgetter(*[self.names.index(name) for name in shapes])
        sizes, offsets = gradient_sizes(self.shapes)
        self.gradient_size = sum(sizes)
        self._pieces = [(shape, torch.empty(shape, device='meta').stride(), offset) for shape, offset in zip(self.shapes, offsets)]
        self._gradient_offsets = self._in_order([offset * self.gradient_dtype.itemsize for offset in offsets])
        self.dim = next(shape[-1] for name, shape in shapes.items() if name.endswith('routing_token'))

    def forward(self, inputs, masks, counts, parameters, noise, save):
        """Returns the output and, with `save`, a tensor that stands for what backward reads, otherwise None. `noise`: of
        training, by this seed, or None for that of evaluation."""
        out = torch.empty_like(inputs[0])
        numbers = self.place(inputs[0].device)
        numbers += (save, 1, 0) if noise is None else (save, 0, noise)
        for x, mask in zip(inputs, masks):
            numbers += (x.data_ptr(), *x.shape, *(self._no_mask if mask is None else (mask.data_ptr(), *mask.shape)))
        pointers = self._in_order([p.data_ptr() for p in parameters])
        handle = self.call(self._forward, [*numbers, *counts, out.data_ptr(), *pointers])
        return out, (tensor_of_handle(self._as_tensor(handle)) if save else None)

    def backward(self, saved, d_out, inputs, masks, parameters, keep):
        """Returns the gradients of the inputs, and those of the parameters as one tensor: see split_gradients, and `split`,
        which is faster."""
        d_inputs = [torch.empty_like(x) for x in inputs]
        gradients = torch.zeros(self.gradient_size, dtype=self.gradient_dtype, device=d_out.device)
        numbers = self.place(d_out.device)
        numbers += (saved.data_ptr(), keep)
        for x, mask in zip(inputs, masks):
            numbers += (x.data_ptr(), *x.shape, *(self._no_mask if mask is None else (mask.data_ptr(), *mask.shape)))
        numbers.append(d_out.data_ptr())
        numbers += [d.data_ptr() for d in d_inputs]
        numbers += self._in_order([p.data_ptr() for p in parameters])
        first = gradients.data_ptr()
        numbers += [first + offset for offset in self._gradient_offsets]
        self.call(self._backward, numbers)
        return d_inputs, gradients

    def split(self, gradients):
        return [gradients.as_strided(*piece) for piece in self._pieces]

    def expect_inputs(self, inputs, masks):
        """Throws unless inputs (b, n, d) and masks (b, n), or maps with masks (b, h, w), fit the module and each other."""
        names, x, axis = self.spec.inputs, inputs[0], self.spec.axis
        for name, tensor, mask in zip(names, inputs, masks):
            shape = tensor.shape
            if len(shape) != self.spec.rank or shape[axis] != self.dim or shape[0] != x.shape[0]:
                expected = [None if tensor is x else x.shape[0], *[None] * (self.spec.rank - 1)]
                expected[axis] = self.dim
                raise shape_error(name, expected, shape)
            if tensor.dtype != x.dtype or tensor.device != x.device:
                raise value_error(name, f'{x.dtype} on {x.device}, as `{names[0]}`', f'{tensor.dtype} on {tensor.device}')
            if mask is not None:
                name = 'mask' if tensor is x else f'{name}_mask'
                if mask.shape != shape[:axis] + shape[axis + 1:]:
                    raise shape_error(name, shape[:axis] + shape[axis + 1:], mask.shape)
                if mask.dtype != torch.bool or mask.device != x.device:
                    raise value_error(name, f'torch.bool on {x.device}', f'{mask.dtype} on {mask.device}')

    def take_parameters(self, parameters, convert):
        """Parameters as calls take them. Throws unless they have the right shapes, are on the device, and of the scalar type,
        or with `convert` of any."""
        dtype, device, taken = self.dtype, self.device, parameters
        for i, (p, shape) in enumerate(zip(parameters, self.shapes)):
            if p.shape != shape:
                raise shape_error(self.names[i], shape, p.shape)
            if p.device != device or (p.dtype != dtype and not convert):
                raise value_error(self.names[i], f'{dtype} on {device}, as the tokens', f'{p.dtype} on {p.device}')
            if p.dtype != dtype or not p.is_contiguous():
                taken = list(taken) if taken is parameters else taken
                taken[i] = p.to(dtype).contiguous()
        return taken


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def tensor_of_handle(managed):
    """Of a DLManagedTensor: the tensor owns it, and frees it in the end."""
    return torch.utils.dlpack.from_dlpack(new_capsule(managed, b'dltensor', None))


def release_memory():
    """Hands memory that no tensor uses back to the system: workspaces of all modules that have been called."""
    for library in Calls.all:
        library.release_memory()
