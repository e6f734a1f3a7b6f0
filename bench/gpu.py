#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times the flagship block and its pieces on this machine's GPU: ours, and several PyTorch programs beside it.

    ./dev bench gpu [--quick] [--json FILE] [--only PATTERN]

The flagship is the block of the reference's README: b 2, n 32768, d 512, 8 × 64 light heads with window 128, 8 × 64 heavy
heads, 1024 routed queries, keys and feedforward tokens, all-true mask. The other sides ("peers"):

    colt5-attention 0.2.3          the published package, eager; bf16 is autocast
    tuned PyTorch                  tuned_torch.py: FlexAttention, SDPA, torch.compile, and the newest package's Triton kernel
    tuned PyTorch, our descent     the same with our algorithm for the descent, in Triton
    colt5-attention 0.11           the newest package, eager, for null tokens, rotary embeddings, and the image attention,
                                   which it routes in each window alone
    paper_torch.py, compiled       the paper's base block, with FlexAttention (to train, products of blocks), SDPA, torch.compile, and
                                   the package's Triton kernel

How it is measured
- All sides have the same weights and inputs; the package draws them. Inputs are random normal; a backward pass starts
  from a random gradient and gives the gradients of all parameters and of the input.
- Results are held against the package in fp32: `differs` is the norm of the difference over that
  of the result, for output or gradient of the input. With fewer bits a few tokens close to the threshold are routed
  otherwise: tokens more than 5 % off are counted instead, and more than 0.5 % of them fail, as does too large a difference.
- The sides take turns. A sample is one call between two CUDA events, the host waiting after each; once as the host
  launches it, and once as a CUDA graph, if it can be one. Times are medians after warm-up, of the faster of the two ways;
  ± is half the range from the 10th to the 90th percentile over the median.
- Each case stands alone: before it, no side keeps anything, and between calls none keeps more than weights and inputs. A
  peer that cannot run it, for want of memory, say, has the reason in place of its time; the others go on.
- Memory is the most that tensors took in a call beyond weights and inputs; the file also says, as device_mib, how much of
  the device's memory the process took for the call.
- Routing tokens are scaled by 1/√d, so that logits have unit deviation. At the package's own initialization, with logits
  of deviation √d, which of many saturated scores it routes is arbitrary: `block_own_init` is timed but not compared.
- The floor of a row is the sum over its kernels of the larger of operations at 790 (bf16), 400 (tf32) or 60 TFLOP/s (fp32)
  and bytes at the rate of a large copy: 4.3 TB/s on an H200, 3.0 on an H100. On other GPUs there is none.

--json FILE writes {device, driver, …, rows}, rows being {name, dtype, ours_ms, peer, peer_ms, floor_ms, ours_mib, …}.
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
import statistics
import subprocess
import sys
import tempfile
import time

import numpy

from common import (FLAGSHIP, Kernel, Process, ProcessEnded, Refused, attention_kernels, autoregressive_attention_kernels, block_kernels,
                    feed_forward_kernels, light_attention_kernels, linear_kernels, local_attention_kernels, mib_text,
                    paper_block_kernels, print_table, ragged_kernels, ratio, time_text)

FLOP_PER_S = {'bf16': 790e12, 'tf32': 400e12, 'fp32': 60e12}
BYTES_PER_S = {'H200': 4.3e12, 'H100': 3.0e12}  # read and written
LARGEST_DIFFERENCE = {'bf16': 2e-2, 'tf32': 2e-3, 'fp32': 1e-4}


@dataclasses.dataclass(frozen=True)
class Peer:
    label: str
    server: str  # which of peers_gpu.py's
    descent: str = 'package'


