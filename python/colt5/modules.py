# SPDX-License-Identifier: MIT
"""The modules of colt5-attention under its names, with its arguments, defaults, parameters and initialization."""
import math
import numbers
import weakref

import torch
from torch import nn

from . import ops
from .errors import value_error
from .library import Spec

# Fields of the C++ structs, in the order in which they are declared there; those of router_kwargs for each router type.
COSINE = 'cosine_sim_routing', 'cosine_sim_scale'
ROUTER_KWARGS = {
    'coor_descent': ('n_iters', 'fetch_k_ratio', 'eps', 'eps_init', 'eps_decay', 'start', 'score_scale', 'iterate_to_convergence',
                     *COSINE, 'short_rows_score_one', 'masked_tokens_count'),
    'cum_softmax': ('temperature', *COSINE, 'short_rows_score_one'),
    'sinkhorn': ('n_iters', 'temperature', 'masked_tokens_take_part', *COSINE),
    'causal': ('rate', 'burst', 'block_size', 'fetch_k_ratio', 'eps', 'score_scale', *COSINE),
}
ENUMS = {
    'start': ('DescentStart', ('zero', 'minus_logits')),
    'masked_rows': ('MaskedRows', ('zero', 'window_mean')),
    'routing_scope': ('RoutingScope', ('map', 'window')),
    'router_type': ('RouterType', tuple(ROUTER_KWARGS)),
    'feed_forward': ('FeedForwardType', ('plain', 'gated')),
}
# The defaults of the router of version 0.11 of the package.
VERSION_0_11 = dict(n_iters=20, eps=0.03, eps_init=4, eps_decay=0.7, start='minus_logits', short_rows_score_one=True)


class CppText(str):
    pass


def cpp(name, value):
    """A value as C++ text."""
    if name in ENUMS:
        kind, names = ENUMS[name]
        if value not in names:
            raise value_error(name, 'one of ' + ', '.join(names), repr(value))
        return f'colt5::{kind}::{value}'
    if isinstance(value, CppText):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return repr(float(value))
    raise value_error(name, 'a number', repr(value))


def cpp_struct(name, fields):
    return CppText(name + '{' + ', '.join(f'.{key} = {cpp(key, value)}' for key, value in fields) + '}')


def cpp_router_kwargs(router_type, kwargs):
    cpp('router_type', router_type)
    kwargs = {key: value for key, value in kwargs.items() if key not in ('use_triton', 'triton_checkpoint_segments')}
    block = kwargs.pop('route_block_size', None)
    known = ROUTER_KWARGS[router_type]
    for name in kwargs:
        if name not in known:
            raise TypeError(f'colt5: `router_kwargs` of {router_type} may have {", ".join(known)} and route_block_size, '
                            f'but has {name}')
    own = cpp_struct('', [(name, kwargs[name]) for name in known if kwargs.get(name) is not None])
    return cpp_struct('', ([('route_block_size', block)] if block else []) + [(router_type, own)])


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = dim ** 0.5
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) * self.scale * self.gamma


def FeedForward(dim, mult):
    hidden = int(dim * mult)
    return nn.Sequential(RMSNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Part(nn.Module):
    """Holds parameters of a module that computes with them."""

    def forward(self, *_, **__):
        raise NotImplementedError(f'colt5: {type(self).__name__} only holds parameters: call the module that it is part of')


class Router(Part):
    def __init__(self, dim, num_routing_tokens=1):
        super().__init__()
        self.routing_token = nn.Parameter(torch.randn(num_routing_tokens, dim))


class GatedFeedForward(Part):
    """Of T5 1.1"""

    def __init__(self, dim, mult):
        super().__init__()
        hidden = int(dim * mult)
        self.norm = RMSNorm(dim)
        self.wi_0 = nn.Linear(dim, hidden, bias=False)
        self.wi_1 = nn.Linear(dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)


class RotaryEmbedding(Part):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer('inv_freq', 1 / (10000 ** (torch.arange(0, dim, 2).float() / dim)))


class RelativeAttentionBias(Part):
    def __init__(self, num_buckets, heads, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_buckets, heads) * dim ** -0.5)


