# SPDX-License-Identifier: MIT
"""PyTorch on the CPU, most of it the package: the counterpart of the C++ programs of this folder, started by cpu.py.

    reference_cpu.py PROGRAM INPUTS.safetensors THREADS BATCH LENGTH WIDTH [NUMBER...] [--wide-logits] [--forward-only]

draws weights and inputs, writes them to the file for the C++ program of the same name, and then answers the commands
that bench/measure.hpp describes. Routing tokens are scaled so that logits have unit deviation, unless --wide-logits asks
for the package's own initialization, which gives them a deviation of about the square root of the dimension.
"""
import argparse
import ctypes
import math
import sys
import time

import torch
from torch import nn

import colt5_attention
import local_attention.local_attention
from local_attention.rotary import SinusoidalEmbeddings, rotate_half

import attention_torch
from common import write_safetensors
from paper_torch import EPS, ITERATIONS, PaperBlock


def transformer_block(width, _):
    if width == 128:
        return colt5_attention.ConditionalRoutedTransformerBlock(
            dim=128, num_heavy_attn_tokens_q=64, num_heavy_attn_tokens_kv=64, num_heavy_ff_tokens=64, light_dim_head=32,
            light_heads=4, light_window_size=64, heavy_dim_head=32, heavy_heads=4, light_ff_mult=0.5, heavy_ff_mult=4)
    return colt5_attention.ConditionalRoutedTransformerBlock(
        dim=width, num_heavy_attn_tokens_q=1024, num_heavy_attn_tokens_kv=1024, num_heavy_ff_tokens=1024, light_dim_head=64,
        light_heads=8, light_window_size=128, heavy_dim_head=64, heavy_heads=8, light_ff_mult=0.5, heavy_ff_mult=4)


def rotate_three_windows(q, k, angles, scale):
    """Queries stand in the middle window. local-attention takes them for the last one, which it shows to causal queries."""
    turn = lambda x, angles: x * angles.cos() + rotate_half(x) * angles.sin()
    window = q.shape[-2]
    return turn(q, angles[window:2 * window]), turn(k, angles)


def light_attention(width, numbers):
    if len(numbers) > 1 and numbers[1]:
        return attention_torch.light_attention_with_bias(width)
    light = colt5_attention.ConditionalRoutedAttention(width, num_heavy_tokens_q=1024, num_heavy_tokens_kv=1024).light_attn
    if numbers and numbers[0]:
        light.attn_fn.rel_pos = SinusoidalEmbeddings(64)
        local_attention.local_attention.apply_rotary_pos_emb = rotate_three_windows
    return light


def feed_forward(width, _):
    return colt5_attention.ConditionalRoutedFeedForward(width, num_heavy_tokens=1024)


class PaddedBatch(nn.Module):
    """The block on packed sequences (1, total, d), padded for it; numbers and lengths as in module/ragged_batch.cpp."""

    def __init__(self, width, numbers):
        super().__init__()
        block = transformer_block(width, numbers)
        self.batch, form = numbers
        self.is_uniform = form == 2
        for name, part in block.named_children():  # under the block's own names
            self.add_module(name, part)
        self.block = [block]

    def forward(self, x, mask):
        longest, rest = divmod(2 * x.shape[1], self.batch + 1)
        if rest:  # the short call that warms up
            return self.block[0](x, mask=mask)
        if self.is_uniform:
            return self.route(x.view(self.batch, -1, x.shape[2]), mask.view(self.batch, -1)).view(x.shape)
        lengths = torch.arange(1, self.batch + 1, device=x.device) * longest // self.batch
        real = torch.arange(longest, device=x.device) < lengths[:, None]
        padded = x.new_zeros(self.batch, longest, x.shape[2])
        padded[real] = x[0]
        return self.route(padded, real)[real][None]

    def route(self, x, mask):
        return self.block[0](x, mask=mask, num_heavy_attn_tokens_q=256, num_heavy_attn_tokens_kv=256, num_heavy_ff_tokens=256)


def attention(width, numbers):
    """Form 0 of version 0.2.3; 1 and 2 of 0.11, which alone has null tokens and rotary embeddings; 3 of attention_torch."""
    if numbers and numbers[0] == 3:
        return attention_torch.attention_in_blocks(width)
    rotary = {'rotary_emb': True} if numbers and numbers[0] == 2 else {}
    return colt5_attention.ConditionalRoutedAttention(width, num_heavy_tokens_q=1024, num_heavy_tokens_kv=1024, **rotary)


def image_attention(width, numbers):
    if not numbers[0]:
        return attention_torch.ImageAttention(width)
    from colt5_attention.transformer_block import ConditionalRoutedImageAttention
    return ConditionalRoutedImageAttention(width, num_heavy_tokens_q=16, num_heavy_tokens_kv=16, light_window_size=16)


def autoregressive_attention(width, _):
    from colt5_attention.transformer_block import ConditionalRoutedAutoregressiveAttention
    return ConditionalRoutedAutoregressiveAttention(width, num_heavy_tokens_q=32, num_heavy_tokens_kv=1024)


def paper_block(width, _):
    def descent(logits, k):
        mask = torch.ones_like(logits, dtype=torch.bool)
        return colt5_attention.coor_descent(logits, n_iters=ITERATIONS, k=torch.tensor([k]), eps=EPS, mask=mask)
    return PaperBlock(width, descent)


