# SPDX-License-Identifier: MIT
"""configure.py OUTPUT FILE...: turns golden files into doctest cases; standard library only.

Each FILE.safetensors says in its own metadata what it holds: `__metadata__.config` is a JSON object of the reference's class and
constructor arguments. They become a compile-time configuration in C++, shared by the files that have the same one, and each file
becomes the doctest case `golden: <file stem>`. Writes OUTPUT/golden_<i>.cpp and prints their names, one a line. A file that cannot
be tested becomes a case that fails and says why, and a line on stderr.

Also writes OUTPUT/runners.hpp: golden::runners<Scalar, Policy>(), the same computations for any policy. Programs look for the files
from the root of the project, so that they can be taken to another machine.
"""
import json
import os
import pathlib
import struct
import sys


class Unsupported(Exception):
    """Says in its message what about a file is not known."""


# How options of the reference are written in C++. bool is an int in Python, but not here.
def number(name, value, kinds, expected):
    if type(value) not in kinds:
        raise Unsupported(f'`{name}` must be {expected}, but is {json.dumps(value)}')
    return repr(value)


def integer(name, value):
    return number(name, value, (int,), 'an integer')


def real(name, value):
    return number(name, value, (int, float), 'a number')


def boolean(name, value):
    if type(value) is not bool:
        raise Unsupported(f'`{name}` must be true or false, but is {json.dumps(value)}')
    return 'true' if value else 'false'


ROUTER_KWARGS = {
    'coor_descent': {'n_iters': integer, 'eps': real, 'fetch_k_ratio': real},
    'cum_softmax': {'temperature': real},
    'sinkhorn': {'n_iters': integer, 'temperature': real},
}
SCALED_EPS = {'eps_init': real, 'eps_decay': real}
HEAD_ROUTER_KWARGS = {**ROUTER_KWARGS['coor_descent'], **SCALED_EPS, 'cosine_sim_routing': boolean, 'cosine_sim_scale': real}
FEED_FORWARD = {'light_ff_mult': real, 'heavy_ff_mult': real}
NULL_TOKENS = dict.fromkeys(('use_null_q_tokens', 'multiply_keys_by_score'), boolean)
HEAD_OPTIONS = {  # of version 0.11, which has one router
    'ConditionalRoutedFeedForward': {},
    'ConditionalRoutedAttention': {**NULL_TOKENS, 'has_light_attn': boolean, 'multiply_queries_by_score': boolean, 'rotary_emb': boolean},
    'ConditionalRoutedCrossAttention': {**NULL_TOKENS, 'route_block_size': integer},
    'ConditionalRoutedImageAttention': {**NULL_TOKENS, 'multiply_queries_by_score': boolean, 'channel_first': boolean},
    'ConditionalRoutedAutoregressiveAttention': {'use_null_q_tokens': boolean, 'rotary_emb': boolean},
    'ConditionalRoutedTransformerBlock': {**NULL_TOKENS, 'multiply_queries_by_score': boolean},
    'ConditionalRoutedViT': {},
}
ATTENTION = dict.fromkeys(('num_routed_kv', 'light_dim_head', 'light_heads', 'light_window_size', 'heavy_dim_head', 'heavy_heads'), integer)

VIT = ('patch_size', 'num_classes', 'dim', 'depth', 'attn_num_heavy_tokens_q', 'attn_num_heavy_tokens_kv', 'attn_heavy_dim_head', 'attn_heavy_heads',
       'attn_light_dim_head', 'attn_light_heads', 'attn_light_window_size', 'ff_num_heavy_tokens')

# class of the reference: the C++ configuration; the integers that it needs; what else it takes; seconds to compile another one
MODULES = {
    'ConditionalRoutedFeedForward': ('FeedForwardConfig', ('dim', 'num_heavy_tokens'), FEED_FORWARD, 1.2),
    'ConditionalRoutedAttention': ('AttentionConfig', ('dim', 'num_heavy_tokens_q', 'num_heavy_tokens_kv'), ATTENTION, 1.5),
    'ConditionalRoutedCrossAttention': ('CrossAttentionConfig', ('dim', 'num_tokens_q', 'num_tokens_kv'),
                                        dict.fromkeys(('dim_head', 'heads', 'kv_routing_tokens'), integer), 1),
    'ConditionalRoutedImageAttention': ('ImageAttentionConfig', ('dim', 'num_heavy_tokens_q', 'num_heavy_tokens_kv'), ATTENTION, 1.5),
    'ConditionalRoutedAutoregressiveAttention': ('AutoregressiveAttentionConfig', ('dim', 'num_heavy_tokens_q', 'num_heavy_tokens_kv'),
                                                 {**ATTENTION, 'heavy_window_size': integer}, 1.5),
    'ConditionalRoutedTransformerBlock': (
        'TransformerBlockConfig', ('dim', 'num_heavy_attn_tokens_q', 'num_heavy_attn_tokens_kv', 'num_heavy_ff_tokens'),
        {**ATTENTION, **FEED_FORWARD}, 2.7),
    'ConditionalRoutedViT': ('ViTConfig', VIT, {'ff_heavy_mult': real, 'ff_light_mult': real, 'channels': integer, 'attn_num_routed_kv': integer}, 3),
}
UNIT_SECONDS = 11  # of modules in one translation unit; the rest takes as long again


