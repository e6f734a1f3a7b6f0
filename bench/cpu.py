#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times the flagship block and its pieces on this machine's CPU: ours, and the published PyTorch package beside it.

    ./dev bench cpu [--quick] [--json FILE] [--threads N] [--only TEXT] [--shrink N]

The flagship is the block of the reference's README: b 2, n 32768, d 512, 8 × 64 light heads with window 128, 8 × 64 heavy
heads, 1024 routed queries, keys and feedforward tokens, all-true mask, float.

How it is measured
- Each case starts one process of ours (op/, module/) and one of PyTorch (reference_cpu.py), with the same number of
  threads, weights, inputs and mask. Inputs are random normal; a backward pass starts from a random gradient and gives the
  gradients of all parameters and of the input, on both sides. The result of every row is compared: `differs` is the
  largest difference over the largest entry.
- The two take turns, one call at a time or, if a call is short, as many as take a twentieth of a second. Times are medians
  after a first call of the same size; ± is half of the range over the median. Only with --quick is a first call that takes
  more than 2 s timed itself; PyTorch then had a shorter call before it.
- Memory is the peak of the resident memory in that first call over what the process held before any: weights and inputs,
  and on PyTorch's side what a short call left behind, such as loaded kernels.
- Routing tokens are scaled by 1/√d, so that logits have unit deviation. At the package's own initialization, with logits
  of deviation √d, many scores saturate at 1 and which of them the package routes is arbitrary: rows `… (own init)` are
  timed, but their results may differ.
- The floor of a row is its number of floating-point operations at the rate of the best BLAS at hand: Eigen or OpenBLAS, on
  matrices of 2048 × 2048, or PyTorch's in the `linear` rows of the same run, on the same number of threads. Our own products
  may beat it. Routing and choosing have no floor.
- A row without PyTorch's columns is only ours.

