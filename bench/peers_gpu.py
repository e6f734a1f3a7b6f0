# SPDX-License-Identifier: MIT
"""PyTorch on the GPU: the counterpart of the C++ programs of this folder, started by gpu.py.

    peers_gpu.py package     colt5-attention 0.2.3 as it is; draws the weights and inputs that all others read
    peers_gpu.py tuned       tuned_torch.py

With `prepare CASE`, where CASE is JSON, one of them gets ready for a case, and with `forget` it drops that again; in between it
answers the commands that measure.hpp describes, or `refused REASON`. After each it keeps no more memory than the case needs. Routing tokens are scaled so that logits have unit deviation, unless the case has
wide_logits: then they are as the package initializes them.
"""
import contextlib
import gc
import json
import math
import os
import sys
import time
import warnings

import torch
from torch import nn

from common import read_safetensors, write_safetensors

# Of graphs captured on another stream than that of the call before.
warnings.filterwarnings('ignore', message='The AccumulateGrad node')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'  # on the CPU, only to try this program itself


LARGE = 2 ** 28  # an input of more numbers is the gradient of the output, too, or files would be larger than they must


class Peer:
    """Has self.call, a function of self.inputs; self.parameters get gradients, too."""

    prepared = None

    def prepare(self, case):
        if case == self.prepared:
            return
        self.prepared = None
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case['dtype'] == 'tf32'
        torch.set_float32_matmul_precision('high' if case['dtype'] == 'tf32' else 'highest')
        self.make(case)
        self.prepared = case

    def forget(self):
        """What was prepared, so that other processes have its memory."""
        self.prepared = self.call = self.inputs = self.parameters = self.d_out = None
        return []

    def context(self):
        return contextlib.nullcontext()

    def forward(self):
        with torch.no_grad(), self.context():
            return self.call(*self.inputs)

    def forward_backward(self):
        leaves = [*(x for x in self.inputs if x.requires_grad), *self.parameters]
        with self.context():
            out = self.call(*self.inputs)
        return torch.autograd.grad(out, leaves, self.d_out.to(out.dtype))[len(self.inputs) - 1]

    def first(self, mode, file):
        """The call is made once before, so that only the second pays for what a call keeps."""
        call = getattr(self, mode)
        call()
        memory = Memory()
        begin = time.perf_counter()
        result = call()
        if DEVICE == 'cuda':
            torch.cuda.synchronize()
        answer = [time.perf_counter() - begin, *memory.taken_mib()]
        result.flatten()[:2 ** 25].float().cpu().numpy().tofile(file)
        return answer

    def time(self, mode, count):
        return times(getattr(self, mode), int(count))

    def replay(self, mode, count):
        call = getattr(self, mode)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        return times(graph.replay, int(count))


class Memory:
    """The most that tensors took since this was made, and what the process took from the device, in MiB."""

    def __init__(self):
        if DEVICE != 'cuda':
            return
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before, self.free_before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]

    def taken_mib(self):
        if DEVICE != 'cuda':
            return 0, 0
        taken = torch.cuda.max_memory_allocated() - self.before, self.free_before - torch.cuda.mem_get_info()[0]
        return [taken_bytes / 2 ** 20 for taken_bytes in taken]


def times(call, count):
    if DEVICE != 'cuda':
        begin = time.perf_counter()
        call()
        return [time.perf_counter() - begin]
    seconds = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) * 1e-3)
    return seconds


