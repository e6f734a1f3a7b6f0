# SPDX-License-Identifier: MIT
"""Pairs of modules, ours and the package's, with the same parameters."""
import functools
import importlib
import pathlib
import sys

import colt5
import colt5_attention
import pytest
import torch

HEADS = dict(light_dim_head=8, light_heads=4, light_window_size=16, heavy_dim_head=8, heavy_heads=4)
CONFIGS = {
    'ConditionalRoutedFeedForward': dict(dim=32, num_heavy_tokens=8),
    'ConditionalRoutedAttention': dict(dim=32, num_heavy_tokens_q=8, num_heavy_tokens_kv=10, **HEADS),
    'ConditionalRoutedTransformerBlock': dict(dim=32, num_heavy_attn_tokens_q=8, num_heavy_attn_tokens_kv=10,
                                              num_heavy_ff_tokens=6, **HEADS),
    'ConditionalRoutedCrossAttention': dict(dim=32, num_tokens_q=8, num_tokens_kv=10, dim_head=8, heads=4),
}


@functools.lru_cache(maxsize=None)
def version_0_11():
    """Version 0.11 of the package, beside 0.2.3, which has the same name."""
    folder = pathlib.Path(__file__).resolve().parents[2] / 'build' / 'peers' / '0.11'
    if not (folder / 'colt5_attention').exists():
        pytest.skip('there is no colt5-attention 0.11: ./dev python --peer installs it')

    def take_out():
        names = 'colt5_attention', 'local_attention', 'hyper_connections', 'torch_einops_utils'
        return {key: sys.modules.pop(key) for key in list(sys.modules) if key.split('.')[0] in names}

    others = take_out()
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module('colt5_attention')
    finally:
        sys.path.remove(str(folder))
        take_out()
        sys.modules.update(others)


def unsaturated(*modules):
    """Logits of deviation √d saturate: choices are then ties, and routers have no gradient."""
    for module in modules:
        for name, p in module.named_parameters():
            if 'routing_token' in name and p.dim() == 2:
                p.data /= p.shape[-1] ** 0.5
    return modules[0]


def ours(name, dtype=torch.float64, **config):
    torch.manual_seed(1)
    return getattr(colt5, name)(**{**CONFIGS[name], **config}).to(dtype)


def pair(name, dtype=torch.float64, **config):
    torch.manual_seed(1)
    theirs = getattr(colt5_attention, name)(**{**CONFIGS[name], **config}).to(dtype)
    return ours(name, dtype, **config), theirs


def tokens(*shape, dtype=torch.float64, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(batch, length, seed=3):
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.8
    mask[:, 0] = True
    return mask


def run(module, x, mask=None, **arguments):
    """Output, gradient of the tokens, and those of the parameters by name; masked outputs, which mean nothing, as 0."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = module(x, **arguments, **({} if mask is None else dict(mask=mask)))
    if mask is not None:
        out = out.masked_fill(~mask[..., None], 0)
    (out * tokens(*out.shape, dtype=out.dtype, seed=4)).sum().backward()
    return {'out': out.detach(), 'x': x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def check_equal(actual, expected, tolerance, of_gradients=1e-6):
    """Gradients of the descent differ more in double: the package bounds what it takes the logarithm of."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None or not actual[name].any(), name
            continue
        scale = max(value.abs().max().item(), 1e-3)
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        error = (actual[name] - value).abs().max().item()
        assert error <= (tolerance if name == 'out' else max(tolerance, of_gradients)) * scale, name
