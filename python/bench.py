# SPDX-License-Identifier: MIT
"""bench.py [--quick | --cuda [FILE]]: what a call from Python costs beyond the C++ call, and the block of the package's README against
the package, forward and backward on two threads. With --cuda only this block of ours, in bfloat16 on a GPU, as it is and as a CUDA
graph, also as JSON to FILE; `block` of ./dev bench gpu is the same in C++, and its time is that of the faster way. Needs colt5 and
colt5-attention; ./dev python installs both into build/peer."""
import datetime
import json
import pathlib
import statistics
import sys
import time

import colt5
import torch
from colt5 import library


def microseconds(call, repeats=2000, rounds=10, clock=time.thread_time):
    """Of the fastest of some rounds, in the time of this thread: others on the machine do not count."""
    best = float('inf')
    for _ in range(rounds):
        start = clock()
        for _ in range(repeats // rounds):
            call()
        best = min(best, (clock() - start) / (repeats // rounds))
    return best * 1e6


class Recorder:
    """In place of a library's function: remembers the arguments of its last call."""

    def __init__(self, function):
        self.function = function

    def __call__(self, arguments):
        self.arguments = arguments
        return self.function(arguments)


def overhead():
    torch.set_num_threads(1)
    module, x = colt5.ConditionalRoutedTransformerBlock(
        64, num_heavy_attn_tokens_q=4, num_heavy_attn_tokens_kv=4, num_heavy_ff_tokens=4, light_dim_head=8, light_heads=4,
        light_window_size=16, heavy_dim_head=8, heavy_heads=4), torch.randn(1, 8, 64)
    with torch.no_grad():
        module(x)
        lib = library.Library.all[-1]
        recorder = lib._forward = Recorder(lib._forward)
        out = module(x)  # stays, so that its memory may be written to
        lib._forward = recorder.function
        bare = microseconds(lambda: recorder.function(recorder.arguments))
        call = microseconds(lambda: module(x))
    print(f'block of {sum(1 for _ in module.parameters())} parameters, 8 tokens, 1 thread, forward: {call:.1f} µs in Python, '
          f'{bare:.1f} µs in C++: {call - bare:.1f} µs more; out {tuple(out.shape)}')
    tensors = [x.requires_grad_(), *module.parameters()]

    def step(call, retain_graph=False):
        out = call(*tensors)
        return out, torch.autograd.grad(out, tensors, out, retain_graph=retain_graph)

    lib._forward, lib._backward = forward, backward = Recorder(lib._forward), Recorder(lib._backward)
    graph, grads = step(lambda *_: module(x), retain_graph=True)  # stay, as out does
    lib._forward, lib._backward = forward.function, backward.function

    def bare_step():
        library.tensor_of_handle(lib._as_tensor(forward.function(forward.arguments)))
        backward.function(backward.arguments)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return tensors[0].clone()

        @staticmethod
        def backward(ctx, _):
            return ctx.saved_tensors and grads

    bare, call = microseconds(bare_step), microseconds(lambda: step(lambda *_: module(x)))
    nothing = microseconds(lambda: step(Nothing.apply))
    print(f'forward and backward: {call:.0f} µs in Python, {bare:.0f} µs in C++: {call - bare:.0f} µs more; a function of as many '
          f'tensors that does nothing: {nothing:.0f} µs; out {tuple(graph.shape)}')


def block_module(package):
    torch.manual_seed(0)
    module = package.ConditionalRoutedTransformerBlock(
        dim=512, light_dim_head=64, light_heads=8, light_window_size=128, heavy_dim_head=64, heavy_heads=8, light_ff_mult=0.5,
        heavy_ff_mult=4, num_heavy_ff_tokens=1024, num_heavy_attn_tokens_q=1024, num_heavy_attn_tokens_kv=1024)
    for name, p in module.named_parameters():
        if 'routing_token' in name:
            p.data /= 512 ** 0.5
    return module


def block(package, length):
    module = block_module(package)
    x, mask = torch.randn(2, length, 512).requires_grad_(), torch.ones(2, length, dtype=torch.bool)

    def step():
        module.zero_grad()
        x.grad = None
        module(x, mask=mask).sum().backward()
    return step


def against_the_package(length, rounds):
    import colt5_attention

    torch.set_num_threads(2)
    steps = {package.__name__: block(package, length) for package in (colt5, colt5_attention)}
    wall, cpu = {name: [] for name in steps}, {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter(), time.process_time()
            step()
            wall[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
    for name in steps:
        print(f'{name}, README block at 2 × {length}, forward and backward, 2 threads: {statistics.median(wall[name]):.2f} s, '
              f'{statistics.median(cpu[name]):.2f} s of processors')
    for what, times in ('time', wall), ('time of processors', cpu):
        print(f'{what}: {statistics.median(times["colt5_attention"]) / statistics.median(times["colt5"]):.2f} times faster')


def on_gpu(file=None, rounds=50):
    module = block_module(colt5).cuda().bfloat16()
    x, d_out = (torch.randn(2, 32768, 512, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()

    def forward():
        with torch.no_grad():
            module(x)

    def forward_backward():
        module.zero_grad()
        x.grad = None
        module(x).backward(d_out)

    def milliseconds(call):
        times = []
        for _ in range(rounds):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            call()
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
        return statistics.median(times)

    rows = {}
    for call in forward, forward_backward:
        launched = milliseconds(call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        in_graph = milliseconds(graph.replay)
        rows[call.__name__] = {'launched_ms': round(launched, 4), 'graph_ms': round(in_graph, 4)}
        print(f'README block at 2 × 32768 in bfloat16, {call.__name__}: {launched:.3f} ms, as a CUDA graph {in_graph:.3f} ms, '
              f'on {torch.cuda.get_device_name()}')
    if file is not None:
        about = {'command': 'python/bench.py --cuda', 'date': datetime.date.today().isoformat(), 'device': torch.cuda.get_device_name(),
                 'pytorch': torch.__version__, 'cuda': torch.version.cuda, 'rounds': rounds}
        pathlib.Path(file).write_text(json.dumps({**about, 'rows': rows}, indent=1) + '\n')


if sys.argv[1:2] == ['--cuda']:
    on_gpu(*sys.argv[2:3])
else:
    overhead()
    against_the_package(4096 if '--quick' in sys.argv else 32768, 3)