PACKAGE = Peer('colt5-attention 0.2.3', 'package')
TUNED = Peer('tuned PyTorch', 'tuned')
OUR_DESCENT = Peer('tuned PyTorch, our descent', 'tuned', descent='threshold')
PYTORCH = Peer('PyTorch', 'tuned')
PACKAGE_0_11 = Peer('colt5-attention 0.11', 'tuned')
PAPER = Peer('paper_torch.py, compiled', 'tuned')
NOBODY = Peer('', '')  # only ours


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    program: str
    batch: int
    length: int
    width: int = 512
    numbers: tuple = ()
    kernels: tuple = ((), ())  # forward, backward
    peers: tuple = (PACKAGE, TUNED, OUR_DESCENT)
    dtypes: tuple = ('bf16', 'tf32')
    backward: bool = True
    wide_logits: bool = False
    comparable: bool = True  # with the package
    in_order: bool = True  # results are compared as sets otherwise

    @property
    def modes(self):
        return ('forward', 'forward_backward') if self.backward else ('forward',)

    def floor_ms(self, mode, dtype, device):
        forward, backward = self.kernels
        bytes_per_s = next((rate for name, rate in BYTES_PER_S.items() if name in device), None)
        if bytes_per_s is None:
            return None
        element = 2 if dtype == 'bf16' else 4
        kernels = forward + backward if mode == 'forward_backward' else forward
        return 1e3 * sum(max(kernel.flop / FLOP_PER_S[dtype], kernel.elements * element / bytes_per_s)
                         for kernel in kernels) or None


def linear(out, **options):
    return Case(f'linear_65536x512x{out}', 'linear', 2, 32768, numbers=(out,), kernels=linear_kernels(65536, 512, out),
                peers=(PYTORCH,), **options)


def block(name, batch, length, steps=50, **options):
    return Case(name, 'conditional_routed_transformer_block', batch, length, numbers=(512, steps),
                kernels=block_kernels(batch, length, 512, **FLAGSHIP), **options)


