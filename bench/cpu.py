#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times the flagship block and its pieces on this machine's CPU: ours, and the published PyTorch package beside it.

    ./dev bench cpu [--quick] [--json FILE] [--threads N] [--only PATTERN] [--shrink N]

The flagship is the block of the reference's README: b 2, n 32768, d 512, 8 × 64 light heads with window 128, 8 × 64 heavy
heads, 1024 routed queries, keys and feedforward tokens, all-true mask, float.

How it is measured
- Each case starts one process of ours (op/, module/) and one of PyTorch (reference_cpu.py), with the same weights, inputs and
  mask, and the same number of threads, bound to cores. Inputs are random normal; a backward pass starts from a random
  gradient and gives the gradients of all parameters and of the input, on both sides. The result of every row is compared:
  `differs` is the largest difference over the largest entry.
- The two take turns, one call at a time or, if a call is short, as many as take a twentieth of a second. Before a turn
  come as many calls that are not counted, unless we are alone with calls of more than half a second: the other side has left
  its own data in the caches, and a virtual machine takes back memory that PyTorch has freed meanwhile. Times are medians after a first call of the same size; ± is half of the range over the median. Where a turn of both takes
  more than a minute, there is one. Only with --quick is a first call that takes more than 2 s timed itself; PyTorch then
  had a shorter call before it.
- Memory is the peak of the resident memory in that first call over what the process held before any: weights and inputs,
  and on PyTorch's side what a short call left behind, such as loaded kernels.
- Routing tokens are scaled by 1/√d, so that logits have unit deviation. At the package's own initialization, with logits
  of deviation √d, many scores saturate at 1 and which of them the package routes is arbitrary: rows `… (own init)` are
  timed, but their results may differ.
- The floor of a row is its number of floating-point operations at the rate of the best BLAS at hand, OpenBLAS or else
  Eigen, on matrices of 2048 × 2048 and the same number of threads. It takes turns with the two sides: the rate is the
  median of the products made between their calls, since the clock of a processor that others use, too, wanders. Our own
  products may beat it. Routing and choosing have no floor.
- The rows `attention_null_tokens`, `attention_rotary` and `image_attention_per_window` stand beside version 0.11 of the package,
  whose defaults they have; `light_attention_bias`, `attention_in_blocks` and `image_attention`, which no version can run, beside
  attention_torch.py; `paper_block` beside paper_torch.py; all others beside 0.2.3.
- The rows `block_k16_…` route 16 tokens whatever the length, so that the work of a token does not depend on it.
- The rows `ragged_…` are sequences of 512, 1024, …, 8192 tokens, or 2048 with --quick: packed, padded with a mask, as PyTorch has them
  in the first row, and as many tokens in sequences of one length; each routes 256 tokens. The floor is that of the real tokens.
- The rows `decode_step_…` are one more token of a sequence of 10,000 or 1,000,000, from a cache (module/decode.cpp).
- A row without PyTorch's columns is only ours.