class LocalAttention(Part):
    def __init__(self, dim_head):
        super().__init__()
        self.rel_pos = RotaryEmbedding(dim_head)


class LightAttention(Part):
    def __init__(self, dim, dim_head, heads, num_buckets=None, rotary_emb=False):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, dim_head * heads * 3, bias=False)
        if rotary_emb:
            self.attn_fn = LocalAttention(dim_head)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)
        if num_buckets:
            self.relative_attention_bias = RelativeAttentionBias(num_buckets, heads, dim)


class WindowAttention(Part):
    def __init__(self, dim, dim_head, heads):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, dim_head * heads * 3, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)


class HeavyAttention(Part):
    def __init__(self, dim, dim_head, heads, use_null_kv, num_buckets=None):
        super().__init__()
        self.norm = RMSNorm(dim)
        if use_null_kv:
            self.null_kv = nn.Parameter(torch.randn(2, heads, dim_head))
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * heads * 2, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)
        if num_buckets:
            self.relative_attention_bias = RelativeAttentionBias(num_buckets, heads, dim)


class Slots(dict):
    """Where a module's parameters are. Not part of a copy of the module."""

    def __reduce__(self):
        return Slots, ()


class CompiledModule(nn.Module):
    """A module whose forward and backward pass are C++, compiled when it is first called, for each scalar type and kind of
    device. The modules in it hold the parameters; their forward, and hooks of it, do not run."""

    def _configure(self, module, config, counts, inputs=('x',), layout='bnd'):
        """config: fields of the C++ struct; counts: its type of the numbers of tokens of a call; layout: of the inputs"""
        name = module.removeprefix('ConditionalRouted') + 'Config'
        text = cpp_struct(name, [(key, value) for key, value in config.items() if value is not None])
        self._paths = [name.split('.') for name, _ in self.named_parameters()]
        self._draws_noise = config.get('router_type') == 'sinkhorn' or config.get('dropout', 0) > 0
        self._key = Spec(module, text, counts, inputs, ['.'.join(path) for path in self._paths], layout).key
        self._slots = Slots()

    def _call(self, inputs, masks, *counts):
        x = inputs[0]
        convert = x.is_cuda and torch.is_autocast_enabled('cuda')
        if convert:
            inputs = [t.to(torch.get_autocast_dtype('cuda')) for t in inputs]
        parameters = self._current_parameters()
        if not x.is_cuda and torch.is_autocast_enabled('cpu'):
            inputs = [t.to(parameters[0].dtype) for t in inputs]
        noise = torch.randint(2 ** 62, ()) if self._draws_noise and self.training else None
        return ops.call(self._key, inputs, masks, counts, parameters, noise, convert)

    def _current_parameters(self):
        if torch.compiler.is_compiling():
            return self._walk()
        of, slots = self._slots.get('slots', (None, None))
        if of is None or of() is not self:  # a shallow copy has those of its original
            slots = [(self.get_submodule('.'.join(path[:-1]))._parameters, path[-1]) for path in self._paths]
            self._slots = Slots(slots=(weakref.ref(self), slots))
        try:
            return [owner[name] for owner, name in slots]
        except KeyError:  # a parametrization, for instance, keeps them elsewhere
            return self._walk()

    def _walk(self):
        parameters = []
        for path in self._paths:
            at = self
            for name in path:
                at = getattr(at, name)
            parameters.append(at)
        return parameters


def chosen(given, configured):
    return configured if given is None else given


