# SPDX-License-Identifier: MIT
"""What cpu.py and gpu.py share: operation counts, the two sides of a comparison, files of tensors, tables."""
import contextlib
import dataclasses
import json
import math
import os
import struct
import subprocess

import numpy

FLAGSHIP = dict(inner=512, window=128, k=1024, light_mult=0.5, heavy_mult=4)
SMALL = dict(inner=128, window=64, k=64, light_mult=0.5, heavy_mult=4)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The least that one pass over some data must do: floating-point operations, and elements read or written."""
    flop: float
    elements: float


def total_flop(kernels):
    return sum(kernel.flop for kernel in kernels)


# The functions below give the kernels of a forward pass and those that a backward pass adds.

def linear_kernels(rows, width, out):
    flop, elements = 2 * rows * width * out, rows * (width + out)
    return [Kernel(flop, elements)], [Kernel(flop, elements), Kernel(flop, elements)]


def local_attention_kernels(b, n, inner, window):
    """The backward pass computes the scores again."""
    scores = 2 * b * n * (window + 1) * inner
    return [Kernel(2 * scores, b * n * 4 * inner)], [Kernel(5 * scores, b * n * 8 * inner)]


def together(*parts):
    return tuple(sum((part[i] for part in parts), []) for i in (0, 1))


def light_attention_kernels(b, n, d, inner, window, **_):
    norm = [], [Kernel(0, 3 * b * n * d)]  # forward, it is part of the product that follows
    return together(norm, linear_kernels(b * n, d, 3 * inner), local_attention_kernels(b, n, inner, window),
                    linear_kernels(b * n, inner, d))


def route_kernels(b, n, d):
    """The logits, which the kernel that reads the tokens anyway can compute."""
    return [Kernel(2 * b * n * d, 0)], [Kernel(4 * b * n * d, 0)]


def feed_forward_kernels(b, n, d, k, light_mult, heavy_mult, **_):
    """Hidden layers stay on the chip."""
    def two_layers(tokens, mult):
        flop, elements = 4 * tokens * d * d * mult, tokens * 2 * d
        return [Kernel(flop, elements)], [Kernel(2 * flop, 2 * elements)]
    return together(two_layers(b * n, light_mult), two_layers(b * min(n, k), heavy_mult), route_kernels(b, n, d))


def heavy_attention_kernels(b, d, q, kv, inner):
    scores = 2 * b * q * kv * inner
    heavy = [Kernel(2 * scores, b * (q + kv) * 2 * inner)], [Kernel(5 * scores, b * (q + kv) * 4 * inner)]
    return together(heavy, linear_kernels(b * q, d, inner), linear_kernels(b * kv, d, 2 * inner), linear_kernels(b * q, inner, d))


def attention_kernels(b, n, d, **config):
    k = min(n, config['k'])
    return together(light_attention_kernels(b, n, d, **config), heavy_attention_kernels(b, d, k, k, config['inner']),
                    route_kernels(b, n, d), route_kernels(b, n, d))


def autoregressive_attention_kernels(b, n, d, q, kv, window, inner):
    """Windows of q queries and kv keys; keys and values are computed once for each token."""
    windows = b * n // window
    scores = 2 * windows * q * kv * inner
    heavy = [Kernel(2 * scores, b * n * 2 * inner)], [Kernel(5 * scores, b * n * 4 * inner)]
    return together(light_attention_kernels(b, n, d, inner, 2 * window), heavy, linear_kernels(b * n, d, 2 * inner),
                    linear_kernels(windows * q, d, inner), linear_kernels(windows * q, inner, d), route_kernels(b, n, d),
                    route_kernels(b, n, d))


def block_kernels(b, n, d, **config):
    return together(attention_kernels(b, n, d, **config), feed_forward_kernels(b, n, d, **config))


def ragged_kernels(batch, total, d, **config):
    """The block on the sequences of module/ragged_batch.cpp, without padding."""
    longest = 2 * total // (batch + 1)
    return together(*(block_kernels(1, b * longest // batch, d, **config) for b in range(1, batch + 1)))


def paper_block_kernels(b, n, d):
    def gated(tokens, hidden):
        flop, elements = 6 * tokens * d * hidden, tokens * 2 * d
        return [Kernel(flop, elements)], [Kernel(2 * flop, 2 * elements)]
    return together(light_attention_kernels(b, n, d, inner=256, window=254), heavy_attention_kernels(b, d, n // 16, n // 8, 512),
                    gated(b * n, d // 2), gated(b * (n // 16), 4 * d), *3 * [route_kernels(b, n, d)])


class ProcessEnded(Exception):
    pass


class Refused(Exception):
    """A side says that it cannot do what it was asked for."""


class Process:
    """One side of a comparison; see measure.hpp for what it answers."""

    def __init__(self, arguments, environment={}):
        self.child = subprocess.Popen([str(argument) for argument in arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      text=True, env=os.environ | environment)
        self.library = self.answer().removeprefix('ready ')

    def answer(self):
        line = self.child.stdout.readline()
        if not line:
            raise ProcessEnded(f'{" ".join(self.child.args)} ended with status {self.child.wait()}')
        if line.startswith('refused '):
            raise Refused(line.removeprefix('refused ').strip())
        return line.strip()

    def send(self, *words):
        try:
            print(*words, file=self.child.stdin, flush=True)
        except BrokenPipeError:
            raise ProcessEnded(f'{" ".join(self.child.args)} has ended with status {self.child.wait()}') from None

    def ask(self, *words):
        self.send(*words)
        return [float(word) for word in self.answer().split()]

    def first(self, mode, file):
        return self.ask('first', mode, file)

    def end(self):
        self.child.stdin.close()
        self.child.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()
        with contextlib.suppress(BrokenPipeError):  # what was sent last has not been read
            self.child.stdin.close()
        self.child.stdout.close()


def write_safetensors(path, tensors):
    """PyTorch tensors, as float32."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {'dtype': 'F32', 'shape': list(tensor.shape), 'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    with open(path, 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text)
        for tensor in tensors.values():
            tensor.detach().float().cpu().contiguous().numpy().tofile(file)


def read_safetensors(path):
    """NumPy arrays by name, from a file of write_safetensors."""
    with open(path, 'rb') as file:
        size, = struct.unpack('<Q', file.read(8))
        header = json.loads(file.read(size))
    return {name: numpy.fromfile(path, numpy.float32, math.prod(entry['shape']),
                                 offset=8 + size + entry['data_offsets'][0]).reshape(entry['shape'])
            for name, entry in header.items()}


def time_text(seconds, spread=None):
    if seconds is None:
        return ''
    scale, unit = (1, 's') if seconds >= 1 else (1e3, 'ms') if seconds >= 1e-3 else (1e6, 'µs')
    text = f'{seconds * scale:.3g} {unit}'
    return text if spread is None else f'{text} ± {50 * spread / seconds:.0f} %'


def ratio(a, b, text='{:.2f} ×'):
    return text.format(a / b) if a is not None and b is not None and b > 0 else ''


def mib_text(mib):
    return '' if mib is None else f'{mib:.1f}' if mib < 10 else f'{mib:.0f}'


def print_table(header, rows):
    rows = [header, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in rows]
    lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    print('\n'.join(lines) + '\n')