--json FILE writes {processor, cores, threads, …, rows}, rows being {name, ours_s, peer_s, floor_s, ours_mib, peer_mib, …}
with null for what is not there.
"""
import argparse
import contextlib
import dataclasses
import datetime
import fnmatch
import json
import math
import os
import pathlib
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

import numpy

from common import (FLAGSHIP, SMALL, Process, ProcessEnded, attention_kernels, autoregressive_attention_kernels, block_kernels, feed_forward_kernels,
                    heavy_attention_kernels, light_attention_kernels, linear_kernels, mib_text, paper_block_kernels, print_table,
                    ragged_kernels, ratio, time_text, together, total_flop)


@dataclasses.dataclass
class Case:
    name: str
    program: str
    batch: int
    length: int
    width: int = 512
    numbers: tuple = ()
    kernels: tuple = ((), ())  # forward, backward
    backward: bool = True
    wide_logits: bool = False
    peer: bool = True
    version: str = '0.2.3'  # of the package; of 0.11 in the folder --peers-dir
    one_thread: bool = False  # ours on one thread takes turns, too
    threads: int = 0  # 0: as many as --threads says

    @property
    def modes(self):
        return ('forward', 'forward_backward') if self.backward else ('forward',)

    def mode_flop(self, mode):
        forward, backward = map(total_flop, self.kernels)
        return forward + backward * (mode == 'forward_backward') or None


def linear(batch, length, width, out, name='linear', **options):
    return Case(f'{name}_{batch * length}x{width}x{out}', 'linear', batch, length, width, (out,),
                linear_kernels(batch * length, width, out), **options)


def block(name, batch, length, width=512, k=None, **options):
    config = (SMALL if width == 128 else FLAGSHIP) | ({} if k is None else {'k': k})
    return Case(name, 'conditional_routed_transformer_block', batch, length, width, (width, 50, k or 0),
                block_kernels(batch, length, width, **config), **options)


def attention(name, form, length, **options):
    return Case(name, 'conditional_routed_attention', 1, length, numbers=(form,),
                kernels=attention_kernels(1, length, 512, **FLAGSHIP), **options)


def image_attention(name, side, per_window, **options):
    windows, k = ((side // 16) ** 2, 16) if per_window else (1, 1024)
    kernels = together(light_attention_kernels(1, side ** 2, 512, **FLAGSHIP | {'window': 255}),
                       heavy_attention_kernels(windows, 512, k, k, 512))
    return Case(name, 'conditional_routed_image_attention', 1, side ** 2, numbers=(int(per_window),), kernels=kernels, **options)


def cases(quick, shrink):
    """Shorter sequences with --quick, except for the flagship. Growth runs on until the memory does."""
    full, piece = (max(2048, n // shrink) for n in (32768, 8192 if quick else 32768))  # the package wants n >= k
    descent = dict(batch=2, length=full, width=1, threads=1)
    yield linear(2, piece, 512, 1536)
    if not quick:
        yield linear(2, piece, 512, 512)
        yield linear(2, piece, 512, 256)
    yield linear(1, 4096 // shrink, 2048, 2048, backward=False)
    if not quick:
        yield linear(2, piece, 512, 1536, 'linear_one_thread', threads=1)
    yield Case('top_k_1024', 'top_k', numbers=(1024,), backward=False, **descent)
    for n_iters in (50,) if quick else (50, 20):
        yield Case(f'coordinate_descent_{n_iters}', 'coordinate_descent', numbers=(n_iters, 1152, 0), **descent)
        yield Case(f'routing_{n_iters}', 'coordinate_descent', numbers=(n_iters, 1152, 1024), **descent)
    yield Case('causal_routing', 'causal_top_k', numbers=(1024,), peer=False, **descent)
    yield Case('routing_50_one_row', 'coordinate_descent', numbers=(50, 1152, 1024), **(descent | dict(batch=1)))
    for n in (40000,) if quick else (10000, 40000):
        yield Case(f'many_tensors_{n}', 'many_tensors', 1, n, 1, backward=False, threads=1)
    yield Case('light_attention', 'light_attention', 2, piece, kernels=light_attention_kernels(2, piece, 512, **FLAGSHIP))
    yield Case('light_attention_rotary', 'light_attention', 2, piece, numbers=(1,),
               kernels=light_attention_kernels(2, piece, 512, **FLAGSHIP))
    yield Case('light_attention_bias', 'light_attention', 2, piece, numbers=(0, 1),
               kernels=light_attention_kernels(2, piece, 512, **FLAGSHIP))
    yield Case('feed_forward', 'conditional_routed_feed_forward', 2, piece,
               kernels=feed_forward_kernels(2, piece, 512, **FLAGSHIP))
    if not quick:
        shorter = max(2048, 8192 // shrink)
        yield attention('attention', 0, shorter)
        yield attention('attention_null_tokens', 1, shorter, version='0.11')
        yield attention('attention_rotary', 2, shorter, version='0.11')
        yield attention('attention_in_blocks', 3, shorter // 2048 * 2048)
        yield Case('autoregressive_attention', 'conditional_routed_autoregressive_attention', 1, 2048,
                   kernels=autoregressive_attention_kernels(1, 2048, 512, 32, 1024, 128, 512), version='0.11')
        side = 16 * max(2, 6 // shrink)
        yield image_attention('image_attention', side, False, version='0.11')
        yield image_attention('image_attention_per_window', side, True, version='0.11')
        yield Case('paper_block', 'paper_block', 1, shorter, 768, (shorter,), paper_block_kernels(1, shorter, 768))
    yield block('small_block', 1, 256, 128)
    for n in (1024, 8192) if quick else (1024, 4096, 16384, 32768):
        yield block(f'block_n{n}', 1, max(1024, n // shrink))
    yield block('block', 2, full)
    sequences, longest = (4, 2048) if quick else (16, max(1024, 8192 // shrink))
    total = longest * (sequences + 1) // 2
    for name, form in (('ragged_packed', 0), ('ragged_padded', 1), ('ragged_uniform', 2)):
        yield Case(name, 'ragged_batch', 1, total, numbers=(sequences, form), peer=form == 0,
                   kernels=ragged_kernels(sequences, total, 512, **FLAGSHIP | {'k': 256}))
    for name, past in (('decode_step_10k', 10_000), ('decode_step_1m', 1_000_000)):
        if not (quick and past > 10_000):
            yield Case(name, 'decode', 1, 1, numbers=(past // shrink,), backward=False, peer=False)
    if not quick:
        yield block('block_own_init', 2, full, wide_logits=True)
        yield block('block_n131072', 1, 131072 // shrink, peer=False)
    lengths = (1024, 8192, 32768, 131072) if quick else (1024, 4096, 16384, 32768, 131072, 1048576)
    for n in lengths:
        yield block(f'block_k16_n{n}', 1, max(1024, n // shrink), k=16, peer=False, one_thread=n == 32768)


def difference(ours, peer):
    """The largest difference over the largest entry, among the numbers that ours has written."""
    ours, peer = (numpy.fromfile(file, numpy.float32) for file in (ours, peer))
    peer = peer[:ours.size]
    return float(numpy.abs(ours - peer).max() / numpy.abs(peer).max())


def bound(threads):
    """The environment of a process: its threads stay on the cores that they start on."""
    return {'OMP_NUM_THREADS': str(threads), 'OMP_PROC_BIND': 'true'}


# Of our own programs, which call a BLAS from each of their threads (docs/blas.md).
serial_blas = {'OPENBLAS_NUM_THREADS': '1'}


class Bench:
    def __init__(self, build_dir, peers_dir, threads, quick, folder):
        self.build_dir, self.peers_dir, self.threads, self.quick, self.folder = build_dir, peers_dir, threads, quick, folder
        self.rows = []
        self.libraries = {}
        self.products = {}  # by the number of threads: one process for each program that multiplies

    def run(self, case):
        threads = case.threads or self.threads
        environment = bound(threads)
        inputs = self.folder / 'inputs.safetensors'
        reference = pathlib.Path(__file__).with_name('reference_cpu.py')
        options = ['--wide-logits'] * case.wide_logits + ['--forward-only'] * (not case.backward) + ['--inputs-only'] * (not case.peer)
        with contextlib.ExitStack() as stack:
            peer = stack.enter_context(Process([sys.executable, reference, case.program, inputs, threads, case.batch,
                                                case.length, case.width, *case.numbers, *options],
                                               environment | self.path_of(case.version)))
            if not case.peer:
                peer.end()  # it has written the inputs
            ours = stack.enter_context(
                Process([self.build_dir / 'bench' / case.program, inputs, threads, *case.numbers],
                        environment | serial_blas))
            sides = {'ours': ours} | ({'peer': peer} if case.peer else {})
            if case.one_thread:
                sides['one_thread'] = stack.enter_context(
                    Process([self.build_dir / 'bench' / case.program, inputs, 1, *case.numbers],
                            bound(1) | serial_blas))
            inputs.unlink()
            self.libraries |= {'ours': ours.library, 'peer': peer.library}
            for mode in case.modes:
                self.rows.append(self.measure(case, mode, threads, sides))

    def path_of(self, version):
        if version == '0.2.3':
            return {}
        return {'PYTHONPATH': os.pathsep.join([str(self.peers_dir / version), *filter(None, [os.environ.get('PYTHONPATH')])])}

    def measure(self, case, mode, threads, sides):
        first, mib = {}, {}
        for side, process in sides.items():
            first[side], mib[side] = process.first(mode, self.folder / side)
        samples = {side: [] for side in sides}
        taking_turns = list(sides)
        if self.quick and case.peer and first['peer'] > 2:
            samples['peer'].append(first['peer'])
            taking_turns.remove('peer')
        counts = {side: math.ceil(0.05 / seconds) for side, seconds in first.items()}
        round_s = sum(counts[side] * first[side] for side in taking_turns)
        least, most, budget_s = (1, 5, 1) if self.quick else (5 if case.one_thread else 3, 9, 4)
        rates = [self.rates(threads)]
        for _ in range(min(most, max(1 if round_s > 60 else least, round(budget_s / round_s)))):
            for side in taking_turns:
                if case.peer or first[side] < 0.5:
                    sides[side].ask('time', mode, counts[side])
                samples[side] += sides[side].ask('time', mode, counts[side])
            rates.append(self.rates(threads))
        row = {'name': f'{case.name}_{mode}'}
        if case.one_thread:
            row['one_thread_s'] = statistics.median(samples['one_thread'])
        flop, rate = case.mode_flop(mode), {name: statistics.median(each[name] for each in rates) for name in rates[0]}
        for field, value in (('s', lambda side: statistics.median(samples[side])), ('mib', mib.get),
                             ('spread_s', lambda side: max(samples[side]) - min(samples[side]))):
            row |= {f'{side}_{field}': value(side) if side in sides else None for side in ('ours', 'peer')}
        return row | {
            'floor_s': flop and flop / rate.get('OpenBLAS', rate['Eigen']), 'rates': rate,
            'difference': difference(self.folder / 'ours', self.folder / 'peer') if case.peer else None,
            'repetitions': len(samples['ours']), 'batch': case.batch, 'length': case.length, 'width': case.width,
            'threads': threads, 'flop': flop}

    def fits(self, case):
        """Whether the next longer block fits into memory, judging by the shorter ones before it."""
        name = case.name.rstrip('0123456789')
        mib_per_token = [row['ours_mib'] / row['length'] for row in self.rows
                         if fnmatch.fnmatch(row['name'], f'{name}*_{case.modes[-1]}')]
        inputs_mib = len(case.modes) * case.length * case.width * 4 / 2 ** 20
        with open('/proc/meminfo') as info:
            available_mib = next(int(line.split()[1]) / 1024 for line in info if line.startswith('MemAvailable:'))
        return not mib_per_token or mib_per_token[-1] * case.length + inputs_mib < 0.85 * available_mib

    def rates(self, threads):
        """Operations per second by what multiplies, now, on that many threads."""
        if threads not in self.products:
            self.products[threads] = [subprocess.Popen([program, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                       text=True, bufsize=1, env=os.environ | bound(threads) | serial_blas)
                                      for program in map((self.build_dir / 'bench').joinpath, ('sgemm', 'sgemm_openblas'))
                                      if program.exists()]
            self.rates(threads)  # the first products are slower
        rates = {}
        for process in self.products[threads]:
            process.stdin.write('\n')
            words = process.stdout.readline().split()
            rates |= {name: float(rate) * 1e9 for name, rate in zip(words[::2], words[1::2])}
        return rates

    def end(self):
        for process in sum(self.products.values(), []):
            process.communicate()


def growth(bench, k, mode):
    """The rows of one block and lengths that grow, with the flagship's k or 16."""
    return [row for row in bench.rows if re.fullmatch(rf'block{"_k16" if k == 16 else ""}_n\d+_{mode}', row['name'])]