def cases(quick):
    n = 32768

    def routing(name, length, elements, **options):
        return Case(name, batch=2, length=length, width=1, dtypes=('fp32',),
                    kernels=([Kernel(0, elements)], [Kernel(0, 2 * elements)]), **options)

    # What matters most comes first: a run that is stopped has it.
    yield block('block', 2, n)
    yield routing('coordinate_descent_50', n, 4 * n, program='coordinate_descent', numbers=(50, 1152, 0))
    yield linear(1536)
    if quick:
        return
    yield Case('local_attention', 'local_attention', 2, n, kernels=local_attention_kernels(2, n, 512, 128),
               peers=(PYTORCH,), dtypes=('bf16',), comparable=False)
    yield Case('cross_attention_1024x1048576', 'conditional_routed_cross_attention', 1, 1024, numbers=(1048576,),
               kernels=([Kernel(0, 1048576 * 512)], [Kernel(0, 2 * 1048576 * 512)]), peers=(OUR_DESCENT,), dtypes=('bf16',),
               comparable=False)
    yield block('block_n1048576', 1, 1048576, peers=(PACKAGE,), dtypes=('bf16',), comparable=False)
    for length in (n, 1048576):
        yield routing('top_k_1024' if length == n else f'top_k_1024_n{length}', length, 2 * length, program='top_k',
                      numbers=(1024,), peers=(PYTORCH,), backward=False, in_order=False)
    yield block('block_own_init', 2, n, wide_logits=True, comparable=False, dtypes=('bf16',))
    yield Case('feed_forward', 'conditional_routed_feed_forward', 2, n,
               kernels=feed_forward_kernels(2, n, 512, **FLAGSHIP), peers=(PACKAGE, OUR_DESCENT), dtypes=('bf16',))
    yield Case('light_attention', 'light_attention', 2, n, kernels=light_attention_kernels(2, n, 512, **FLAGSHIP),
               peers=(PACKAGE, TUNED), dtypes=('bf16',))
    yield Case('light_attention_rotary', 'light_attention', 2, n, numbers=(1,),
               kernels=light_attention_kernels(2, n, 512, **FLAGSHIP), peers=(PACKAGE, TUNED), dtypes=('bf16',))
    yield Case('light_attention_bias', 'light_attention', 2, n, numbers=(0, 1), peers=(TUNED,), comparable=False,
               kernels=light_attention_kernels(2, n, 512, **FLAGSHIP), dtypes=('bf16', 'tf32'))
    for name, per_window in (('image_attention', 0), ('image_attention_per_window', 1)):  # a map of 512 × 512 tokens
        yield Case(name, 'conditional_routed_image_attention', 1, 512 * 512, numbers=(per_window,),
                   kernels=light_attention_kernels(1, 512 * 512, 512, **FLAGSHIP | {'window': 256}), peers=(PACKAGE_0_11,),
                   dtypes=('bf16',), comparable=False)
    for name, form, peer in (('attention_null_tokens', 1, PACKAGE_0_11), ('attention_rotary', 2, PACKAGE_0_11),
                             ('attention', 0, PACKAGE), ('attention_in_blocks', 3, NOBODY)):  # which no version can run
        yield Case(name, 'conditional_routed_attention', 2, n, numbers=(form,), kernels=attention_kernels(2, n, 512, **FLAGSHIP),
                   peers=(peer,), dtypes=('bf16',), comparable=form == 0)
    yield Case('autoregressive_attention', 'conditional_routed_autoregressive_attention', 2, 8192,
               kernels=autoregressive_attention_kernels(2, 8192, 512, 32, 1024, 128, 512), peers=(PACKAGE_0_11,), dtypes=('bf16',),
               comparable=False)
    yield Case('paper_block', 'paper_block', 1, 16384, 768, (16384,), kernels=paper_block_kernels(1, 16384, 768), peers=(PAPER,),
               dtypes=('bf16', 'tf32'), comparable=False)
    for name, form in (('ragged_packed', 0), ('ragged_padded', 1), ('ragged_uniform', 2)):  # 16 sequences of up to 8192
        yield Case(name, 'ragged_batch', 1, 17 * 4096, numbers=(16, form), peers=(PACKAGE,),
                   kernels=ragged_kernels(16, 17 * 4096, 512, **FLAGSHIP | {'k': 256}), dtypes=('bf16',), comparable=form == 0)
    for name, past in (('decode_step_10k', 10_000), ('decode_step_1m', 1_000_000)):  # one more token of 8 sequences
        yield Case(name, 'decode', 8, 1, numbers=(past,), peers=(NOBODY,), dtypes=('bf16',), comparable=False, backward=False)
    yield block('block_20_steps', 2, n, steps=20, peers=(TUNED,), dtypes=('bf16',))
    yield routing('coordinate_descent_20', n, 4 * n, program='coordinate_descent', numbers=(20, 1152, 0))
    yield routing('routing_50', n, 2 * n, program='coordinate_descent', numbers=(50, 1152, 1024))
    yield routing('causal_routing', n, 2 * n, program='causal_top_k', numbers=(1024,), peers=(NOBODY,), comparable=False)
    yield linear(512, dtypes=('bf16',))
    yield linear(256, dtypes=('bf16',))
    yield block('block', 2, n, dtypes=('fp32',), peers=(PACKAGE,))


def difference(result, truth, case):
    """The norm of the difference over that of the result for tokens within 5 %, and the share of those that are not."""
    result, truth = (numpy.fromfile(file, numpy.float32).reshape(-1, case.width) for file in (result, truth))
    if not case.in_order:
        result, truth = (numpy.sort(values.reshape(case.batch, -1)).reshape(-1, 1) for values in (result, truth))
    truth = truth.astype(numpy.float64)
    errors = ((result - truth) ** 2).sum(-1) / (truth ** 2).sum(-1).mean()
    alike = errors < 0.05 ** 2
    return math.sqrt(errors[alike].mean()) if alike.any() else math.nan, float(1 - alike.mean())


