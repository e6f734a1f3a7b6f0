# SPDX-License-Identifier: MIT
"""The differentiable top-k of colt5-attention 0.11."""
import functools
import struct
from collections import namedtuple

import torch

from .errors import shape_error, value_error
from .library import SCALARS, Calls, kernels_of

TopkReturn = namedtuple('TopkReturn', ['values', 'indices', 'coor_descent_values', 'gates'])
SOURCE = '''// Written by the Python package colt5.
#include <colt5/{header}>
namespace colt5_python {{
using Policy = colt5::{policy};
using Scalar = {scalar};
}}
#include "topk.hpp"
'''


@functools.lru_cache(maxsize=None)
def library_of(dtype, device):
    names = dict(header='colt5.hpp', policy='Cpu') if device.type == 'cpu' else dict(header='cuda.cuh', policy='Cuda')
    return Calls(SOURCE.format(scalar=SCALARS[dtype], **names), kernels_of(dtype), 'topk', dtype, device)


class Topk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, k, options):
        rows, n = x.shape
        values, gates, descent = (x.new_empty(rows, min(k, n)) for _ in range(3))
        indices = torch.empty(values.shape, dtype=torch.int32, device=x.device)
        library, numbers = Topk.numbers(x, mask, k, options)
        library.call(library._forward, [*numbers, *(t.data_ptr() for t in (values, indices, descent, gates))])
        ctx.save_for_backward(x, mask)
        ctx.arguments = k, options
        indices = indices.long()
        ctx.mark_non_differentiable(indices)
        return values, indices, descent, gates

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_values, _, d_descent, d_gates):
        x, mask = ctx.saved_tensors
        d_x = torch.empty_like(x)
        library, numbers = Topk.numbers(x, mask, *ctx.arguments)
        given = [t.contiguous() for t in (d_values, d_descent, d_gates)]
        library.call(library._backward, [*numbers, *(t.data_ptr() for t in given), d_x.data_ptr()])
        return d_x, None, None, None

    @staticmethod
    def numbers(x, mask, k, options):
        library = library_of(x.dtype, x.device)
        ratio, n_iters, *rest = options
        bits = [struct.unpack('q', struct.pack('d', value))[0] for value in (ratio, *rest)]
        return library, [*library.place(x.device), x.data_ptr(), *x.shape, 0 if mask is None else mask.data_ptr(), k, bits[0],
                         n_iters, *bits[1:]]


def topk(x, k, coor_descent_k_ratio=9 / 8, n_iters=20, eps=1e-1, eps_init=None, eps_decay=1., mask=None, fused=False,
         non_differentiable=False):
    """The k largest numbers of the last axis of x (..., n), and their places; `gates` are 1 and have the gradient of a soft
    choice by coordinate descent, which `values`, their product with x, have, too. mask (..., n): numbers that may be chosen.
    k larger than n is n."""
    if non_differentiable:
        return TopkReturn(*torch.topk(x, k=k, dim=-1), None, None)
    if mask is not None and mask.shape != x.shape:
        raise shape_error('mask', x.shape, mask.shape)
    if mask is not None and (mask.dtype != torch.bool or mask.device != x.device):
        raise value_error('mask', f'torch.bool on {x.device}', f'{mask.dtype} on {mask.device}')
    if not x.is_floating_point() or x.device.type not in ('cpu', 'cuda'):
        raise value_error('x', 'of floating-point numbers on cpu or cuda', f'{x.dtype} on {x.device}')
    if k < 1:
        raise value_error('k', '>= 1', k)
    rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    of_rows = None if mask is None else mask.reshape(rows.shape).contiguous()
    options = float(coor_descent_k_ratio), int(n_iters), float(eps), float(eps_init or 0), float(eps_decay)
    values, indices, descent, gates = (t.view(*x.shape[:-1], -1) for t in Topk.apply(rows, of_rows, int(k), options))
    return TopkReturn(values.to(x.dtype), indices, descent.to(x.dtype), gates.to(x.dtype))