def goals(bench):
    """What is wanted, what was measured, and whether it is enough: whatever of it this run has measured."""
    by_name = {row['name']: row for row in bench.rows}

    def number(name, field):
        return by_name.get(name, {}).get(field)

    def quotient(a, b):
        return a / b if a is not None and b else None

    def of(numerator, denominator):
        return quotient(number(*numerator), number(*denominator))

    table = []

    def add(text, value, most=None, least=None, form='{:.2f}'):
        if value is not None:
            wanted = f'≤ {most:g}' if least is None else f'≥ {least:g}' if most is None else f'{least:g} … {most:g}'
            good = (most is None or value <= most) and (least is None or value >= least)
            table.append([text, wanted, form.format(value), 'yes' if good else 'no'])

    for mode, floor in (('forward', 1.25), ('forward_backward', 1.35)):
        row = f'block_{mode}'
        words = mode.replace('_backward', ' and backward')
        add(f'block, {words}: time over floor', of((row, 'ours_s'), (row, 'floor_s')), most=floor)
        add(f'block, {words}: times faster than the package', of((row, 'peer_s'), (row, 'ours_s')), least=2.5)
        add(f'small block, {words}: times faster than the package',
            of((f'small_{row}', 'peer_s'), (f'small_{row}', 'ours_s')), least=10)
        add(f'block of 32768 tokens, {words}: {bench.threads} threads over one, times faster',
            of((f'block_k16_n32768_{mode}', 'one_thread_s'), (f'block_k16_n32768_{mode}', 'ours_s')),
            least=1.9 if bench.threads == 2 else None, most=None if bench.threads == 2 else bench.threads)
    for mode in ('forward', 'forward_backward'):
        add(f'ragged batch, {mode.replace("_backward", " and backward")}: time over that of the padded batch',
            of((f'ragged_packed_{mode}', 'ours_s'), (f'ragged_padded_{mode}', 'ours_s')), most=0.7 if bench.quick else 0.6)
        add(f'light attention, {mode.replace("_backward", " and backward")}: time with a relative position bias over that without',
            of((f'light_attention_bias_{mode}', 'ours_s'), (f'light_attention_{mode}', 'ours_s')), most=1.15)
        add(f'strictly causal routing, {mode.replace("_backward", " and backward")}: time over that of descent and top-k',
            of((f'causal_routing_{mode}', 'ours_s'), (f'routing_50_{mode}', 'ours_s')), most=1.3)
    # With logits as wide as the package draws them, scores of 1 tie, and it breaks ties as it likes.
    differences = [row['difference'] for row in bench.rows if row['difference'] is not None and 'own_init' not in row['name']]
    add('largest difference between a result and the package\'s', max(differences, default=None), most=1e-4, form='{:.1e}')
    add('decoding: time of a token behind 1,000,000 over that behind 10,000',
        of(('decode_step_1m_forward', 'ours_s'), ('decode_step_10k_forward', 'ours_s')), most=1.15)
    add('block: memory over that of the package', of(('block_forward_backward', 'ours_mib'),
                                                     ('block_forward_backward', 'peer_mib')), most=0.2)
    for mode, most in (('forward', 1.5), ('forward_backward', 1.5 + 2.5)):
        for n_iters in (20, 50):
            seconds = number(f'routing_{n_iters}_{mode}', 'ours_s')
            words = mode.replace('_backward', ' and backward')
            add(f'routing of 2 × 32768 on one core, {n_iters} iterations, {words}, ms', seconds and seconds * 1e3, most=most)
    add('40000 tensors: time a tensor over that of 10000', quotient(
        of(('many_tensors_40000_forward', 'ours_s'), ('many_tensors_10000_forward', 'ours_s')), 4), most=2)
    for mode in ('forward', 'forward_backward'):
        a_token = {row['length']: row['ours_s'] / row['length'] for row in growth(bench, 16, mode)}
        for length in a_token:
            if length != 32768 and 32768 in a_token:
                add(f'block_k16_n{length}_{mode}: time a token over that at 32768', a_token[length] / a_token[32768],
                    most=1.1, least=0.9)
    return table