def check(what, differs, otherwise, dtype):
    """Says what is wrong, if anything is."""
    if differs <= LARGEST_DIFFERENCE[dtype] and otherwise <= 0.005:
        return True
    print(f'{what}: differs by {differs:.1e}, {100 * otherwise:.2g} % of the tokens by more than 5 %', file=sys.stderr)
    return False


class Side:
    """One side of a case, ready to be called."""

    def __init__(self, process, folder, name):
        self.process, self.folder, self.name = process, folder, name
        self.first_of = {}  # by mode: seconds, MiB, MiB of the device, and the file of the result

    def first(self, mode):
        if mode not in self.first_of:
            file = self.folder / f'{self.name}_{mode}'
            self.first_of[mode] = (*self.process.first(mode, file), file)
        return self.first_of[mode]

    def sample(self, way, mode, count):
        """Seconds of `count` calls; the one before them warms up."""
        return self.process.ask(way, mode, count + 1)[1:]


def summary(samples):
    """Median and spread in milliseconds."""
    if not samples:
        return None, None
    tenths = statistics.quantiles(samples, n=10, method='inclusive')
    return 1e3 * statistics.median(samples), 1e3 * (tenths[-1] - tenths[0])


class Bench:
    def __init__(self, device, build_dir, start_server, folder):
        self.device, self.build_dir, self.start_server, self.folder = device, build_dir, start_server, folder
        self.servers = {}
        self.rows = []
        self.failed = False

    def prepare(self, case, peer, dtype):
        """The peer's side of a case, which stays prepared for other modes."""
        process = self.server(peer.server)
        process.ask('prepare', self.fields(case, peer, dtype, self.folder))
        return Side(process, self.folder, peer.server)

    def server(self, name):
        """A new one, if its process has ended."""
        if name not in self.servers or self.servers[name].child.poll() is not None:
            self.servers[name] = self.start_server(name)
        return self.servers[name]

    @staticmethod
    def fields(case, peer, dtype, folder):
        return json.dumps(dict(
            program=case.program, batch=case.batch, length=case.length, width=case.width, numbers=case.numbers, dtype=dtype,
            wide_logits=case.wide_logits, inputs=str(folder / 'inputs.safetensors'), descent=peer.descent,
            has_peer=case.comparable or PACKAGE in case.peers))

    def run(self, case):
        """Each case stands alone: no side keeps the memory of the one before."""
        for server in self.servers.values():
            with contextlib.suppress(Refused, ProcessEnded):
                server.ask('forget')
        package = self.prepare(case, PACKAGE, 'fp32')
        truth = {}
        for mode in case.modes if case.comparable else ():
            with contextlib.suppress(Refused, ProcessEnded):
                truth[mode] = package.first(mode)[-1].rename(self.folder / f'truth_{mode}')
        for dtype in case.dtypes:
            program = self.build_dir / 'bench' / f'{case.program}_{"bf16" if dtype == "bf16" else "float"}'
            with Process([program, self.folder / 'inputs.safetensors', dtype, *case.numbers]) as process:
                ours = Side(process, self.folder, 'ours')
                for peer in case.peers:
                    for mode in case.modes:
                        self.compare(case, mode, dtype, ours, peer, truth.get(mode))

    def compare(self, case, mode, dtype, ours, peer, truth):
        row = {'name': f'{case.name}_{mode}', 'dtype': dtype, 'peer': peer.label, 'date': str(datetime.date.today())}
        sides = {'ours': ours}
        refused = {}
        try:
            if peer is not NOBODY:
                sides['peer'] = self.prepare(case, peer, dtype)
        except (Refused, ProcessEnded) as error:
            refused['peer'] = str(error)
        samples = self.sample(sides, mode, refused)
        for side, error in refused.items():
            row[f'{side}_refused'] = error
            self.failed |= side == 'ours'
            print(f'{row["name"]}, {dtype}, {"ours" if side == "ours" else peer.label}: {error}', file=sys.stderr)
        for side in ('ours', 'peer'):
            figures = dict.fromkeys(('ms', 'spread_ms', 'launched_ms', 'replayed_ms', 'mib', 'device_mib', 'differs'))
            if side in sides and side not in refused:
                ways = {way: summary(samples[side, way]) for way in ('time', 'replay')}
                _, mib, device_mib, file = sides[side].first(mode)
                figures |= {'launched_ms': ways['time'][0], 'replayed_ms': ways['replay'][0],
                            'mib': mib, 'device_mib': device_mib}
                figures['ms'], figures['spread_ms'] = min(way for way in ways.values() if way[0] is not None)
                if truth:
                    figures['differs'], otherwise = difference(file, truth, case)
                    right = check(f'{row["name"]}, {dtype}, {"ours" if side == "ours" else peer.label}', figures['differs'],
                                  otherwise, dtype)
                    self.failed |= side == 'ours' and not right
            row |= {f'{side}_{field}': value for field, value in figures.items()}
        row |= {'floor_ms': case.floor_ms(mode, dtype, self.device), 'batch': case.batch, 'length': case.length,
                'width': case.width}
        self.rows.append(row)
        print('        ' + ', '.join(filter(None, line_of(row)[:6])), file=sys.stderr)

    @staticmethod
    def sample(sides, mode, refused):
        """Seconds by side and way; adds the reasons of sides that refuse to `refused`."""
        counts = {}
        for side, what in sides.items():
            try:
                what.first(mode)
                counts[side] = min(30, max(3, math.ceil(0.1 / what.sample('time', mode, 1)[0])))
            except (Refused, ProcessEnded) as error:
                refused[side] = str(error)
        samples = {(side, way): [] for side in counts for way in ('time', 'replay')}
        for _ in range(3):
            for side, way in list(samples):
                if samples[side, way] is None or side in refused:
                    continue
                try:
                    samples[side, way] += sides[side].sample(way, mode, counts[side])
                except ProcessEnded as error:
                    refused[side] = str(error)
                except Refused as error:
                    samples[side, way] = None  # not everything can be a CUDA graph
                    if way == 'time':
                        refused[side] = str(error)
        return samples


