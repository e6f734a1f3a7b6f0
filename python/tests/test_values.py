# SPDX-License-Identifier: MIT
"""Values and gradients are the package's."""
import json
import pathlib
import struct

import colt5
import pytest
import torch
from support import check_equal, mask_of, ours, pair, run, tokens

MODULES = ['ConditionalRoutedFeedForward', 'ConditionalRoutedAttention', 'ConditionalRoutedTransformerBlock']


@pytest.mark.parametrize('name', MODULES + ['ConditionalRoutedCrossAttention'])
def test_parameters_are_those_of_the_package(name):
    module, theirs = pair(name)
    assert list(module.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():  # the same numbers from the same seed
        assert torch.equal(module.state_dict()[key], value), key
    module.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize('with_mask', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize('name', MODULES)
def test_values_and_gradients(name, dtype, tolerance, with_mask):
    module, theirs = pair(name, dtype)
    for p in (*module.parameters(), *theirs.parameters()):
        if p.shape[0] == 1:
            p.data /= 32 ** 0.5  # routing tokens: logits of unit deviation do not saturate, so that choices are no ties
    x, mask = tokens(2, 64, 32, dtype=dtype), mask_of(2, 64) if with_mask else None
    check_equal(run(module, x, mask), run(theirs, x, mask), tolerance)


def test_numbers_of_tokens_of_one_call():
    module, theirs = pair('ConditionalRoutedTransformerBlock')
    for p in (*module.parameters(), *theirs.parameters()):
        if p.shape[0] == 1:
            p.data /= 32 ** 0.5
    x = tokens(2, 64, 32)
    counts = dict(num_heavy_attn_tokens_q=5, num_heavy_attn_tokens_kv=7, num_heavy_ff_tokens=9)
    check_equal(run(module, x, **counts), run(theirs, x, **counts), 1e-9)
    with pytest.raises(ValueError, match='`num_heavy_ff_tokens` must be >= 1, but is 0'):
        module(x, num_heavy_ff_tokens=0)
    module.conditional_ff.num_heavy_tokens = theirs.conditional_ff.num_heavy_tokens = 11
    check_equal(run(module, x), run(theirs, x), 1e-9)


def test_cross_attention_whose_context_is_not_routed():
    module, theirs = pair('ConditionalRoutedCrossAttention')
    x, context = tokens(2, 20, 32), tokens(2, 10, 32, seed=5).requires_grad_()
    for p in (module.q_router.routing_token, theirs.q_router.routing_token):
        p.data /= 32 ** 0.5
    results = []
    for m in module, theirs:
        context.grad = None
        result = run(m, x, context=context, context_mask=mask_of(2, 10))
        results.append({**result, 'context': context.grad})
    check_equal(*results, 1e-9)


def golden(name):
    """A file of tests/golden: its configuration, and its arrays in double."""
    data = (pathlib.Path(__file__).resolve().parents[2] / 'tests' / 'golden' / f'{name}.safetensors').read_bytes()
    size = struct.unpack('<Q', data[:8])[0]
    header, kinds = json.loads(data[8:8 + size]), {'F64': torch.float64, 'F32': torch.float32, 'U8': torch.uint8}
    arrays = {}
    for key, entry in header.items():
        if key != '__metadata__':
            begin, end = entry['data_offsets']
            array = torch.frombuffer(bytearray(data[8 + size + begin:8 + size + end]), dtype=kinds[entry['dtype']])
            arrays[key] = array.reshape(entry['shape']).to(torch.bool if entry['dtype'] == 'U8' else torch.float64)
    return json.loads(header['__metadata__']['config']), arrays


VERSION_0_11 = dict(n_iters=20, eps=0.03, eps_init=4, eps_decay=0.7, start='minus_logits', short_rows_score_one=True)


# Cross attention, where the package fails as it is; another router; options of version 0.11.
@pytest.mark.parametrize('name, options', [
    ('v023_cross_routes2', {}),
    ('v023_attn_cum_softmax_mask', dict(masked_rows='window_mean')),
    ('head_attn_default', dict(use_null_kv=True, use_null_q_tokens=True, router_kwargs=VERSION_0_11)),
    ('head_attn_rotary', dict(use_null_kv=True, use_null_q_tokens=True, router_kwargs=VERSION_0_11)),
    ('head_image_channel_first', dict(routing_scope='window')),
])
def test_golden_files(name, options):
    config, arrays = golden(name)
    for key in 'reference', 'shape':
        config.pop(key)
    module = getattr(colt5, config.pop('class'))(**{**config, **options}).double()
    parameters = {key.removeprefix('param.'): value for key, value in arrays.items() if key.startswith('param.')}
    missing, unexpected = module.load_state_dict(parameters, strict=False)
    assert not unexpected and all('inv_freq' in key for key in missing)
    inputs = {key.removeprefix('in.'): value for key, value in arrays.items() if key.startswith('in.')}
    cotangent = inputs.pop('cotangent')
    for value in inputs.values():
        value.requires_grad_(value.dtype.is_floating_point)
    out = module(**inputs)
    (out * cotangent).sum().backward()
    assert (out - arrays['out.y']).abs().max() <= 1e-9 * out.abs().max()
    gradients = {'grad.' + key: value.grad for key, value in inputs.items()}
    gradients.update({'grad.param.' + key: p.grad for key, p in module.named_parameters()})
    compared = [key for key in arrays if key.startswith('grad.')]
    assert len(compared) > 5
    for key in compared:
        assert (gradients[key] - arrays[key]).abs().max() <= 1e-6 * max(1e-3, arrays[key].abs().max()), key
