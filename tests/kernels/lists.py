# SPDX-License-Identifier: MIT
"""Writes the lists of all kernels of a backend, from the headers that define them: cpu/declared.hpp and cuda/declared.cuh declare
the kernels, cpu/instances.inc and cuda/instances.inc instantiate them (see kernels.hpp). Kernels of logits, which are never of 16
bits, are in files of their own (…_of_logits), as are instances that only scalars of 16 bits have (…_of_half),
and those of attention on a GPU, one for each size of heads (…_of_attention).

lists.py           writes the lists; ./dev format calls it
lists.py --expressions OBJECT...   writes cuda/expressions.inc: the expressions that objects, compiled by g++, want of nvcc
lists.py --check   says whether they are up to date, in the Test Anything Protocol
"""
import pathlib
import re
import subprocess
import sys

include = pathlib.Path(__file__).resolve().parent.parent.parent / 'include' / 'colt5'

# What follows T in the template arguments of a kernel; S is the scalar type, A the type it accumulates in.
# A name may stand for several kernels; an argument of a kernel that is not here is an error.
biases = {'local': ('NoBias', 'RelativePositionBias<A>'),
          'dense': ('NoBias', 'RoutedPositionBias<A>', 'FirstKeys<NoBias>', 'FirstKeys<RoutedPositionBias<A>>')}
norms = 'RMSNormParameters', 'LayerNormParameters'
updates = 'std::size_t{0}', 'std::size_t{1}', 'std::size_t{2}'
# Of logits, scores and gradients of parameters, which are in the type that S accumulates in.
of_logits = {'causal_top_k', 'causal_top_k_next', 'coordinate_descent', 'coordinate_descent_vjp', 'cumulative_softmax', 'cumulative_softmax_vjp',
             'gumbel_noise', 'merge_blocks', 'pick_scores', 'place_scores', 'relative_position_bias_vjp', 'short_rows', 'sinkhorn', 'sinkhorn_vjp', 'split_blocks',
             'straight_through_scores', 'top_k', 'scale',
             'window_keys', 'window_keys_vjp', 'window_prefixes', 'window_prefixes_vjp'}
# Kernels that operations call for tensors of other types, too.
other_types = {'pad_sequences': ['bool'], 'swap_first_axes': ['TokenIndex'], 'zero': ['TokenIndex']}


def cases(name, parameters):
    """For each instance: what its template parameters are."""
    found = [{}]
    for parameter in parameters:
        kind = 'dense' if 'dense' in name else 'local'
        values = {'T': ['S', *other_types.get(name, [])], 'Y': ['S', 'A'], 'Bool': ['bool'], 'Integer': ['TokenIndex'], 'Bias': biases[kind], 'DTable': None, 'Count': ('1', '2'), 'updates': updates, 'head': ('COLT5_KERNEL_HEAD',),
                  'Norm': [f'{norm}<const S>' for norm in norms], 'NormGradients': None}.get(parameter, ())
        if parameter == 'DTable':
            found = [{**case, parameter: 'NoBias' if 'NoBias' in case['Bias'] else 'MatrixView<A>'} for case in found]
        elif parameter == 'NormGradients':
            found = [{**case, parameter: case['Norm'].replace('const S', 'A')} for case in found]
        elif not values:
            sys.exit(f'lists.py: {name}_kernel has a template parameter {parameter} of which it does not know the values')
        else:
            found = [{**case, parameter: value} for case in found for value in values]
    return found


def kernels(folder, policy):
    """(file, name, template head, return type, arguments) of each kernel"""
    head = re.compile(r'(template <[^\n]*(?:\n[^\n]*)?>\n)?(inline )?(\w+) (\w+)_kernel\((?=\s*const ' + policy + '&)')
    for path in sorted((include / folder).glob('*.[hc]*')):
        text = path.read_text()
        if path.stem.startswith('declared'):
            continue
        for match in head.finditer(text):
            depth, end = 1, match.end()
            while depth:
                depth += {'(': 1, ')': -1}.get(text[end], 0)
                end += 1
            arguments = re.sub(r'\s+', ' ', text[match.end():end - 1]).strip().replace('[[maybe_unused]] ', '')
            name = match[4]
            if not match[1] or '=' in arguments:
                sys.exit(f'lists.py: {name}_kernel in {path} must be a template, and have no default arguments')
            # `assign` is compiled where an expression is written; a GPU's, where nvcc compiles it.
            if name != 'assign' or policy == 'Cuda':
                yield path, name, match[1].strip(), match[3], arguments


