# SPDX-License-Identifier: MIT
"""compile_time.py [--cxx COMPILER] [--level -O2] [--repeat N]: how long programs take to compile, with -march=native as README.md advises.

Prints the CPU time of the compiler in seconds, the least of N (default 3), and as a multiple of that of a fixed file, one product of
Eigen matrices: multiples of different machines can be compared. `declared` is with COLT5_DECLARE_KERNELS (docs/building.md).
"""
import argparse
import pathlib
import resource
import shlex
import subprocess
import tempfile

root = pathlib.Path(__file__).resolve().parent.parent

reference = """#include <Eigen/Core>
Eigen::MatrixXf product(const Eigen::MatrixXf& a, const Eigen::MatrixXf& b) { return a * b; }
"""
block = """#include <colt5/colt5.hpp>
using namespace colt5;
template <int dim>
using Block = ConditionalRoutedTransformerBlock<TransformerBlockConfig{.dim = dim,
                                                                       .num_heavy_attn_tokens_q = 16,
                                                                       .num_heavy_attn_tokens_kv = 16,
                                                                       .num_heavy_ff_tokens = 16}, float, Cpu>;
"""
infer = """template <typename Block>
auto infer(const Cpu& policy, const TokensTensor<float, Cpu>& tokens) { return Block{policy, Seed{0}}(tokens); }
"""
train = """template <typename Block>
void train(const Cpu& policy, const TokensTensor<float, Cpu>& tokens) {
    Block block{policy, Seed{0}};
    AdamW optimizer(policy, block, {.lr = 3e-3});
    auto gradients = block.make_gradients();
    auto saved = block.forward(tokens);
    const auto d_out = tensor_like(policy, saved.out);
    zero_gradients(policy, gradients);
    block.backward(std::move(saved), d_out, gradients);
    clip_gradient_norm(policy, gradients, 1.0);
    optimizer.step(block, gradients);
}
"""
call = """template auto infer<Block<{0}>>(const Cpu&, const TokensTensor<float, Cpu>&);
"""
step = """template void train<Block<{0}>>(const Cpu&, const TokensTensor<float, Cpu>&);
"""
stack_step = """template void train<Stack<Block<64>, {0}>>(const Cpu&, const TokensTensor<float, Cpu>&);
"""
programs = {
    'nothing but the #include': '#include <colt5/colt5.hpp>\n',
    'one block, inference': block + infer + call.format(64),
    'three blocks, inference': block + infer + ''.join(call.format(dim) for dim in (64, 128, 512)),
    'one block, training': block + train + step.format(64),
    'three blocks, training': block + train + ''.join(step.format(dim) for dim in (64, 128, 512)),
    'a stack of 2 blocks, training': block + train + stack_step.format(2),
    'a stack of 24 blocks, training': block + train + stack_step.format(24),
    'all kernels of float': '#include <colt5/kernels.hpp>\n',
}


def seconds(command, text, folder):
    source = pathlib.Path(folder) / 'program.cpp'
    source.write_text(text)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, '-c', str(source), '-o', str(source.with_suffix('.o'))], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--cxx', default='g++')
    parser.add_argument('--level', default='-O2', help='such as --level=-O3, which a Release build of CMake has')
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--only', default='', help='programs whose names contain this')
    options = parser.parse_args()
    eigen = subprocess.run(['pkg-config', '--cflags', 'eigen3'], capture_output=True, text=True, check=True).stdout
    command = [options.cxx, '-std=c++20', options.level, '-march=native', '-fopenmp', '-I', str(root / 'include'), *shlex.split(eigen)]
    rows = {('one product of Eigen', ''): (reference, [])}
    for name, text in programs.items():
        if options.only not in name:
            continue
        rows[name, 'header-only'] = text, []
        if 'kernels.hpp' not in text:
            rows[name, 'declared'] = text, ['-DCOLT5_DECLARE_KERNELS']
    times = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeat):  # in turns, so that all see the same load
            for row, (text, flags) in rows.items():
                times[row].append(seconds([*command, *flags], text, folder))
    unit = min(times[next(iter(rows))])
    print('| program | | s | multiple |\n|---|---|---|---|')
    for (name, way), all_times in times.items():
        print(f'| {name} | {way} | {min(all_times):.2f} | {min(all_times) / unit:.2f} |')


if __name__ == '__main__':
    main()