class ConditionalRoutedFeedForward(CompiledModule):
    """light(x) for every token, and heavy(x) for the num_heavy_tokens that the router chooses."""

    def __init__(self, dim, *, num_heavy_tokens, light_ff_mult=0.5, heavy_ff_mult=4, router_straight_through=True,
                 router_type='coor_descent', router_kwargs: dict = {}, use_triton=False, feed_forward='plain'):
        super().__init__()
        kwargs = cpp_router_kwargs(router_type, router_kwargs)
        cpp('feed_forward', feed_forward)
        kind = GatedFeedForward if feed_forward == 'gated' else FeedForward
        self.num_heavy_tokens = num_heavy_tokens
        self.router_type = router_type
        self.router = Router(dim)
        self.light_ff = kind(dim, light_ff_mult)
        self.heavy_ff = kind(dim, heavy_ff_mult)
        self._configure('ConditionalRoutedFeedForward', dict(
            dim=dim, num_heavy_tokens=1, feed_forward=feed_forward, light_ff_mult=light_ff_mult, heavy_ff_mult=heavy_ff_mult,
            router_straight_through=router_straight_through, router_type=router_type, router_kwargs=kwargs),
            'FeedForwardCounts')

    def forward(self, x, mask=None, num_heavy_tokens=None):
        return self._call((x,), (mask,), chosen(num_heavy_tokens, self.num_heavy_tokens))


class RoutedAttention(CompiledModule):
    """What attention over a sequence and over maps have in common."""

    def forward(self, x, *, num_heavy_tokens_q=None, num_heavy_tokens_kv=None, mask=None):
        return self._call((x,), (mask,), chosen(num_heavy_tokens_q, self.num_heavy_tokens_q),
                          chosen(num_heavy_tokens_kv, self.num_heavy_tokens_kv))

    def _hold(self, dim, num_heavy_tokens_q, num_heavy_tokens_kv, light_attn, num_routed_q, num_routed_kv, use_null_q_tokens,
              heavy_dim_head, heavy_heads, use_null_kv, num_buckets=None, rotary_emb=False):
        """The numbers of tokens, and the parameters in the order in which the package draws them."""
        self.num_heavy_tokens_q = num_heavy_tokens_q
        self.num_heavy_tokens_kv = num_heavy_tokens_kv
        self.light_attn = light_attn
        self.null_q_token = nn.Parameter(torch.randn(dim)) if use_null_q_tokens else None
        self.q_router = Router(dim, num_routed_q)
        self.kv_router = Router(dim, num_routed_kv)
        self.heavy_attn = HeavyAttention(dim, heavy_dim_head, heavy_heads, use_null_kv, num_buckets)
        self.rotary_emb = RotaryEmbedding(heavy_dim_head) if rotary_emb else None


class ConditionalRoutedAttention(RoutedAttention):
    """Local attention for every token, and attention of routed queries over routed keys and values."""

    def __init__(self, dim, *, num_heavy_tokens_q, num_heavy_tokens_kv, num_routed_kv=1, has_light_attn=True, light_dim_head=64,
                 light_heads=8, light_window_size=128, heavy_dim_head=64, heavy_heads=8, router_straight_through=True,
                 router_type='coor_descent', router_kwargs: dict = {}, multiply_keys_by_score=False,
                 multiply_queries_by_score=False, use_triton=False, use_null_kv=False, use_null_q_tokens=False,
                 use_flash_attn=False, rotary_emb=False, masked_rows='zero', attends_to_padding=False,
                 masked_tokens_get_null_q=False, num_routed_q=1, light_rotary_emb=False, use_relative_position_bias=False,
                 relative_position_num_buckets=32, relative_position_max_distance=128):
        super().__init__()
        kwargs = cpp_router_kwargs(router_type, router_kwargs)
        num_buckets = relative_position_num_buckets if use_relative_position_bias else None
        self.router_type = router_type
        self._hold(dim, num_heavy_tokens_q, num_heavy_tokens_kv,
                   LightAttention(dim, light_dim_head, light_heads, num_buckets, light_rotary_emb) if has_light_attn else None,
                   num_routed_q, num_routed_kv, use_null_q_tokens, heavy_dim_head, heavy_heads, use_null_kv, num_buckets, rotary_emb)
        self._configure('ConditionalRoutedAttention', dict(
            dim=dim, num_heavy_tokens_q=1, num_heavy_tokens_kv=1, num_routed_kv=num_routed_kv, num_routed_q=num_routed_q,
            light_dim_head=light_dim_head, light_heads=light_heads, light_window_size=light_window_size,
            heavy_dim_head=heavy_dim_head, heavy_heads=heavy_heads, router_straight_through=router_straight_through,
            router_type=router_type, router_kwargs=kwargs, masked_rows=masked_rows, attends_to_padding=attends_to_padding,
            has_light_attn=has_light_attn, use_null_kv=use_null_kv, use_null_q_tokens=use_null_q_tokens,
            masked_tokens_get_null_q=masked_tokens_get_null_q, multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score, use_relative_position_bias=use_relative_position_bias,
            relative_position_num_buckets=relative_position_num_buckets,
            relative_position_max_distance=relative_position_max_distance, rotary_emb=rotary_emb,
            light_rotary_emb=light_rotary_emb), 'AttentionCounts')