def about(bench):
    """Where and with what the rows were measured."""
    fields = {}
    with open('/proc/cpuinfo') as info:
        for line in info:
            name, _, value = line.partition(':')
            fields.setdefault(name.strip(), value.strip())
    return {'processor': fields.get('model name', platform.machine()),
            'family_model': ' '.join(fields.get(name, '?') for name in ('cpu family', 'model')),
            'cores': os.cpu_count(), 'threads': bench.threads, 'ours': bench.libraries['ours'],
            'peer': f'colt5-attention 0.2.3, {bench.libraries["peer"]}',
            'command': shlex.join(['./dev', 'bench', 'cpu', *sys.argv[1:]]), 'date': datetime.date.today().isoformat()}


def report(bench):
    where = about(bench)
    print(f'\n{where["processor"]}, {where["cores"]} cores; ours multiplies by {where["ours"]}, '
          f'the other side is {where["peer"]}.\n')
    for threads in sorted({row['threads'] for row in bench.rows}, reverse=True):
        rates = [row['rates'] for row in bench.rows if row['threads'] == threads]
        print(f'sgemm, threads {threads}, GFLOP/s: ' + ', '.join(
            f'{name} {statistics.median(rate[name] for rate in rates) / 1e9:.0f}' for name in rates[0]))
    print()
    table = []
    for row in bench.rows:
        differs = row['difference']
        table.append([
            row['name'], ' × '.join(str(row[extent]) for extent in ('batch', 'length', 'width')), str(row['threads']),
            time_text(row['ours_s'], row['ours_spread_s']), time_text(row['peer_s'], row['peer_spread_s']),
            ratio(row['peer_s'], row['ours_s']), time_text(row['floor_s']), ratio(row['ours_s'], row['floor_s'], '{:.2f}'),
            mib_text(row['ours_mib']), mib_text(row['peer_mib']), ratio(row['peer_mib'], row['ours_mib'], '{:.1f} ×'),
            '' if differs is None else f'{differs:.1e}'])
    print_table(['', 'b × n × d', 'threads', 'ours', 'PyTorch', 'faster', 'floor', 'ours / floor', 'ours MiB', 'PyTorch MiB',
                 'less', 'differs'], table)
    print_table(['goal', 'wanted', 'measured', 'reached'], goals(bench))
    for k in (16, FLAGSHIP['k']):
        for mode in ('forward', 'forward_backward'):
            rows = growth(bench, k, mode)
            lines, before = [], None
            for row in rows:
                more = (row['ours_mib'] - before['ours_mib']) / (row['length'] - before['length']) if before else None
                lines.append([row['name'], f'{row["ours_s"] / row["length"] * 1e6:.2f}',
                              ratio(row['ours_s'], row['floor_s'], '{:.2f}'), mib_text(row['ours_mib']),
                              '' if more is None else f'{more * 2 ** 20:.0f}'])
                before = row
            if rows:
                print_table([f'growth, k = {k}', 'µs a token', 'ours / floor', 'MiB', 'bytes a further token'], lines)