def options(given, needed, known, owner):
    """{name: value in C++} of the options that a file gives."""
    for name in given:
        if name not in known:
            raise Unsupported(f'option `{name}` of {owner} is not known')
    for name in needed:
        if name not in given:
            raise Unsupported(f'option `{name}` of {owner} is missing')
    return {name: known[name](name, value) for name, value in given.items()}


def read_config(path):
    """The configuration in a file's metadata."""
    try:
        with open(path, 'rb') as file:
            (size,) = struct.unpack('<Q', file.read(8))
            if size > path.stat().st_size:
                raise ValueError('its header is longer than the file')
            metadata = json.loads(file.read(size)).get('__metadata__', {})
        config = json.loads(metadata['config'])
    except KeyError:
        raise Unsupported('its metadata has no `config`') from None
    except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise Unsupported(f'not a safetensors file with a JSON `config`: {error}') from None
    if not isinstance(config, dict):
        raise Unsupported('its `config` is not an object')
    return config


def descent_arguments(config, reference):
    """The last two of golden::run_coordinate_descent."""
    needed = {'n_iters': integer, 'eps': real, 'k': real}
    given = options(config, needed, {**needed, **SCALED_EPS}, 'coor_descent')
    k, start = given.pop('k'), 'minus_logits' if reference == 'head' else 'zero'
    fields = ', '.join(f'.{field} = {given[field]}' for field in ('n_iters', 'eps', 'eps_init', 'eps_decay') if field in given)
    return f'{{{fields}, .start = colt5::DescentStart::{start}}}, {k}'


def topk_arguments(config):
    """The last two of golden::run_topk."""
    known = {'k': integer, 'ratio': real, 'n_iters': integer, 'eps': real}
    return '{k}, {{.coor_descent_k_ratio = {ratio}, .n_iters = {n_iters}, .eps = {eps}}}'.format(**options(config, known, known, 'topk'))


def module_fields(config, name, reference):
    """{field of the C++ configuration: value}."""
    _, needed, optional, _ = MODULES[name]
    if reference == 'head':
        optional = {**optional, **HEAD_OPTIONS[name]}
        if 'use_null_q_tokens' in optional:  # what the reference always has, and a default that is not ours
            config.setdefault('use_null_q_tokens', True)
    router, kwargs = 'coor_descent' if reference == 'head' else str(config.pop('router_type', 'coor_descent')), config.pop('router_kwargs', {})
    known_kwargs = {**ROUTER_KWARGS, 'coor_descent': HEAD_ROUTER_KWARGS} if reference == 'head' else ROUTER_KWARGS
    if router not in known_kwargs:
        raise Unsupported(f'router {json.dumps(router)} is not known')
    if not isinstance(kwargs, dict):
        raise Unsupported('`router_kwargs` must be an object')

    if name == 'ConditionalRoutedViT':
        for ignored in ('image_size', 'flash_attn'):  # changes no number
            config.pop(ignored, None)
        kwargs = {'eps': config.pop('default_coor_descent_eps', 1.0), **kwargs}
    fields = options(config, needed, {**dict.fromkeys(needed, integer), **optional, 'router_straight_through': boolean}, name)
    if name != 'ConditionalRoutedAutoregressiveAttention':
        fields['router_type'] = f'colt5::RouterType::{router}'
    if reference == 'head':
        fields['router_kwargs.coor_descent'] = 'colt5::CoordinateDescentKwargs::version_0_11()'
        if 'use_null_q_tokens' in optional and name != 'ConditionalRoutedAutoregressiveAttention':
            fields['use_null_kv'] = fields['masked_tokens_get_null_q'] = 'true'
    for field, value in options(kwargs, (), known_kwargs[router], f'the router {router}').items():
        fields[f'router_kwargs.{router}.{field}'] = value
    # What the reference does and we do on request only.
    if router == 'sinkhorn':
        fields['router_kwargs.sinkhorn.masked_tokens_take_part'] = 'true'
    if name == 'ConditionalRoutedViT':
        fields['use_null_kv'] = fields['use_null_q_tokens'] = 'true'
    if name in ('ConditionalRoutedImageAttention', 'ConditionalRoutedViT'):
        fields['routing_scope'] = 'colt5::RoutingScope::window'
    elif 'light_window_size' in optional and name != 'ConditionalRoutedAutoregressiveAttention':
        fields['masked_rows'] = 'colt5::MaskedRows::window_mean'
        fields['attends_to_padding'] = 'true'
    return fields


def literal(text):
    """A C++ string."""
    return '"' + ''.join(c if 32 <= ord(c) < 127 and c not in '"\\' else ''.join(f'\\{b:03o}' for b in c.encode()) for c in text) + '"'


ROOT = pathlib.Path(__file__).resolve().parents[2]


def path_literal(path):
    return literal(os.path.relpath(path, ROOT))