HEADER = ['', 'dtype', 'ours', 'peer', 'its time', 'faster', 'floor', 'ours / floor', 'ours MiB', 'its MiB', 'less', 'differs',
          'it differs']


def line_of(row):
    """The cells of a row of the table."""
    ours, its, floor, ours_spread, its_spread = (
        row[field] and row[field] / 1e3 for field in ('ours_ms', 'peer_ms', 'floor_ms', 'ours_spread_ms', 'peer_spread_ms'))
    def time_or_reason(side, seconds, spread):
        reason = row.get(f'{side}_refused')
        if reason is None:
            return time_text(seconds, spread)
        return 'out of memory' if re.search('out ?of ?memory', reason, re.IGNORECASE) else 'refused'

    return [row['name'], row['dtype'], time_or_reason('ours', ours, ours_spread), row['peer'],
            time_or_reason('peer', its, its_spread), ratio(its, ours),
            time_text(floor), ratio(ours, floor, '{:.2f}'), mib_text(row['ours_mib']), mib_text(row['peer_mib']),
            ratio(row['peer_mib'], row['ours_mib'], '{:.1f} ×'),
            *('' if row[field] is None else f'{row[field]:.1e}' for field in ('ours_differs', 'peer_differs'))]


# Rows that may take only so many times as long as another one.
LIMITS = (('light_attention_bias', 'light_attention', 1.15), ('causal_routing', 'routing_50', 1.3))


def ratios(rows):
    """Sentences about LIMITS."""
    ours = {(row['name'], row['dtype']): row['ours_ms'] for row in rows if row['ours_ms']}
    for (name, dtype), time in ours.items():
        for limited, base, most in LIMITS:
            mode = name.removeprefix(limited + '_')
            without = ours.get((f'{base}_{mode}', dtype))
            if mode != name and without:
                yield f'{name} in {dtype}: {time / without:.2f} times {base}_{mode} (wanted: at most {most})'