class Package(Peer):
    """The published package, eager; bf16 is autocast. Routing alone is computed in float, as autocast does, too."""

    drawn = None

    def forget(self):
        self.drawn = None
        return super().forget()

    def make(self, case):
        self.bf16 = case['dtype'] == 'bf16'
        drawn = {key: value for key, value in case.items() if key not in ('dtype', 'descent')}
        if drawn != self.drawn:
            self.drawn = self.call = self.inputs = self.parameters = self.d_out = None
            torch.manual_seed(0)
            self.draw(case)
            self.drawn = drawn

    def context(self):
        return torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16)

    def draw(self, case):
        import colt5_attention
        from reference_cpu import MODULES

        program, batch, length, width = (case[key] for key in ('program', 'batch', 'length', 'width'))
        module, more = nn.Module(), {}
        x_shape = out_shape = (batch, length, width)
        call = None
        if program == 'conditional_routed_image_attention':  # version 0.2.3 has none
            module = module_of(attention_shapes(width, {'norm.gamma': (width,)}))
        elif program == 'conditional_routed_attention' and case['numbers'][0] in (1, 2):  # nor null tokens
            module = module_of(attention_shapes(width, {'norm.weight': (width,), 'norm.bias': (width,)}))
        elif program == 'conditional_routed_autoregressive_attention':
            module = module_of(attention_shapes(width, {'norm.weight': (width,), 'norm.bias': (width,)}))
        elif program in MODULES:
            module = MODULES[program](width, case['numbers'])
            mask = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
            call = lambda x: module(x, mask=mask)
        elif program == 'linear':
            module = nn.Linear(width, case['numbers'][0], bias=False)
            out_shape, call = (batch, length, case['numbers'][0]), module
        elif program == 'local_attention':  # the package has it only as part of the module
            x_shape, out_shape = (batch, length, 3, 8, 64), (batch, length, 8, 64)
        elif program == 'conditional_routed_cross_attention':  # the package fails: it gathers the context's tokens from x
            module = colt5_attention.ConditionalRoutedCrossAttention(width, num_tokens_q=1024, num_tokens_kv=1024)
            more['context'] = torch.randn(batch, case['numbers'][0], width, device=DEVICE)
        elif program == 'top_k':  # here and below: logits (batch, 1, length)
            x_shape = (batch, 1, length)
            call = lambda x: x.topk(case['numbers'][0], dim=-1).indices
        elif program == 'causal_top_k':  # which no package has
            x_shape, out_shape = (batch, 1, length), (batch, 1, case['numbers'][0])
        elif program == 'coordinate_descent':
            n_iters, k, chosen = case['numbers']
            x_shape, out_shape = (batch, 1, length), (batch, 1, chosen or length)
            k = torch.tensor([float(k)], device=DEVICE)

            def call(x):
                scores = colt5_attention.coor_descent(x, n_iters=n_iters, k=k, eps=1.)
                return scores.topk(chosen, dim=-1).values if chosen else scores
        for name, parameter in module.named_parameters():
            if name.endswith('routing_token') and not case['wide_logits']:
                parameter.data *= width ** -0.5
        x = torch.randn(x_shape, device=DEVICE)
        self.d_out = x if x.numel() > LARGE else torch.randn(out_shape, device=DEVICE)
        parameters = {f'module.{name}': parameter for name, parameter in module.named_parameters()}
        inputs = {'x': x} | ({'d_out': self.d_out} if self.d_out is not x else {})
        write_safetensors(case['inputs'], inputs | more | parameters)
        module.to(DEVICE)
        if case['has_peer']:
            self.call, self.inputs, self.parameters = call, [x.detach().requires_grad_()], [*module.parameters()]


