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

from .library import library_of

keeps_graph = getattr(torch._C._autograd, '_get_current_graph_task_keep_graph', lambda: True)


def call(spec, inputs, masks, counts, parameters, noise):
    """inputs (b, n, d) and masks (b, n) or None, numbers of tokens, parameters in the library's order; noise: a seed of
    training in a tensor, or None. All checked."""
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *parameters))
    if torch.compiler.is_compiling() or type(inputs[0]) not in plain:
        return forward_op(inputs, masks, parameters, spec.key, counts, noise, save)[0]
    seed = None if noise is None else int(noise)
    if save:
        return Call.apply(spec, masks, counts, seed, len(inputs), *inputs, *parameters)
    return run_forward(spec.key, inputs, masks, counts, parameters, seed, noise is not None)[0]


plain = (Tensor, torch.nn.Parameter)


def run_forward(key, inputs, masks, counts, parameters, seed, save):
    inputs = [x if x.is_contiguous() else x.contiguous() for x in inputs]
    masks = [m if m is None or m.is_contiguous() else m.contiguous() for m in masks]
    library = library_of(key, inputs[0].dtype, inputs[0].device)
    return library.forward(inputs, masks, counts, parameters, seed, save)


class Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, masks, counts, seed, num_inputs, *tensors):
        inputs, parameters = tensors[:num_inputs], tensors[num_inputs:]
        inputs = [x if x.is_contiguous() else x.contiguous() for x in inputs]
        masks = [m if m is None or m.is_contiguous() else m.contiguous() for m in masks]
        ctx.library = library_of(spec.key, inputs[0].dtype, inputs[0].device)
        ctx.num_inputs = num_inputs
        out, saved = ctx.library.forward(inputs, masks, counts, parameters, seed, True)
        ctx.save_for_backward(saved, *inputs, *masks, *parameters)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        n = ctx.num_inputs
        saved, *tensors = ctx.saved_tensors
        inputs, masks, parameters = tensors[:n], tensors[n:2 * n], tensors[2 * n:]
        d_inputs, gradients = ctx.library.backward(saved, d_out.contiguous(), inputs, masks, parameters, keeps_graph())
        wanted = ctx.needs_input_grad
        return (None,) * 5 + tuple(
            d if needed else None
            for d, needed in zip([*d_inputs, *ctx.library.split_gradients(gradients)], wanted[5:]))


@torch.library.custom_op('colt5::forward', mutates_args=())
def forward_op(inputs: Sequence[Tensor], masks: Sequence[Optional[Tensor]], parameters: Sequence[Tensor], module: str,
               counts: Sequence[int], noise: Optional[Tensor], save: bool) -> Tuple[Tensor, Tensor]:
    seed = None if noise is None else int(noise)
    out, saved = run_forward(module, inputs, masks, counts, parameters, seed, save or noise is not None)
    return out, torch.zeros(1, dtype=torch.uint8) if saved is None else saved


@forward_op.register_fake
def _(inputs, masks, parameters, module, counts, noise, save):
    return torch.empty_like(inputs[0], memory_format=torch.contiguous_format), torch.empty(1, dtype=torch.uint8, device='cpu')


@torch.library.custom_op('colt5::backward', mutates_args=())
def backward_op(saved: Tensor, d_out: Tensor, inputs: Sequence[Tensor], masks: Sequence[Optional[Tensor]],
                parameters: Sequence[Tensor], module: str) -> List[Tensor]:
    library = library_of(module, d_out.dtype, d_out.device)
    inputs = [x.contiguous() for x in inputs]
    masks = [None if m is None else m.contiguous() for m in masks]
    d_inputs, gradients = library.backward(saved, d_out.contiguous(), inputs, masks, parameters, True)
    return [*d_inputs, gradients]


@backward_op.register_fake
def _(saved, d_out, inputs, masks, parameters, module):
    library = library_of(module, d_out.dtype, d_out.device)
    return [*[torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs],
            d_out.new_empty(library.gradient_size, dtype=library.gradient_dtype)]


def save_for_backward(ctx, inputs, output):
    tokens, masks, parameters, ctx.module, _, _, _ = inputs
    ctx.save_for_backward(output[1], *tokens, *masks, *parameters)
    ctx.num_inputs = len(tokens)


def backward_of_op(ctx, d_out, _):
    n = ctx.num_inputs
    saved, *tensors = ctx.saved_tensors
    inputs, masks, parameters = tensors[:n], tensors[n:2 * n], tensors[2 * n:]
    *d_inputs, gradients = torch.ops.colt5.backward(saved, d_out, inputs, masks, parameters, ctx.module)
    library = library_of(ctx.module, d_out.dtype, d_out.device)
    return d_inputs, [None] * n, library.split_gradients(gradients), None, None, None, None


forward_op.register_autograd(backward_of_op, setup_context=save_for_backward)