class ConditionalRoutedImageAttention(RoutedAttention):
    """Of version 0.11, with its defaults: attention over maps (b, h, w, d), or (b, d, h, w) with channel_first. Every token
    attends to its window, routed queries to routed keys and values. The routers choose from the whole map, or as the package
    does from each window (routing_scope='window')."""

    def __init__(self, dim, *, num_heavy_tokens_q, num_heavy_tokens_kv, num_routed_kv=1, light_dim_head=64, light_heads=8,
                 light_window_size=128, heavy_dim_head=64, heavy_heads=8, router_straight_through=True, router_kwargs: dict = {},
                 multiply_keys_by_score=False, multiply_queries_by_score=False, use_triton=False, use_null_q_tokens=True,
                 use_flash_attn=False, channel_first=False, routing_scope='map', use_null_kv=True, masked_tokens_get_null_q=False,
                 num_routed_q=1):
        super().__init__()
        self._hold(dim, num_heavy_tokens_q, num_heavy_tokens_kv, WindowAttention(dim, light_dim_head, light_heads), num_routed_q,
                   num_routed_kv, use_null_q_tokens, heavy_dim_head, heavy_heads, use_null_kv)
        self._configure('ConditionalRoutedImageAttention', dict(
            dim=dim, num_heavy_tokens_q=1, num_heavy_tokens_kv=1, num_routed_kv=num_routed_kv, num_routed_q=num_routed_q,
            light_dim_head=light_dim_head, light_heads=light_heads, light_window_size=light_window_size,
            heavy_dim_head=heavy_dim_head, heavy_heads=heavy_heads, router_straight_through=router_straight_through,
            router_type='coor_descent', router_kwargs=cpp_router_kwargs('coor_descent', {**VERSION_0_11, **router_kwargs}),
            channel_first=channel_first, routing_scope=routing_scope, use_null_kv=use_null_kv,
            use_null_q_tokens=use_null_q_tokens, masked_tokens_get_null_q=masked_tokens_get_null_q,
            multiply_keys_by_score=multiply_keys_by_score, multiply_queries_by_score=multiply_queries_by_score),
            'AttentionCounts', layout='bdhw' if channel_first else 'bhwd')


