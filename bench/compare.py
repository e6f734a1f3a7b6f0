#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times the programs of two builds of this library in turns: what a change has made slower or faster.

    git worktree add ../before COMMIT
    meson setup ../before/build ../before -Dtests=disabled -Dexamples=disabled    # and -Dcuda=enabled for a GPU
    ninja -C ../before/build bench && ninja -C build bench
    build/peer/bin/python bench/compare.py ../before/build build [--gpu] [--only PATTERN...] [--json FILE]

The rows are those of cpu.py, or with --gpu those of gpu.py, whose programs both builds have; the Python packages of `./dev bench`
draw weights and inputs. Each turn is a call of both, or of so many that they take a twentieth of a second; the next turn has the
other order. `ratio` is the median over the turns of the new time over the old time, with the quartiles. `differs` compares the
results of the two: the largest difference over the largest entry.
"""
import argparse
import contextlib
import datetime
import fnmatch
import json
import math
import pathlib
import statistics
import sys
import tempfile

import cpu
import gpu
from common import Process, ProcessEnded, Refused, print_table, time_text


class OfCpu:
    """What a comparison on the CPU needs to know."""

    def __init__(self, threads, peers_dir):
        self.threads, self.peers_dir, self.about = threads, peers_dir, {'threads': threads}

    def cases(self):
        return ((case, (case.threads or self.threads,)) for case in cpu.cases(False, 1))

    def program(self, case, _):
        return case.program

    def prepare(self, case, threads, inputs):
        reference = pathlib.Path(__file__).with_name('reference_cpu.py')
        options = ['--wide-logits'] * case.wide_logits + ['--forward-only'] * (not case.backward) + ['--inputs-only']
        path = {} if case.version == '0.2.3' else {'PYTHONPATH': str(self.peers_dir / case.version)}
        with Process([sys.executable, reference, case.program, inputs, threads, case.batch, case.length, case.width, *case.numbers,
                      *options], cpu.bound(threads) | path) as peer:
            peer.end()

    def environment(self, threads):
        return cpu.bound(threads) | cpu.serial_blas

    def seconds(self, process, mode, count):
        return process.ask('time', mode, count)[0]


class OfGpu:
    def __init__(self, peers_dir, stack):
        self.about = gpu.machine()
        self.package = stack.enter_context(gpu.start_server('package', peers_dir))

    def cases(self):
        return ((case, case.dtypes) for case in gpu.cases(False))

    def program(self, case, dtype):
        return f'{case.program}_{"bf16" if dtype == "bf16" else "float"}'

    def prepare(self, case, dtype, inputs):
        fields = json.loads(gpu.Bench.fields(case, gpu.PACKAGE, 'fp32', inputs.parent)) | {'has_peer': False}
        self.package.ask('prepare', json.dumps(fields | {'inputs': str(inputs)}))
        self.package.ask('forget')

    def environment(self, _):
        return {}

    def seconds(self, process, mode, count):
        """Of one call as a CUDA graph, the median; the first one warms up."""
        return statistics.median(process.ask('replay', mode, count + 1)[1:])


def compare(sides, mode, seconds, folder, turns):
    """The row of two processes, old and new."""
    once = [process.first(mode, folder / str(i))[0] for i, process in enumerate(sides)]
    counts = [math.ceil(0.05 / max(min(first, seconds(process, mode, 1)), 1e-5)) for first, process in zip(once, sides)]
    times = [], []
    for turn in range(turns):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            times[i].append(seconds(sides[i], mode, min(counts[i], 1000)))
    ratios = [new / old for old, new in zip(*times)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {'old_s': statistics.median(times[0]), 'new_s': statistics.median(times[1]), 'ratio': ratio, 'ratio_quartiles': [low, high],
            'differs': cpu.difference(folder / '1', folder / '0')}


def compare_programs(way, case, kind, programs, folder, turns):
    inputs = folder / 'inputs.safetensors'
    way.prepare(case, kind, inputs)
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(Process([program, inputs, kind, *case.numbers], way.environment(kind))) for program in programs]
        for mode in case.modes:
            row = {'name': f'{case.name}_{mode}', 'kind': str(kind)} | compare(sides, mode, way.seconds, folder, turns)
            unlike = ', but the results differ: perhaps the old program has another form' if row['differs'] > 0.02 else ''
            print(f'{row["name"]} {kind}: {row["ratio"]:.3f}{unlike}', file=sys.stderr)
            yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('old', type=pathlib.Path, help='a folder where Meson has built')
    parser.add_argument('new', type=pathlib.Path)
    parser.add_argument('--gpu', action='store_true')
    parser.add_argument('--peers-dir', type=pathlib.Path, default='build/peers', help='where the Python packages are')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--turns', type=int, default=11)
    parser.add_argument('--only', metavar='PATTERN', nargs='+', default=['*'], help='cases by name, such as "block*"')
    parser.add_argument('--json', type=pathlib.Path, metavar='FILE')
    args = parser.parse_args()
    rows = []
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.new)))
        way = OfGpu(args.peers_dir, stack) if args.gpu else OfCpu(args.threads, args.peers_dir)
        for case, kinds in way.cases():
            for kind in kinds:
                programs = [build / 'bench' / way.program(case, kind) for build in (args.old, args.new)]
                if not any(fnmatch.fnmatch(case.name, only) for only in args.only) or not all(map(pathlib.Path.exists, programs)):
                    continue
                try:
                    rows += compare_programs(way, case, kind, programs, folder, args.turns)
                except (Refused, ProcessEnded) as error:  # an older program may lack a form of the case
                    print(f'{case.name} {kind}: {error}', file=sys.stderr)
        command = ' '.join(['bench/compare.py', *sys.argv[1:]])
        about = way.about | {'date': str(datetime.date.today()), 'command': command}
    print_table(['', 'type or threads', 'old', 'new', 'new / old', 'quartiles', 'differs'],
                [[row['name'], row['kind'], time_text(row['old_s']), time_text(row['new_s']), f'{row["ratio"]:.3f}',
                  ' to '.join(f'{each:.3f}' for each in row['ratio_quartiles']), f'{row["differs"]:.1e}'] for row in rows])
    if args.json:
        args.json.write_text(json.dumps(about | {'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