def machine():
    def query(field):
        return subprocess.run(['nvidia-smi', '--id=0', '--format=csv,noheader', f'--query-gpu={field}'], check=True,
                              capture_output=True, text=True).stdout.strip()
    nvcc = subprocess.run(['nvcc', '--version'], check=True, capture_output=True, text=True).stdout
    return {'device': query('name'), 'driver': query('driver_version'), 'cuda': re.search(r'release ([\d.]+)', nvcc)[1]}


def start_server(server, peers_dir):
    """One of peers_gpu.py's; each sees another version of the package."""
    path = [str(peers_dir / {'package': '0.2.3', 'tuned': '0.11'}[server]), *filter(None, [os.environ.get('PYTHONPATH')])]
    return Process([sys.executable, pathlib.Path(__file__).with_name('peers_gpu.py'), server],
                   {'PYTHONPATH': os.pathsep.join(path)})


def warm_up(cases, peers_dir):
    """Lets PyTorch compile the first case, each type in a process of its own: later processes find that on the disk."""
    with contextlib.ExitStack() as stack:
        case, folder = cases[0], pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=peers_dir)))
        package = stack.enter_context(start_server('package', peers_dir))
        package.ask('prepare', Bench.fields(case, PACKAGE, 'fp32', folder))
        servers = {dtype: stack.enter_context(start_server('tuned', peers_dir)) for dtype in case.dtypes}
        for dtype, server in servers.items():
            server.send('prepare', Bench.fields(case, OUR_DESCENT, dtype, folder))
            for mode in case.modes:
                server.send('first', mode, os.devnull)
        for server in servers.values():
            for _ in ('prepare', *case.modes):
                server.answer()


def main():
    parser = argparse.ArgumentParser(prog='./dev bench gpu', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--build-dir', type=pathlib.Path, default='build-gpu', help='where Meson has built the programs')
    parser.add_argument('--peers-dir', type=pathlib.Path, default='build/peers', help='where the Python packages are')
    parser.add_argument('--quick', action='store_true', help='2 minutes: the flagship and little else')
    parser.add_argument('--json', type=pathlib.Path, metavar='FILE')
    parser.add_argument('--only', metavar='PATTERN', help='cases by name, such as "block*"')
    parser.add_argument('--warm-up', action='store_true', help='only lets PyTorch compile what takes it longest')
    args = parser.parse_args()
    chosen = [case for case in cases(args.quick) if fnmatch.fnmatch(case.name, args.only or '*')]
    if args.warm_up:
        if chosen and chosen[0].name == 'block':
            warm_up(chosen, args.peers_dir)
        return False
    start = time.monotonic()
    about = machine() | {'python': platform.python_version(), 'command': ' '.join(['./dev bench gpu', *sys.argv[1:]]),
                         'date': str(datetime.date.today())}
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.build_dir)))
        bench = Bench(about['device'], args.build_dir,
                      lambda server: stack.enter_context(start_server(server, args.peers_dir)), folder)
        about['peers'] = bench.server('package').library
        for case in chosen:
            print(f'{time.monotonic() - start:4.0f} s  {case.name}', file=sys.stderr)
            try:
                bench.run(case)
            except (ProcessEnded, Refused) as error:
                print(error, file=sys.stderr)
                bench.failed = True
            if args.json:  # again after each case: whatever stops a long run later, this is there
                args.json.write_text(json.dumps(about | {'rows': bench.rows}, indent=1) + '\n')
    print()
    print_table(HEADER, [line_of(row) for row in bench.rows])
    for sentence in ratios(bench.rows):
        print(sentence)
    print(f'{time.monotonic() - start:.0f} s')
    return bench.failed


if __name__ == '__main__':
    sys.exit(main())