class ConditionalRoutedAutoregressiveAttention(RoutedAttention):
    """Of version 0.11, with its defaults: a token attends lightly to the window before its own and to its own up to itself;
    routed queries of a window attend to routed keys and values before it. Which queries are routed depends on later tokens
    of their window: for attention that depends on none, use ConditionalRoutedAttention with router_type='causal'."""

    def __init__(self, dim, *, num_heavy_tokens_q, num_heavy_tokens_kv, num_routed_kv=1, light_dim_head=64, light_heads=8,
                 light_window_size=128, heavy_window_size=None, heavy_dim_head=64, heavy_heads=8, router_straight_through=True,
                 router_kwargs: dict = {}, multiply_keys_by_score=False, multiply_queries_by_score=False, use_triton=False,
                 use_null_q_tokens=True, use_flash_attn=False, rotary_emb=False):
        super().__init__()
        for name, value in dict(multiply_keys_by_score=multiply_keys_by_score,
                                multiply_queries_by_score=multiply_queries_by_score).items():
            if value:
                raise value_error(name, 'False in autoregressive attention', value)
        for name in 'cosine_sim_routing', 'route_block_size':
            if router_kwargs.get(name):
                raise value_error(f'router_kwargs[{name!r}]', 'absent in autoregressive attention', router_kwargs[name])
        self._hold(dim, num_heavy_tokens_q, num_heavy_tokens_kv, LightAttention(dim, light_dim_head, light_heads), 1,
                   num_routed_kv, use_null_q_tokens, heavy_dim_head, heavy_heads, True, rotary_emb=rotary_emb)
        self._configure('ConditionalRoutedAutoregressiveAttention', dict(
            dim=dim, num_heavy_tokens_q=1, num_heavy_tokens_kv=1, num_routed_kv=num_routed_kv, light_dim_head=light_dim_head,
            light_heads=light_heads, light_window_size=light_window_size, heavy_window_size=heavy_window_size,
            heavy_dim_head=heavy_dim_head, heavy_heads=heavy_heads, router_straight_through=router_straight_through,
            router_kwargs=cpp_router_kwargs('coor_descent', {**VERSION_0_11, **router_kwargs}),
            use_null_q_tokens=use_null_q_tokens, rotary_emb=rotary_emb), 'AttentionCounts')

    def forward(self, x, *, num_heavy_tokens_q=None, num_heavy_tokens_kv=None, random_route=False):
        if random_route:
            raise value_error('random_route', 'False', random_route)
        return super().forward(x, num_heavy_tokens_q=num_heavy_tokens_q, num_heavy_tokens_kv=num_heavy_tokens_kv)


class ConditionalRoutedCrossAttention(CompiledModule):
    """Attention of routed queries over the routed tokens of a context. num_sets_kv is accepted and does nothing, as in
    the package: kv_routing_tokens counts the sets."""

    def __init__(self, dim, *, num_tokens_q, num_tokens_kv, num_sets_kv=1, dim_head=64, heads=8, router_straight_through=True,
                 router_type='coor_descent', router_kwargs: dict = {}, kv_routing_tokens=1, multiply_keys_by_score=False,
                 use_triton=False, use_null_kv=False, use_null_q_tokens=False, use_flash_attn=False, route_block_size=None,
                 masked_tokens_get_null_q=False, q_routing_tokens=1, condition_kv_routing_on_queries=False,
                 use_relative_position_bias=False, relative_position_num_buckets=32, relative_position_max_distance=128):
        super().__init__()
        kwargs = cpp_router_kwargs(router_type, router_kwargs)
        self.num_tokens_q = num_tokens_q
        self.num_tokens_kv = num_tokens_kv
        self.router_type = router_type
        self.null_q_token = nn.Parameter(torch.randn(dim)) if use_null_q_tokens else None
        self.q_router = Router(dim, q_routing_tokens)
        self.kv_router = Router(dim, kv_routing_tokens)
        self.heavy_attn = HeavyAttention(dim, dim_head, heads, use_null_kv,
                                         relative_position_num_buckets if use_relative_position_bias else None)
        if condition_kv_routing_on_queries:
            self.kv_routing_tokens = HeavyAttention(dim, dim_head, heads, False)
        self._configure('ConditionalRoutedCrossAttention', dict(
            dim=dim, num_tokens_q=1, num_tokens_kv=1, dim_head=dim_head, heads=heads,
            router_straight_through=router_straight_through, router_type=router_type, router_kwargs=kwargs,
            kv_routing_tokens=kv_routing_tokens, q_routing_tokens=q_routing_tokens, route_block_size=route_block_size,
            condition_kv_routing_on_queries=condition_kv_routing_on_queries, use_null_kv=use_null_kv,
            use_null_q_tokens=use_null_q_tokens, masked_tokens_get_null_q=masked_tokens_get_null_q,
            multiply_keys_by_score=multiply_keys_by_score, use_relative_position_bias=use_relative_position_bias,
            relative_position_num_buckets=relative_position_num_buckets,
            relative_position_max_distance=relative_position_max_distance),
            'CrossAttentionCounts', ('x', 'context'))

    def forward(self, x, context, *, num_tokens_q=None, num_tokens_kv=None, mask=None, context_mask=None):
        return self._call((x, context), (mask, context_mask), chosen(num_tokens_q, self.num_tokens_q),
                          chosen(num_tokens_kv, self.num_tokens_kv))


