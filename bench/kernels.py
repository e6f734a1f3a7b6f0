#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Lists the kernels of the flagship block on this machine's GPU, as docs/gpu.md has them: what Nsight Compute (ncu) measures.

    ./dev bench gpu --quick            # builds the programs
    python3 bench/kernels.py [--csv FILE]

For each kernel in the order of its launch, forward and backward, in bf16: how often it runs, its time, the bytes that it moved
from and to device memory, the floating-point operations of its matrix instructions, both as rates, and its floor: the larger of
the bytes at 3.0 TB/s and the operations at 790 TFLOP/s (gpu.py says why). ncu runs each kernel alone and at the base clock, so
the sum of the times is larger than the time of the block, where two streams overlap. The block is that of gpu.py: b 2, n 32768,
d 512, 1024 routed tokens.
"""
import argparse
import csv
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from common import print_table
from gpu import BYTES_PER_S, FLOP_PER_S, start_server

METRICS = {'gpu__time_duration.sum': 'us', 'dram__bytes.sum': 'bytes', 'sm__ops_path_tensor_src_bf16_dst_fp32.sum': 'flop'}
UNITS = {'us': {'ns': 1e-3, 'us': 1, 'ms': 1e3, 'nsecond': 1e-3, 'usecond': 1, 'msecond': 1e3},
         'bytes': {'byte': 1, 'Kbyte': 1e3, 'Mbyte': 1e6, 'Gbyte': 1e9}}


def write_inputs(path, peers_dir):
    """Weights and inputs, which the package draws."""
    case = dict(program='conditional_routed_transformer_block', batch=2, length=32768, width=512, numbers=[512, 50], dtype='fp32',
                wide_logits=False, inputs=str(path), descent='package', has_peer=True)
    with start_server('package', peers_dir) as package:
        package.ask('prepare', json.dumps(case))


def measured(program, path):
    """The kernels of the second call, each a dict of its name, grid and metrics."""
    command = ['ncu', '--csv', '--metrics', ','.join(METRICS), program, path, 'bf16', '512', '50']
    done = subprocess.run(list(map(str, command)), input=f'first forward_backward {path}.out\ntime forward_backward 1\n',
                          capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if not lines:
        sys.exit(f'ncu measured nothing: {done.stdout[-500:]} {done.stderr[-500:]}')
    kernels = {}
    for row in csv.DictReader(lines):
        kernel = kernels.setdefault(int(row['ID']), {'name': name_of(row['Kernel Name']), 'stream': row['Stream']})
        field, unit = METRICS[row['Metric Name']], row['Metric Unit']
        kernel[field] = float(row['Metric Value'].replace(',', '')) * UNITS.get(field, {}).get(unit, 1)
    kernels = [kernels[i] for i in sorted(kernels)]
    return kernels[len(kernels) // 2:]


def name_of(kernel):
    """The function alone; a product by cuBLASLt is `product`, and the second kernel of one with split-K `sum of a product`."""
    if 'splitKreduce' in kernel:
        return 'sum of a product (split-K)'
    if re.search(r'nvjet|gemm|cutlass', kernel):
        return 'product'
    function = re.sub(r'\(.*', '', kernel.split('<')[0].removeprefix('void '))
    return '::'.join(function.split('::')[-2:]).removeprefix('colt5::').removeprefix('cuda::')


def together(kernels):
    """Joins the kernels of one name and stream that do the same work: those of both chunks of tokens, for example."""
    rows = []
    for kernel in kernels:
        alike = next((row for row in rows[::-1] if row['name'] == kernel['name'] and row['stream'] == kernel['stream']
                      and abs(row['flop'] / row['count'] - kernel['flop']) <= 0.01 * kernel['flop']
                      and abs(row['bytes'] / row['count'] - kernel['bytes']) <= 0.2 * kernel['bytes'] + 2e6), None)
        if alike is None:
            rows.append(kernel | {'count': 1})
        else:
            alike['count'] += 1
            for field in METRICS.values():
                alike[field] += kernel[field]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--build-dir', type=pathlib.Path, default='build-gpu', help='where Meson has built the programs')
    parser.add_argument('--peers-dir', type=pathlib.Path, default='build/peers', help='where the Python packages are')
    parser.add_argument('--csv', type=pathlib.Path, help='all kernels, one a line')
    options = parser.parse_args()
    program = options.build_dir / 'bench' / 'conditional_routed_transformer_block_bf16'
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'inputs.safetensors'
        write_inputs(path, options.peers_dir)
        kernels = measured(program, path)
    if options.csv:
        with options.csv.open('w', newline='') as file:
            writer = csv.DictWriter(file, ['name', 'stream', *METRICS.values()])
            writer.writeheader()
            writer.writerows(kernels)
    report(kernels)


def report(kernels):
    """The table of the kernels that take 5 µs or more in all their runs, then sums."""
    time_of = {}
    for kernel in kernels:
        time_of[kernel['stream']] = time_of.get(kernel['stream'], 0) + kernel['us']
    main_stream = max(time_of, key=time_of.get)
    def floor_us(row):
        return 1e6 * max(row['bytes'] / BYTES_PER_S['H100'], row['flop'] / FLOP_PER_S['bf16'])
    print_table(['kernel', 'stream', 'runs', 'µs', 'MB', 'GFLOP', 'TB/s', 'TFLOP/s', 'floor, µs'],
                [[row['name'], 'main' if row['stream'] == main_stream else 'side', str(row['count']), f'{row["us"]:.0f}',
                  f'{row["bytes"] / 1e6:.0f}', f'{row["flop"] / 1e9:.1f}', f'{row["bytes"] / row["us"] / 1e6:.2f}',
                  f'{row["flop"] / row["us"] / 1e6:.0f}', f'{floor_us(row):.0f}'] for row in together(kernels) if row['us'] >= 5])
    for stream, time in sorted(time_of.items(), key=lambda item: -item[1]):
        print(f'{"main" if stream == main_stream else "side"} stream: {time:.0f} µs in '
              f'{sum(kernel["stream"] == stream for kernel in kernels)} kernels')
    print(f'floors: {sum(map(floor_us, kernels)):.0f} µs')


if __name__ == '__main__':
    main()