def main():
    parser = argparse.ArgumentParser(prog='./dev bench cpu', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--build-dir', type=pathlib.Path, default='build', help='where Meson has built the programs')
    parser.add_argument('--peers-dir', type=pathlib.Path, default='build/peers', help='where version 0.11 of the package is')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--quick', action='store_true', help='4 minutes: shorter pieces, the flagship once')
    parser.add_argument('--json', type=pathlib.Path, metavar='FILE')
    parser.add_argument('--only', metavar='PATTERN', help='cases by name, such as "block*"')
    parser.add_argument('--shrink', type=int, default=1, metavar='N', help='divides lengths by N, to try this program itself')
    args = parser.parse_args()
    start = time.monotonic()
    failed = False
    with tempfile.TemporaryDirectory(dir=args.build_dir) as folder:  # not in /tmp, which may be memory
        bench = Bench(args.build_dir, args.peers_dir, args.threads, args.quick, pathlib.Path(folder))
        for case in cases(args.quick, args.shrink):
            if args.only and not fnmatch.fnmatch(case.name, args.only):
                continue
            if not case.peer and not bench.fits(case):
                case = dataclasses.replace(case, backward=False)
                if not bench.fits(case):
                    print(f'{case.name} does not fit into memory', file=sys.stderr)
                    continue
            print(f'{time.monotonic() - start:4.0f} s  {case.name}, {case.batch} × {case.length} × {case.width}',
                  file=sys.stderr)
            try:
                bench.run(case)
            except ProcessEnded as error:
                print(error, file=sys.stderr)
                failed = True
    bench.end()
    if not bench.rows:
        print('No case was measured.', file=sys.stderr)
        return 1
    report(bench)
    print(f'{time.monotonic() - start:.0f} s')
    if args.json:
        args.json.write_text(json.dumps(about(bench) | {'rows': bench.rows}, indent=1) + '\n')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
