# SPDX-License-Identifier: MIT
"""Calls of compiled modules in PyTorch's automatic differentiation.

In eager mode a call is a torch.autograd.Function; where PyTorch's compiler looks, and for tensors that are more than
memory (fake ones, …), it is the operator colt5::forward, which the compiler takes as it is. Both do the same.

What backward reads beside inputs and parameters is on the C++ side; a tensor of one byte stands for it, whose end frees
it. So it lives as long as the graph does, and checkpoints drop it as they drop others.
"""
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .errors import value_error
from .library import gradient_dtype, gradient_sizes, library_of, split_gradients

keeps_graph = getattr(torch._C._autograd, '_get_current_graph_task_keep_graph', lambda: True)


plain = (Tensor, torch.nn.Parameter)


def call(key, inputs, masks, counts, parameters, noise, convert):
    """The module of a Spec's key: inputs (b, n, d) and masks (b, n) or None, numbers of tokens, parameters; noise: a seed of
    training in a tensor, or None; convert: parameters to the type of the inputs, of which their gradients stay."""
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *parameters))
    if torch.compiler.is_compiling() or type(inputs[0]) not in plain:
        mask, context_mask = (*masks, None)[:2]
        return torch.ops.colt5.forward(inputs, mask, context_mask, parameters, key, counts, noise, convert, save)[0]
    if save:
        return Call.apply(key, masks, counts, noise, convert, len(inputs), *inputs, *parameters)
    return Pass(key, inputs, masks, counts, parameters, noise, convert, False).out


class Pass:
    """A forward pass: what was handed to C++, and what came back."""

    def __init__(self, key, inputs, masks, counts, parameters, noise, convert, save):
        x = inputs[0]
        if parameters[0].dtype != x.dtype and not convert:
            raise value_error('x', f'of {parameters[0].dtype}, as the parameters', f'of {x.dtype}')
        self.library = library = library_of(key, x.dtype, x.device)
        library.expect_inputs(inputs, masks)
        self.inputs = [x if x.is_contiguous() else x.contiguous() for x in inputs]
        self.masks = [m if m is None or m.is_contiguous() else m.contiguous() for m in masks]
        self.parameters = library.take_parameters(parameters, convert)
        seed = None if noise is None else int(noise)
        self.out, self.saved = library.forward(self.inputs, self.masks, counts, self.parameters, seed, save)


class Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, key, masks, counts, noise, convert, num_inputs, *tensors):
        done = Pass(key, tensors[:num_inputs], masks, counts, tensors[num_inputs:], noise, convert, True)
        ctx.library, ctx.num_inputs = done.library, num_inputs
        ctx.save_for_backward(done.saved, *done.inputs, *done.masks, *done.parameters)
        return done.out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        n = ctx.num_inputs
        saved, *tensors = ctx.saved_tensors
        inputs, masks, parameters = tensors[:n], tensors[n:2 * n], tensors[2 * n:]
        d_inputs, gradients = ctx.library.backward(saved, d_out.contiguous(), inputs, masks, parameters, keeps_graph())
        wanted = ctx.needs_input_grad
        return (None,) * 6 + tuple(
            d if needed else None
            for d, needed in zip([*d_inputs, *ctx.library.split(gradients)], wanted[6:]))


@torch.library.custom_op('colt5::forward', mutates_args=())
def forward_op(inputs: Sequence[Tensor], mask: Optional[Tensor], context_mask: Optional[Tensor], parameters: Sequence[Tensor],
               module: str, counts: Sequence[int], noise: Optional[Tensor], convert: bool, save: bool) -> Tuple[Tensor, Tensor]:
    done = Pass(module, inputs, [mask, context_mask][:len(inputs)], counts, parameters, noise, convert, save)
    return done.out, done.saved if save else torch.zeros(1, dtype=torch.uint8)


@forward_op.register_fake
def _(inputs, mask, context_mask, parameters, module, counts, noise, convert, save):
    return torch.empty_like(inputs[0], memory_format=torch.contiguous_format), torch.empty(1, dtype=torch.uint8, device='cpu')


@torch.library.custom_op('colt5::backward', mutates_args=())
def backward_op(saved: Tensor, d_out: Tensor, inputs: Sequence[Tensor], masks: Sequence[Optional[Tensor]],
                parameters: Sequence[Tensor], module: str) -> List[Tensor]:
    library = library_of(module, d_out.dtype, d_out.device)
    inputs = [x.contiguous() for x in inputs]
    masks = [None if m is None else m.contiguous() for m in masks]
    parameters = library.take_parameters(parameters, True)
    d_inputs, gradients = library.backward(saved, d_out.contiguous(), inputs, masks, parameters, True)
    return [*d_inputs, gradients]


@backward_op.register_fake
def _(saved, d_out, inputs, masks, parameters, module):
    sizes, _ = gradient_sizes([p.shape for p in parameters])
    return [*[torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs],
            d_out.new_empty(sum(sizes), dtype=gradient_dtype(d_out.dtype))]


def save_for_backward(ctx, inputs, output):
    tokens, mask, context_mask, parameters, ctx.module, *_ = inputs
    ctx.save_for_backward(output[1], *tokens, *[mask, context_mask][:len(tokens)], *parameters)
    ctx.num_inputs = len(tokens)


def backward_of_op(ctx, d_out, _):
    n = ctx.num_inputs
    saved, *tensors = ctx.saved_tensors
    inputs, masks, parameters = tensors[:n], tensors[n:2 * n], tensors[2 * n:]
    *d_inputs, gradients = torch.ops.colt5.backward(saved, d_out, inputs, masks, parameters, ctx.module)
    d_parameters = split_gradients(gradients, [p.shape for p in parameters])
    return d_inputs, None, None, d_parameters, None, None, None, None, None


forward_op.register_autograd(backward_of_op, setup_context=save_for_backward)