--json FILE writes a list of rows {name, ours_s, peer_s, floor_s, ours_mib, peer_mib, …} with null for what is not there.
"""
import argparse
import contextlib
import dataclasses
import fnmatch
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy

from common import (FLAGSHIP, SMALL, Process, ProcessEnded, block_kernels, feed_forward_kernels, light_attention_kernels,
                    linear_kernels, mib_text, print_table, ratio, time_text, total_flop)


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


def block(name, batch, length, width=512, **options):
    kernels = block_kernels(batch, length, width, **(SMALL if width == 128 else FLAGSHIP))
    return Case(name, 'conditional_routed_transformer_block', batch, length, width, (width, 50), kernels, **options)


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
    yield Case('routing_50_one_row', 'coordinate_descent', numbers=(50, 1152, 1024), **(descent | dict(batch=1)))
    yield Case('light_attention', 'light_attention', 2, piece, kernels=light_attention_kernels(2, piece, 512, **FLAGSHIP))
    yield Case('feed_forward', 'conditional_routed_feed_forward', 2, piece,
               kernels=feed_forward_kernels(2, piece, 512, **FLAGSHIP))
    yield block('small_block', 1, 256, 128)
    for n in (1024, 8192) if quick else (1024, 4096, 16384, 32768):
        yield block(f'block_n{n}', 1, max(1024, n // shrink))
    yield block('block', 2, full)
    if quick:
        yield block('block_n32768', 1, full, peer=False)
    else:
        yield block('block_own_init', 2, full, wide_logits=True)
    yield block('block_n32768_one_thread', 1, full, peer=False, threads=1)
    for n in (131072,) if quick else (131072, 262144, 524288, 1048576):
        yield block(f'block_n{n}', 1, n // shrink, peer=False)


def difference(ours, peer):
    """The largest difference over the largest entry."""
    ours, peer = (numpy.fromfile(file, numpy.float32) for file in (ours, peer))
    return float(numpy.abs(ours - peer).max() / numpy.abs(peer).max())


class Bench:
    def __init__(self, build_dir, threads, quick, folder):
        self.build_dir, self.threads, self.quick, self.folder = build_dir, threads, quick, folder
        self.rows = []
        self.libraries = {}
        self.measured_rates = {}

    def run(self, case):
        threads = case.threads or self.threads
        environment = {'OMP_NUM_THREADS': str(threads)}
        inputs = self.folder / 'inputs.safetensors'
        reference = pathlib.Path(__file__).with_name('reference_cpu.py')
        options = ['--wide-logits'] * case.wide_logits + ['--forward-only'] * (not case.backward)
        with contextlib.ExitStack() as stack:
            peer = stack.enter_context(Process([sys.executable, reference, case.program, inputs, threads, case.batch,
                                                case.length, case.width, *case.numbers, *options], environment))
            if not case.peer:
                peer.end()  # it has written the inputs
            ours = stack.enter_context(
                Process([self.build_dir / 'bench' / case.program, inputs, threads, *case.numbers], environment))
            inputs.unlink()
            sides = {'ours': ours, 'peer': peer} if case.peer else {'ours': ours}
            self.libraries |= {'ours': ours.library, 'peer': peer.library}
            for mode in case.modes:
                self.rows.append(self.measure(case, mode, threads, sides))

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
        least, most, budget_s = (1, 5, 1) if self.quick else (5 if case.name == 'block' else 3, 9, 6)
        for _ in range(min(most, max(least, round(budget_s / round_s)))):
            for side in taking_turns:
                samples[side] += sides[side].ask('time', mode, counts[side])
        row = {'name': f'{case.name}_{mode}'}
        for field, value in (('s', lambda side: statistics.median(samples[side])), ('mib', mib.get),
                             ('spread_s', lambda side: max(samples[side]) - min(samples[side]))):
            row |= {f'{side}_{field}': value(side) if side in sides else None for side in ('ours', 'peer')}
        return row | {
            'floor_s': None, 'difference': difference(self.folder / 'ours', self.folder / 'peer') if case.peer else None,
            'repetitions': len(samples['ours']), 'batch': case.batch, 'length': case.length, 'width': case.width,
            'threads': threads, 'flop': case.mode_flop(mode)}

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
        """Operations per second by what multiplies, on that many threads."""
        if threads not in self.measured_rates:
            lines = [line.split() for program in ('sgemm', 'sgemm_openblas') if (self.build_dir / 'bench' / program).exists()
                     for line in subprocess.run([self.build_dir / 'bench' / program, str(threads)], check=True, text=True,
                                                capture_output=True).stdout.splitlines()]
            self.measured_rates[threads] = {name: float(rate) * 1e9 for name, rate in lines}
        rates = dict(self.measured_rates[threads])
        rows = [row for row in self.rows if row['name'].startswith('linear') and row['threads'] == threads]
        if rows:
            rates['PyTorch'] = max(row['flop'] / row['peer_s'] for row in rows)
            rates['colt5'] = max(rates['colt5'], *(row['flop'] / row['ours_s'] for row in rows))
        return rates

    def set_floors(self):
        for row in self.rows:
            if row['flop']:
                row['floor_s'] = row['flop'] / max(rate for name, rate in self.rates(row['threads']).items() if name != 'colt5')


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
        add(f'block, {words}: {bench.threads} threads over one, times faster',
            of((f'block_n32768_one_thread_{mode}', 'ours_s'), (f'block_n32768_{mode}', 'ours_s')),
            least=1.9 if bench.threads == 2 else None, most=None if bench.threads == 2 else bench.threads)
    add('block: memory over that of the package', of(('block_forward_backward', 'ours_mib'),
                                                     ('block_forward_backward', 'peer_mib')), most=0.2)
    for name, text, most in (('forward', 'forward', 1.5), ('forward_backward', 'forward and backward', 4.0)):
        seconds = number(f'routing_50_{name}', 'ours_s')
        add(f'routing of 2 × 32768 on one core, {text}, ms', seconds and seconds * 1e3, most=most)
    for mode in ('forward', 'forward_backward'):
        at_32k = quotient(number(f'block_n32768_{mode}', 'ours_s'), number(f'block_n32768_{mode}', 'length'))
        for row in bench.rows:
            if re.fullmatch(rf'block_n\d+_{mode}', row['name']) and row['length'] != number(f'block_n32768_{mode}', 'length'):
                add(f'{row["name"]}: time a token over that at 32768', quotient(row['ours_s'] / row['length'], at_32k),
                    most=1.1, least=0.9)
    return table


def report(bench):
    with open('/proc/cpuinfo') as info:
        model = next((line.split(':')[1].strip() for line in info if line.startswith('model name')), platform.machine())
    print(f'\n{model}, {os.cpu_count()} cores; ours multiplies by {bench.libraries["ours"]}, '
          f'the other side is colt5-attention 0.2.3 with {bench.libraries["peer"]}.\n')
    for threads in sorted({row['threads'] for row in bench.rows}, reverse=True):
        print(f'sgemm, threads {threads}, GFLOP/s: ' +
              ', '.join(f'{name} {rate / 1e9:.0f}' for name, rate in bench.rates(threads).items()))
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
    for mode in ('forward', 'forward_backward'):
        growth = [row for row in bench.rows if re.fullmatch(rf'block_n\d+_{mode}', row['name'])]
        if growth:
            print_table(['growth', 'µs a token', 'bytes a token', 'ours / floor'],
                        [[row['name'], f'{row["ours_s"] / row["length"] * 1e6:.2f}',
                          f'{row["ours_mib"] / row["length"] * 2 ** 20:.0f}',
                          ratio(row['ours_s'], row['floor_s'], '{:.2f}')] for row in growth])


def main():
    parser = argparse.ArgumentParser(prog='./dev bench cpu', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--build-dir', type=pathlib.Path, default='build', help='where Meson has built the programs')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--quick', action='store_true', help='2 minutes: shorter pieces, the flagship once')
    parser.add_argument('--json', type=pathlib.Path, metavar='FILE')
    parser.add_argument('--only', metavar='PATTERN', help='cases by name, such as "block*"; with the linear rows, for the floors')
    parser.add_argument('--shrink', type=int, default=1, metavar='N', help='divides lengths by N, to try this program itself')
    args = parser.parse_args()
    start = time.monotonic()
    failed = False
    with tempfile.TemporaryDirectory(dir=args.build_dir) as folder:  # not in /tmp, which may be memory
        bench = Bench(args.build_dir, args.threads, args.quick, pathlib.Path(folder))
        for case in cases(args.quick, args.shrink):
            if args.only and not case.name.startswith('linear') and not fnmatch.fnmatch(case.name, args.only):
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
    bench.set_floors()
    report(bench)
    print(f'{time.monotonic() - start:.0f} s')
    if args.json:
        args.json.write_text(json.dumps(bench.rows, indent=1) + '\n')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