def case(path, body):
    return f'TEST_CASE({literal("golden: " + path.stem)}) {{ {body} }}\n'


def is_right_for_first_sample_only(config, reference):
    """With several routes of keys, version 0.11 reads row b of the batch repeated for each route, which is sample b // routes."""
    return reference == 'head' and config.get('num_routed_kv', 1) > 1 and config.get('shape', [1])[0] > 1


def first_sample_arguments(path):
    """In autoregressive attention, that is row w of the windows that have keys, so the first of these alone has its own mask."""
    config = read_config(path)
    if config['class'] != 'ConditionalRoutedAutoregressiveAttention':
        return path_literal(path)
    return f'{path_literal(path)}, {2 * config.get("heavy_window_size", config.get("light_window_size", 128))}'


def runner(path, run, by_cosine='false'):
    return f'        {{{literal(path.stem)}, {path_literal(path)}, {by_cosine}, {run}}},\n'


def configure(paths):
    """[(seconds, declarations, doctest cases, entries of runners())], with neighbours that have templates in common."""
    modules, others, unsupported, first_samples = {}, [], [], set()
    for path in paths:
        try:
            config = read_config(path)
            reference, name = config.pop('reference', 'v023'), str(config.pop('class', None))
            if is_right_for_first_sample_only(config, reference):
                first_samples.add(path)
            config.pop('shape', None)
            if reference not in ('v023', 'head'):
                raise Unsupported(f'version {json.dumps(reference)} of the reference is not supported yet')
            elif name == 'coor_descent':
                arguments = descent_arguments(config, reference)
                others.append((
                    case(path, f'golden::check_coordinate_descent({path_literal(path)}, {arguments});'),
                    runner(path, '[](const P& policy, File& file, const Variation&) { return '
                                 f'run_coordinate_descent<colt5::accumulate_t<Scalar>>(policy, file, {arguments}); }}')))
            elif name == 'topk':
                arguments = topk_arguments(config)
                others.append((
                    case(path, f'golden::check_topk({path_literal(path)}, {arguments});'),
                    runner(path, '[](const P& policy, File& file, const Variation&) { return '
                                 f'run_topk<colt5::accumulate_t<Scalar>>(policy, file, {arguments}); }}')))
            elif name in MODULES:
                modules.setdefault((name, tuple(sorted(module_fields(config, name, reference).items()))), []).append(path)
            else:
                raise Unsupported(f'class {json.dumps(name)} is not known')
        except Unsupported as reason:
            unsupported.append(f'{path.name}: {reason}')
            others.append((case(path, f'FAIL({literal(unsupported[-1])});'), ''))

    print(*unsupported, sep='\n', file=sys.stderr)
    pieces = [(0, '', cases, entries) for cases, entries in others]
    for i, ((name, fields), users) in enumerate(sorted(modules.items())):
        config, _, _, seconds = MODULES[name]
        by_cosine = dict(fields).get('router_kwargs.coor_descent.cosine_sim_routing', 'false')
        assignments = ''.join(f'    config.{field} = {value};\n' for field, value in fields)
        pieces.append((seconds, f'''
constexpr auto config_{i} = [] {{
    colt5::{config} config{{}};
{assignments}    return config;
}}();
template <typename Scalar, typename P>
using Module{i} = colt5::{name}<config_{i}, Scalar, P>;
''', ''.join(case(path, f'golden::check_first_sample<Module{i}>({first_sample_arguments(path)});' if path in first_samples else
                                        f'golden::check_module<Module{i}>({path_literal(path)});')
                                   for path in users),
                       ''.join(runner(path, f'run_module<Module{i}<Scalar, P>, P>', by_cosine) for path in users if path not in first_samples)))
    return pieces


HEAD = '// SPDX-License-Identifier: MIT\n// Written by tests/golden/configure.py.\n'


def translation_units(pieces):
    units, seconds = [], 0
    for piece_seconds, declarations, cases, _ in pieces:
        if not units or seconds + piece_seconds > UNIT_SECONDS:
            units.append(HEAD + '#include "golden.hpp"\n')
            seconds = 0
        units[-1] += declarations + cases
        seconds += piece_seconds
    return units


def runners(pieces):
    return f'''{HEAD}#pragma once

#include "run.hpp"
{''.join(declarations for _, declarations, _, _ in pieces)}
namespace golden {{

template <typename Scalar, Policy P>
std::vector<Runner<P>> runners() {{
    return {{
{''.join(entries for _, _, _, entries in pieces)}    }};
}}

}}  // namespace golden
'''


def write(path, text):
    if not path.exists() or path.read_text() != text:  # or everything would be compiled again
        path.write_text(text)


if __name__ == '__main__':
    if len(sys.argv) < 3 or sys.argv[1].startswith('-'):
        sys.exit(f'usage: {sys.argv[0]} OUTPUT_FOLDER FILE...')
    output, *files = map(pathlib.Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    configured = configure(sorted(files))
    for number, text in enumerate(translation_units(configured)):
        write(output / f'golden_{number}.cpp', text)
        print(output / f'golden_{number}.cpp')
    write(output / 'runners.hpp', runners(configured))