def formatted(path, text):
    if '--check' in sys.argv:  # compares words only: not every system has this version
        return text
    command = ['clang-format-14', f'--assume-filename={path.with_suffix(".hpp")}']
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def lists(folder, policy, suffix):
    declared, headers, last = {'tokens': [], 'logits': []}, {'tokens': set(), 'logits': set()}, {}
    instances = {'all': [], 'logits': [], 'half': [], 'attention': []}
    for path, name, template, result, arguments in kernels(folder, policy):
        parameters = re.findall(r'(\w+)(?:,|$)', template[len('template <'):-1])
        part = 'logits' if name in of_logits or not {'Bool', 'Integer'}.isdisjoint(parameters) else 'tokens'
        headers[part] |= set(re.findall(r'#include (<colt5/(?:op|core)/.*>)', path.read_text()))
        declared[part] += ['', f'// {path.name}'] if path != last.get(part) else []
        last[part] = path
        declared[part].append(f'{template}\n{result} {name}_kernel({arguments});')
        for case in cases(name, parameters) if name != 'assign' else []:
            line = re.sub(r'\b(' + '|'.join(case) + r')\b', lambda word: case[word[0]], arguments)
            of = ', '.join(case.values())
            of_any = part == 'logits' or case.get('T') not in (None, 'S')
            kind = 'logits' if of_any else 'attention' if 'head' in case else 'half' if case.get('Y') == 'A' else 'all'
            instances[kind].append(f'template {result} {name}_kernel<{of}>({line});')
    title = '// SPDX-License-Identifier: MIT\n'
    written = f'// Written by tests/kernels/lists.py from the headers of {folder}/: `./dev format` brings it up to date.\n'
    headers['logits'].add(f'<colt5/{folder}/policy.{suffix}>')
    headers['tokens'] |= {f'<colt5/{folder}/traits.{suffix}>', '<colt5/expr/assign.hpp>', f'<colt5/{folder}/declared_of_logits.{suffix}>'}
    for part, stem, what in ('tokens', 'declared', 'kernels'), ('logits', 'declared_of_logits', 'kernels of logits'):
        path = include / folder / f'{stem}.{suffix}'
        yield path, formatted(path, '\n'.join([
            title + '#pragma once\n', written,
            f'/// Declares the {what} of the policy {policy}, which another translation unit instantiates (see kernels.{suffix}).\n',
            *(f'#include {header}' for header in sorted(headers[part])),
            '', 'namespace colt5 {', *declared[part], '', '}  // namespace colt5', '']))
    named = lambda lines: [re.sub(r'\bS\b', 'KernelScalar', re.sub(r'\bA\b', 'KernelSum', line)) for line in lines]
    for part, lines in instances.items():
        if not lines:
            continue
        path = include / folder / ('instances.inc' if part == 'all' else f'instances_of_{part}.inc')
        yield path, formatted(path, '\n'.join([
            title, written, f'// Instances of the kernels of the policy {policy} for KernelScalar, whose sums are KernelSum.', '',
            *named(lines), '']))


def expressions(objects):
    """The instances of assign_kernel that objects in float and bfloat16 do not define."""
    symbols = subprocess.run(['nm', '--undefined-only', '--demangle', *objects], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r'void colt5::assign_kernel<(.*)>\(colt5::Cuda const&', symbols))
    half, of_half, of_sums = 'colt5::detail::SmallFloat<colt5::detail::Bfloat16Format>', set(), set()
    for arguments in found:
        (of_half if half in arguments else of_sums).add(arguments)
    lines = {}
    for name, group in ('sums', of_sums), ('half', of_half):
        lines[name] = []
        for arguments in sorted(group):
            named = re.sub(r'\bfloat\b', 'KernelSum', arguments.replace(half, 'KernelScalar')).replace('colt5::', '').strip()
            out, expression = named.split(', ', 1)
            lines[name].append(f'template void assign_kernel(const Cuda&, const MatrixView<{out}>&, const {expression}&);')
    path = include / 'cuda' / 'expressions.inc'
    path.write_text(formatted(path, '\n'.join([
        '// SPDX-License-Identifier: MIT', '', '// Written by `tests/kernels/lists.py --expressions`.', '',
        '// The expressions that operations and modules evaluate on a GPU.', '', '#if COLT5_KERNELS_OF_LOGITS', *lines['sums'],
        '#else', *lines['half'], '#endif', ''])))


if __name__ == '__main__':
    if '--expressions' in sys.argv:
        sys.exit(expressions(sys.argv[2:]))
    check = '--check' in sys.argv
    all_lists = [(path, text) for backend in (('cpu', 'Cpu', 'hpp'), ('cuda', 'Cuda', 'cuh')) for path, text in lists(*backend)]
    if check:
        print(f'1..{len(all_lists)}')
    for number, (path, text) in enumerate(all_lists, 1):
        if check:
            good = path.exists() and ''.join(path.read_text().split()) == ''.join(text.split())
            print(f'{"ok" if good else "not ok"} {number} - {path.relative_to(include)}' + ('' if good else ': ./dev format writes it'))
        elif not path.exists() or path.read_text() != text:
            path.write_text(text)