def attention_shapes(width, light_norm, inner=512):
    """Of version 0.11"""
    attention = {'to_out.weight': (width, inner)}
    light = light_norm | attention | {'to_qkv.weight': (3 * inner, width)}
    heavy = {'norm.gamma': (width,)} | attention | {'to_q.weight': (inner, width), 'to_kv.weight': (2 * inner, width), 'null_kv': (2, 8, inner // 8)}
    return ({f'light_attn.{name}': shape for name, shape in light.items()} | {f'heavy_attn.{name}': shape for name, shape in heavy.items()}
            | {'null_q_token': (width,), 'q_router.routing_token': (1, width), 'kv_router.routing_token': (1, width)})


def module_of(shapes):
    """A module with random parameters of these names: weights of deviation 1/√in."""
    module = nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split('.')
        part = module
        for step in path:
            if not hasattr(part, step):
                part.add_module(step, nn.Module())
            part = getattr(part, step)
        part.register_parameter(last, nn.Parameter(torch.randn(shape) * (shape[-1] ** -0.5 if last == 'weight' else 1)))
    return module


class Tuned(Peer):
    built = None

    def forget(self):
        self.built = self.module = self.select = None
        torch._dynamo.reset()
        return super().forget()

    def make(self, case):
        import tuned_torch as tuned

        self.inputs = self.d_out = None
        dtype = torch.bfloat16 if case['dtype'] == 'bf16' else torch.float32
        tensors = {name: torch.from_numpy(values).to(DEVICE, dtype) for name, values in read_safetensors(case['inputs']).items()}
        # What is compiled does not know of the descent.
        build = {field: case[field] for field in ('program', 'batch', 'length', 'width', 'dtype')}
        if case['program'] != 'conditional_routed_transformer_block':
            build['numbers'] = case['numbers']
        if build != self.built:
            self.built = self.call = self.module = None
            torch._dynamo.reset()
            self.select = tuned.Selection()
            self.build(case, dtype)
            self.module.to(DEVICE, dtype)
            self.built = build
        self.select.descent = case['descent']
        where = {'conditional_routed_transformer_block': 1, 'coordinate_descent': 0}.get(case['program'])
        self.select.steps = 50 if where is None else case['numbers'][where]
        self.module.load_state_dict({name.removeprefix('module.'): tensor for name, tensor in tensors.items()
                                     if name.startswith('module.')}, strict=case['program'] not in ('light_attention', 'conditional_routed_attention', 'conditional_routed_autoregressive_attention'))
        self.inputs = [tensors[name].requires_grad_() for name in ('x', 'context') if name in tensors]
        self.d_out = tensors.get('d_out', tensors['x'].detach())
        used = lambda name: case['program'] != 'conditional_routed_cross_attention' or not name.startswith('q_router')
        self.parameters = [parameter for name, parameter in self.module.named_parameters() if used(name)]

    def build(self, case, dtype):
        """Sets call, and the module that has its weights."""
        import tuned_torch as tuned

        program, length, width, numbers = (case[field] for field in ('program', 'length', 'width', 'numbers'))
        self.module = nn.Module()
        if program == 'conditional_routed_transformer_block':
            self.call = self.module = tuned.TunedBlock(width, tuned.LocalAttention(length, dtype, DEVICE), self.select)
        elif program == 'light_attention':
            turn = tuned.Rotary(length, DEVICE) if numbers and numbers[0] else None
            bias = tuned.RelativePositionBias(DEVICE) if len(numbers) > 1 and numbers[1] else None
            self.call = self.module = tuned.LightAttention(width, tuned.LocalAttention(length, dtype, DEVICE, bias), turn, bias)
        elif program == 'local_attention':
            self.call = tuned.LocalAttention(length, dtype, DEVICE)
        elif program == 'conditional_routed_feed_forward':
            self.call = tuned.TunedFeedForward(width, self.select)
            self.module = self.call.conditional_ff
        elif program == 'conditional_routed_cross_attention':
            self.call = self.module = tuned.TunedCrossAttention(width, self.select)
        elif program == 'paper_block':
            import paper_torch

            def descent(logits, k):
                return tuned.coordinate_descent(logits, paper_torch.ITERATIONS, logits.new_full((logits.shape[0],), k), paper_torch.EPS)
            self.call = self.module = module = paper_torch.PaperBlock(width, descent, tuned.compiled)
            bias = module.conditional_attn.light_attn.relative_attention_bias
            module.attend = tuned.LocalAttention(length, dtype, DEVICE, bias.within_reach, paper_torch.REACH,
                                                 lambda qkv, of_distance: paper_torch.banded_attention(qkv, bias.weight))
        elif program == 'conditional_routed_attention':  # the package 0.11 as it is, here and below
            from colt5_attention.transformer_block import ConditionalRoutedAttention
            self.call = self.module = ConditionalRoutedAttention(width, num_heavy_tokens_q=1024, num_heavy_tokens_kv=1024,
                                                                 rotary_emb=numbers[0] == 2)
        elif program == 'conditional_routed_image_attention':  # it routes in each window
            from colt5_attention.transformer_block import ConditionalRoutedImageAttention
            module = self.module = ConditionalRoutedImageAttention(width, num_heavy_tokens_q=16, num_heavy_tokens_kv=16, light_window_size=16)
            self.call = lambda x: module(x.unflatten(1, (math.isqrt(length), -1))).flatten(1, 2)
        elif program == 'conditional_routed_autoregressive_attention':
            from colt5_attention.transformer_block import ConditionalRoutedAutoregressiveAttention
            self.call = self.module = ConditionalRoutedAutoregressiveAttention(
                width, num_heavy_tokens_q=32, num_heavy_tokens_kv=1024, use_flash_attn=True)
        elif program == 'linear':
            self.call = self.module = nn.Linear(width, numbers[0], bias=False)
        elif program == 'top_k':
            self.call = lambda x: x.topk(numbers[0], dim=-1).indices
        elif program == 'coordinate_descent':
            def call(x):
                scores = self.select.scores(x.flatten(0, 1)).view_as(x)
                return scores.topk(numbers[2], dim=-1).values if numbers[2] else scores
            self.call = call


def serve(peer):
    answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what PyTorch prints is no answer
    print(f'ready PyTorch {torch.__version__}', file=answers, flush=True)
    for line in sys.stdin:
        command, _, rest = line.strip().partition(' ')
        try:
            if command == 'prepare':
                peer.prepare(json.loads(rest))
                answer = []
            else:
                answer = getattr(peer, command)(*rest.split())
        except Exception as error:
            answer = ['refused', type(error).__name__, ' '.join(str(error).split())[:300]]
        if DEVICE == 'cuda':  # the other sides need the memory; here an error, which held what had been computed, is gone
            gc.collect()
            torch.cuda.empty_cache()
        print(*answer, file=answers, flush=True)


if __name__ == '__main__':
    serve(Tuned() if sys.argv[1:] == ['tuned'] else Package())