MODULES = {'conditional_routed_transformer_block': transformer_block, 'conditional_routed_feed_forward': feed_forward,
           'light_attention': light_attention, 'conditional_routed_attention': attention,
           'conditional_routed_image_attention': image_attention, 'paper_block': paper_block,
           'conditional_routed_autoregressive_attention': autoregressive_attention,
           'ragged_batch': PaddedBatch,
           'decode': lambda width, _: transformer_block(width, (width, ITERATIONS, 0))}  # for its weights


class Case:
    """Weights, inputs, and a function of the input."""

    def __init__(self, program, batch, length, width, numbers, wide_logits):
        self.module = None
        self.x = torch.randn(batch, length, width)
        mask = torch.ones(batch, length, dtype=torch.bool)
        if program in MODULES:
            self.module = MODULES[program](width, numbers)
            for name, parameter in self.module.named_parameters():
                if name.endswith('routing_token') and not wide_logits:
                    parameter.data *= width ** -0.5
            self.forward = lambda x: self.module(x, mask=mask[:x.shape[0], :x.shape[1]])
            if program == 'conditional_routed_image_attention':  # maps, without a mask
                self.forward = lambda x: self.module(x.unflatten(1, (math.isqrt(x.shape[1]), -1))).flatten(1, 2)
            elif program in ('paper_block', 'conditional_routed_autoregressive_attention'):
                self.forward = self.module
            self.out_shape = self.x.shape
        elif program == 'linear':
            out = numbers[0]
            self.module = nn.Linear(width, out, bias=False)
            self.forward = self.module
            self.out_shape = (batch, length, out)
        elif program == 'top_k':  # here and below: logits (batch, 1, length)
            self.x = torch.randn(batch, 1, length)
            self.forward = lambda x: x.topk(numbers[0], dim=-1).indices.float()
        elif program == 'causal_top_k':  # which no package has
            self.x = torch.randn(batch, 1, length)
            self.out_shape = (batch, 1, numbers[0])
        elif program == 'many_tensors':
            self.x = torch.randn(batch, 1, length)

            def make_tensors(x):
                tensors = [torch.empty(1 + i % 7, 64) for i in range(x.numel())]
                return x[:len(tensors)]  # which all live until here
            self.forward = make_tensors
        elif program == 'coordinate_descent':
            n_iters, k, chosen = numbers
            self.x = torch.randn(batch, 1, length) * (22 if wide_logits else 1)
            mask = mask[:, None]
            k = torch.tensor([float(k)])

            def scores(x):
                all_scores = colt5_attention.coor_descent(x, n_iters=n_iters, k=k, eps=1., mask=mask[:x.shape[0]])
                return all_scores.topk(chosen, dim=-1).values if chosen else all_scores
            self.forward = scores
            self.out_shape = (batch, 1, chosen or length)
        else:
            sys.exit(f'no such program: {program}')

    def draw_d_out(self):
        self.d_out = torch.randn(self.out_shape)
        self.x.requires_grad_()

    def tensors(self):
        parameters = self.module.named_parameters() if self.module else []
        inputs = {'x': self.x} | ({'d_out': self.d_out} if self.x.requires_grad else {})
        return {f'module.{name}': parameter for name, parameter in parameters} | inputs

    def warm_up(self):
        """A short call, so that the first long one does not pay for loading the kernels."""
        out = self.forward(self.x.detach()[:1, :1024].requires_grad_())
        if out.requires_grad:
            out.sum().backward()

    def call(self, backward):
        if not backward:
            with torch.no_grad():
                return self.forward(self.x)
        self.x.grad = None
        if self.module:
            self.module.zero_grad(set_to_none=True)
        self.forward(self.x).backward(self.d_out)
        return self.x.grad

    def forget(self):
        """Hands free memory back to the system and lets the peak of this process start anew."""
        self.x.grad = None
        if self.module:
            self.module.zero_grad(set_to_none=True)
        ctypes.CDLL(None).malloc_trim(0)
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')


def memory_mib(field):
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field + ':'))


def serve(case):
    case.forget()
    before = memory_mib('VmRSS')
    library = 'MKL' if torch.backends.mkl.is_available() else 'the BLAS'
    print(f'ready {library} of PyTorch {torch.__version__}', flush=True)
    for line in sys.stdin:
        command, mode, argument = line.split()
        backward = mode == 'forward_backward'
        if command == 'first':
            case.forget()
            begin = time.perf_counter()
            result = case.call(backward)
            seconds, peak = time.perf_counter() - begin, memory_mib('VmHWM')
            result.contiguous().numpy().tofile(argument)
            print(seconds, peak - before, flush=True)
        else:
            begin = time.perf_counter()
            for _ in range(int(argument)):
                result = None  # or two results would be alive at once
                result = case.call(backward)
            print((time.perf_counter() - begin) / int(argument), flush=True)
        del result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('program')
    parser.add_argument('inputs')
    for name in ('threads', 'batch', 'length', 'width'):
        parser.add_argument(name, type=int)
    parser.add_argument('numbers', type=int, nargs='*')
    parser.add_argument('--wide-logits', action='store_true')
    parser.add_argument('--forward-only', action='store_true')
    parser.add_argument('--inputs-only', action='store_true', help='makes no call')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    case = Case(args.program, args.batch, args.length, args.width, args.numbers, args.wide_logits)
    if not args.forward_only:
        case.draw_d_out()
    write_safetensors(args.inputs, case.tensors())
    if not args.inputs_only:
        case.warm_up()
    serve(case)


if __name__ == '__main__':
    main()
