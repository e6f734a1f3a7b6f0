# SPDX-License-Identifier: MIT
"""What is wrong is said in one exception, which names the argument and what it must be."""
import functools
import re

import colt5
import pytest
import torch
from support import ours, tokens


def check(message, kind, call):
    with pytest.raises(kind, match='^' + re.escape(message) + '$'):
        call()


def test_shapes_and_types():
    module, x = ours('ConditionalRoutedFeedForward'), tokens(2, 20, 32)
    check('colt5: `x` must have shape (any, any, 32), but has (2, 20, 31)', colt5.ShapeError, lambda: module(x[..., 1:]))
    check('colt5: `x` must have shape (any, any, 32), but has (20, 32)', colt5.ShapeError, lambda: module(x[0]))
    mask = torch.ones(2, 20, dtype=torch.bool)
    check('colt5: `mask` must have shape (2, 20), but has (2, 19)', colt5.ShapeError, lambda: module(x, mask=mask[:, 1:]))
    check('colt5: `mask` must be torch.bool on cpu, but is torch.int64 on cpu', ValueError, lambda: module(x, mask=mask.long()))
    check('colt5: `x` must be of torch.float64, as the parameters, but is of torch.float32', ValueError,
          lambda: module(x.float()))
    check('colt5: `x` must be of torch.float64, as the parameters, but is of torch.float16', ValueError, lambda: module(x.half()))
    check('colt5: `x.dtype` must be float32 or float64 on the CPU, on a GPU also bfloat16 or float16, but is torch.float16',
          ValueError, lambda: ours('ConditionalRoutedFeedForward').half()(x.half()))
    module.heavy_ff[1].weight = torch.nn.Parameter(tokens(64, 32))
    check('colt5: `heavy_ff.1.weight` must have shape (128, 32), but has (64, 32)', colt5.ShapeError, lambda: module(x))


def test_shapes_of_cross_attention():
    module, x, context = ours('ConditionalRoutedCrossAttention', kv_routing_tokens=2, router_straight_through=False), \
        tokens(2, 20, 32), tokens(2, 10, 32)
    check('colt5: `context` must have shape (2, any, 32), but has (1, 10, 32)', colt5.ShapeError, lambda: module(x, context[:1]))
    check('colt5: `context_mask` must have shape (2, 10), but has (2, 20)', colt5.ShapeError,
          lambda: module(x, context, context_mask=torch.ones(2, 20, dtype=torch.bool)))
    check('colt5: `context` must be torch.float64 on cpu, as `x`, but is torch.float32 on cpu', ValueError,
          lambda: module(x, context.float()))


def test_shapes_of_maps():
    module = colt5.ConditionalRoutedImageAttention(
        32, num_heavy_tokens_q=5, num_heavy_tokens_kv=6, light_dim_head=8, light_heads=4, light_window_size=4, heavy_dim_head=8,
        heavy_heads=4, channel_first=True, routing_scope='window').double()
    maps = tokens(2, 32, 6, 7)
    assert module(maps).shape == maps.shape
    check('colt5: `x` must have shape (any, 32, any, any), but has (2, 6, 7, 32)', colt5.ShapeError,
          lambda: module(maps.movedim(1, -1)))
    check('colt5: `mask` must have shape (2, 6, 7), but has (2, 7, 6)', colt5.ShapeError,
          lambda: module(maps, mask=torch.ones(2, 7, 6, dtype=torch.bool)))
    mask = torch.ones(2, 6, 7, dtype=torch.bool)
    mask[1, 5] = mask[1, :, 6] = False
    assert (module(maps, mask=mask)[1:, :, :5, :6] - module(maps[1:, :, :5, :6])).abs().max() < 1e-12


def test_configurations():
    check("colt5: `router_type` must be one of coor_descent, cum_softmax, sinkhorn, causal, but is 'top'", ValueError,
          lambda: ours('ConditionalRoutedFeedForward', router_type='top'))
    with pytest.raises(TypeError, match='`router_kwargs` of coor_descent may have .*, but has temperature'):
        ours('ConditionalRoutedFeedForward', router_kwargs=dict(temperature=1.))
    for name, wanted in dict(masked_rows='one of zero, window_mean', router_straight_through='a number').items():
        with pytest.raises(ValueError, match=f'colt5: `{name}` must be {wanted}, but is .none.'):
            ours('ConditionalRoutedAttention', **{name: 'none'})
    module = ours('ConditionalRoutedAttention', heavy_heads=3, num_routed_kv=2)  # the compiler says it
    with pytest.raises(colt5.BuildError, match='colt5: AttentionConfig.heavy_heads must be divisible by num_routed_kv'):
        module(tokens(2, 20, 32))


def test_what_autoregressive_attention_does_not_have():
    make = functools.partial(colt5.ConditionalRoutedAutoregressiveAttention, 32, num_heavy_tokens_q=4, num_heavy_tokens_kv=4)
    for name in 'multiply_keys_by_score', 'multiply_queries_by_score':
        check(f'colt5: `{name}` must be False in autoregressive attention, but is True', ValueError, lambda: make(**{name: True}))
    check("colt5: `router_kwargs['route_block_size']` must be absent in autoregressive attention, but is 8", ValueError,
          lambda: make(router_kwargs=dict(route_block_size=8)))
    check('colt5: `random_route` must be False, but is True', ValueError, lambda: make()(tokens(1, 8, 32), random_route=True))


def test_images():
    options = dict(patch_size=(4, 8), num_classes=3, dim=32, depth=1, attn_num_heavy_tokens_q=4, attn_num_heavy_tokens_kv=4,
                   attn_heavy_dim_head=8, attn_heavy_heads=4, attn_light_dim_head=8, attn_light_heads=4, attn_light_window_size=4,
                   ff_num_heavy_tokens=6, ff_heavy_mult=4, ff_light_mult=2)
    vit = colt5.ConditionalRoutedViT(image_size=32, **options)
    check('colt5: `img` must have shape (any, 3, any, any), but has (2, 1, 32, 32)', colt5.ShapeError,
          lambda: vit(torch.zeros(2, 1, 32, 32)))
    check('colt5: `width of img` must be a multiple of patch_size, 8, but is 36', ValueError,
          lambda: vit(torch.zeros(2, 3, 32, 36)))
    check('colt5: `height of image_size` must be a multiple of patch_size, 4, but is 30', ValueError,
          lambda: colt5.ConditionalRoutedViT(image_size=(30, 32), **options))