class ConditionalRoutedTransformerBlock(CompiledModule):
    """x = conditional_attn(x) + x; x = conditional_ff(x) + x. In training, with `dropout`, this share of what each half adds
    is 0 and the rest is multiplied by 1 / (1 - dropout)."""

    def __init__(self, dim, *, num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv, num_routed_kv=1, num_heavy_ff_tokens,
                 light_dim_head=64, light_heads=8, light_window_size=128, heavy_dim_head=64, heavy_heads=8, light_ff_mult=0.5,
                 heavy_ff_mult=4, router_straight_through=True, router_type='coor_descent', router_kwargs: dict = {},
                 multiply_keys_by_score=False, multiply_queries_by_score=False, use_triton=False, use_null_kv=False,
                 use_null_q_tokens=False, use_flash_attn=False, masked_rows='zero', attends_to_padding=False,
                 masked_tokens_get_null_q=False, has_light_attn=True, rotary_emb=False, num_routed_q=1, light_rotary_emb=False,
                 use_relative_position_bias=False, relative_position_num_buckets=32, relative_position_max_distance=128,
                 feed_forward='plain', dropout=0):
        super().__init__()
        routes = dict(num_routed_kv=num_routed_kv, num_routed_q=num_routed_q)
        routing = dict(router_straight_through=router_straight_through, router_type=router_type)
        heads = dict(light_dim_head=light_dim_head, light_heads=light_heads, light_window_size=light_window_size,
                     heavy_dim_head=heavy_dim_head, heavy_heads=heavy_heads)
        widths = dict(feed_forward=feed_forward, light_ff_mult=light_ff_mult, heavy_ff_mult=heavy_ff_mult)
        options = dict(masked_rows=masked_rows, attends_to_padding=attends_to_padding, has_light_attn=has_light_attn,
                       use_null_kv=use_null_kv, use_null_q_tokens=use_null_q_tokens,
                       masked_tokens_get_null_q=masked_tokens_get_null_q, multiply_keys_by_score=multiply_keys_by_score,
                       multiply_queries_by_score=multiply_queries_by_score,
                       use_relative_position_bias=use_relative_position_bias,
                       relative_position_num_buckets=relative_position_num_buckets,
                       relative_position_max_distance=relative_position_max_distance, rotary_emb=rotary_emb,
                       light_rotary_emb=light_rotary_emb)
        self.conditional_ff = ConditionalRoutedFeedForward(dim, num_heavy_tokens=num_heavy_ff_tokens, router_kwargs=router_kwargs,
                                                           **widths, **routing)
        self.conditional_attn = ConditionalRoutedAttention(
            dim, num_heavy_tokens_q=num_heavy_attn_tokens_q, num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            router_kwargs=router_kwargs, **routes, **heads, **routing, **options)
        self._configure('ConditionalRoutedTransformerBlock', dict(
            dim=dim, num_heavy_attn_tokens_q=1, num_heavy_attn_tokens_kv=1, **routes, num_heavy_ff_tokens=1, **heads, **widths,
            **routing, router_kwargs=cpp_router_kwargs(router_type, router_kwargs), **options, dropout=dropout),
            'TransformerBlockCounts')

    def forward(self, x, mask=None, num_heavy_attn_tokens_q=None, num_heavy_attn_tokens_kv=None, num_heavy_ff_tokens=None):
        attn, ff = self.conditional_attn, self.conditional_ff
        return self._call((x,), (mask,), chosen(num_heavy_attn_tokens_q, attn.num_heavy_tokens_q),
                          chosen(num_heavy_attn_tokens_kv, attn.num_heavy_tokens_kv),
                          chosen(num_heavy_ff_tokens, ff.num_heavy_tokens))
