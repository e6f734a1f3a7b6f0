# SPDX-License-Identifier: MIT
"""The modules of colt5-attention under its names, with its arguments, defaults, parameters and initialization."""
import weakref

import torch
from torch import nn

from . import ops
from .errors import value_error
from .library import Spec

# Fields of the C++ structs, in the order in which they are declared there; those of router_kwargs for each router type.
ROUTER_KWARGS = {
    'coor_descent': ('n_iters', 'fetch_k_ratio', 'eps', 'eps_init', 'eps_decay', 'start', 'score_scale', 'iterate_to_convergence',
                     'cosine_sim_routing', 'cosine_sim_scale', 'short_rows_score_one'),
    'cum_softmax': ('temperature', 'cosine_sim_routing', 'cosine_sim_scale', 'short_rows_score_one'),
    'sinkhorn': ('n_iters', 'temperature', 'masked_tokens_take_part', 'cosine_sim_routing', 'cosine_sim_scale'),
}
ENUMS = {'start': 'DescentStart', 'masked_rows': 'MaskedRows', 'routing_scope': 'RoutingScope', 'router_type': 'RouterType'}


def cpp(name, value):
    """A value as C++ text."""
    if name in ENUMS:
        return f'colt5::{ENUMS[name]}::{value}'
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if not isinstance(value, str) else value


def cpp_struct(name, fields):
    return name + '{' + ', '.join(f'.{key} = {cpp(key, value)}' for key, value in fields) + '}'


def cpp_router_kwargs(router_type, kwargs):
    if router_type not in ROUTER_KWARGS:
        raise value_error('router_type', 'one of ' + ', '.join(ROUTER_KWARGS), repr(router_type))
    kwargs = dict(kwargs)
    kwargs.pop('use_triton', None)
    block = kwargs.pop('route_block_size', None)
    known = ROUTER_KWARGS[router_type]
    for name in kwargs:
        if name not in known:
            raise TypeError(f'colt5: `router_kwargs` of {router_type} may have {", ".join(known)} and route_block_size, '
                            f'but has {name}')
    own = cpp_struct('', [(name, kwargs[name]) for name in known if name in kwargs])
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


class LightAttention(Part):
    def __init__(self, dim, dim_head, heads):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, dim_head * heads * 3, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)


class WindowAttention(Part):
    def __init__(self, dim, dim_head, heads):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, dim_head * heads * 3, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)


class HeavyAttention(Part):
    def __init__(self, dim, dim_head, heads, use_null_kv):
        super().__init__()
        self.norm = RMSNorm(dim)
        if use_null_kv:
            self.null_kv = nn.Parameter(torch.randn(2, heads, dim_head))
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * heads * 2, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)


class RotaryEmbedding(Part):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer('inv_freq', 1 / (10000 ** (torch.arange(0, dim, 2).float() / dim)))


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
        self._draws_noise = config['router_type'] == 'sinkhorn'
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
                 router_type='coor_descent', router_kwargs: dict = {}, use_triton=False):
        super().__init__()
        kwargs = cpp_router_kwargs(router_type, router_kwargs)
        self.num_heavy_tokens = num_heavy_tokens
        self.router_type = router_type
        self.router = Router(dim)
        self.light_ff = FeedForward(dim, light_ff_mult)
        self.heavy_ff = FeedForward(dim, heavy_ff_mult)
        self._configure('ConditionalRoutedFeedForward', dict(
            dim=dim, num_heavy_tokens=1, light_ff_mult=light_ff_mult, heavy_ff_mult=heavy_ff_mult,
            router_straight_through=router_straight_through, router_type=router_type, router_kwargs=kwargs),
            'FeedForwardCounts')

    def forward(self, x, mask=None, num_heavy_tokens=None):
        return self._call((x,), (mask,), chosen(num_heavy_tokens, self.num_heavy_tokens))


class ConditionalRoutedAttention(CompiledModule):
    """Local attention for every token, and attention of routed queries over routed keys and values."""

    def __init__(self, dim, *, num_heavy_tokens_q, num_heavy_tokens_kv, num_routed_kv=1, has_light_attn=True, light_dim_head=64,
                 light_heads=8, light_window_size=128, heavy_dim_head=64, heavy_heads=8, router_straight_through=True,
                 router_type='coor_descent', router_kwargs: dict = {}, multiply_keys_by_score=False,
                 multiply_queries_by_score=False, use_triton=False, use_null_kv=False, use_null_q_tokens=False,
                 use_flash_attn=False, rotary_emb=False, masked_rows='zero', attends_to_padding=False,
                 masked_tokens_get_null_q=False):
        super().__init__()
        kwargs = cpp_router_kwargs(router_type, router_kwargs)
        self.num_heavy_tokens_q = num_heavy_tokens_q
        self.num_heavy_tokens_kv = num_heavy_tokens_kv
        self.router_type = router_type
        self.light_attn = LightAttention(dim, light_dim_head, light_heads) if has_light_attn else None
        self.null_q_token = nn.Parameter(torch.randn(dim)) if use_null_q_tokens else None
        self.q_router = Router(dim)
        self.kv_router = Router(dim, num_routed_kv)
        self.heavy_attn = HeavyAttention(dim, heavy_dim_head, heavy_heads, use_null_kv)
        self.rotary_emb = RotaryEmbedding(heavy_dim_head) if rotary_emb else None
        self._configure('ConditionalRoutedAttention', dict(
            dim=dim, num_heavy_tokens_q=1, num_heavy_tokens_kv=1, num_routed_kv=num_routed_kv, light_dim_head=light_dim_head,
            light_heads=light_heads, light_window_size=light_window_size, heavy_dim_head=heavy_dim_head,
            heavy_heads=heavy_heads, router_straight_through=router_straight_through, router_type=router_type,
            router_kwargs=kwargs, masked_rows=masked_rows, attends_to_padding=attends_to_padding,
            has_light_attn=has_light_attn, use_null_kv=use_null_kv, use_null_q_tokens=use_null_q_tokens,
            masked_tokens_get_null_q=masked_tokens_get_null_q, multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score, rotary_emb=rotary_emb),
            'AttentionCounts')

    def forward(self, x, *, num_heavy_tokens_q=None, num_heavy_tokens_kv=None, mask=None):
        return self._call((x,), (mask,), chosen(num_heavy_tokens_q, self.num_heavy_tokens_q),
                          chosen(num_heavy_tokens_kv, self.num_heavy_tokens_kv))


# The defaults of the router of version 0.11, the first with image attention.
VERSION_0_11 = dict(n_iters=20, eps=0.03, eps_init=4, eps_decay=0.7, start='minus_logits', short_rows_score_one=True)


class ConditionalRoutedImageAttention(CompiledModule):
    """Of version 0.11, with its defaults: attention over maps (b, h, w, d), or (b, d, h, w) with channel_first. Every token
    attends to its window, routed queries to routed keys and values. The routers choose from the whole map, or as the package
    does from each window (routing_scope='window')."""

    def __init__(self, dim, *, num_heavy_tokens_q, num_heavy_tokens_kv, num_routed_kv=1, light_dim_head=64, light_heads=8,
                 light_window_size=128, heavy_dim_head=64, heavy_heads=8, router_straight_through=True, router_kwargs: dict = {},
                 multiply_keys_by_score=False, multiply_queries_by_score=False, use_triton=False, use_null_q_tokens=True,
                 use_flash_attn=False, channel_first=False, routing_scope='map'):
        super().__init__()
        self.num_heavy_tokens_q = num_heavy_tokens_q
        self.num_heavy_tokens_kv = num_heavy_tokens_kv
        self.light_attn = WindowAttention(dim, light_dim_head, light_heads)
        self.null_q_token = nn.Parameter(torch.randn(dim)) if use_null_q_tokens else None
        self.q_router = Router(dim)
        self.kv_router = Router(dim, num_routed_kv)
        self.heavy_attn = HeavyAttention(dim, heavy_dim_head, heavy_heads, True)
        self._configure('ConditionalRoutedImageAttention', dict(
            dim=dim, num_heavy_tokens_q=1, num_heavy_tokens_kv=1, num_routed_kv=num_routed_kv, light_dim_head=light_dim_head,
            light_heads=light_heads, light_window_size=light_window_size, heavy_dim_head=heavy_dim_head,
            heavy_heads=heavy_heads, router_straight_through=router_straight_through, router_type='coor_descent',
            router_kwargs=cpp_router_kwargs('coor_descent', {**VERSION_0_11, **router_kwargs}), channel_first=channel_first,
            routing_scope=routing_scope, use_null_kv=True, use_null_q_tokens=use_null_q_tokens,
            multiply_keys_by_score=multiply_keys_by_score, multiply_queries_by_score=multiply_queries_by_score),
            'AttentionCounts', layout='bdhw' if channel_first else 'bhwd')

    def forward(self, x, *, num_heavy_tokens_q=None, num_heavy_tokens_kv=None, mask=None):
        return self._call((x,), (mask,), chosen(num_heavy_tokens_q, self.num_heavy_tokens_q),
                          chosen(num_heavy_tokens_kv, self.num_heavy_tokens_kv))


class ConditionalRoutedCrossAttention(CompiledModule):
    """Attention of routed queries over the routed tokens of a context. num_sets_kv is accepted and does nothing, as in
    the package: kv_routing_tokens counts the sets."""

    def __init__(self, dim, *, num_tokens_q, num_tokens_kv, num_sets_kv=1, dim_head=64, heads=8, router_straight_through=True,
                 router_type='coor_descent', router_kwargs: dict = {}, kv_routing_tokens=1, multiply_keys_by_score=False,
                 use_triton=False, use_null_kv=False, use_null_q_tokens=False, use_flash_attn=False, route_block_size=None,
                 masked_tokens_get_null_q=False):
        super().__init__()
        kwargs = cpp_router_kwargs(router_type, router_kwargs)
        self.num_tokens_q = num_tokens_q
        self.num_tokens_kv = num_tokens_kv
        self.router_type = router_type
        self.null_q_token = nn.Parameter(torch.randn(dim)) if use_null_q_tokens else None
        self.q_router = Router(dim)
        self.kv_router = Router(dim, kv_routing_tokens)
        self.heavy_attn = HeavyAttention(dim, dim_head, heads, use_null_kv)
        self._configure('ConditionalRoutedCrossAttention', dict(
            dim=dim, num_tokens_q=1, num_tokens_kv=1, dim_head=dim_head, heads=heads,
            router_straight_through=router_straight_through, router_type=router_type, router_kwargs=kwargs,
            kv_routing_tokens=kv_routing_tokens, route_block_size=route_block_size, use_null_kv=use_null_kv,
            use_null_q_tokens=use_null_q_tokens, masked_tokens_get_null_q=masked_tokens_get_null_q,
            multiply_keys_by_score=multiply_keys_by_score),
            'CrossAttentionCounts', ('x', 'context'))

    def forward(self, x, context, *, num_tokens_q=None, num_tokens_kv=None, mask=None, context_mask=None):
        return self._call((x, context), (mask, context_mask), chosen(num_tokens_q, self.num_tokens_q),
                          chosen(num_tokens_kv, self.num_tokens_kv))


class ConditionalRoutedTransformerBlock(CompiledModule):
    """x = conditional_attn(x) + x; x = conditional_ff(x) + x"""

    def __init__(self, dim, *, num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv, num_routed_kv=1, num_heavy_ff_tokens,
                 light_dim_head=64, light_heads=8, light_window_size=128, heavy_dim_head=64, heavy_heads=8, light_ff_mult=0.5,
                 heavy_ff_mult=4, router_straight_through=True, router_type='coor_descent', router_kwargs: dict = {},
                 multiply_keys_by_score=False, multiply_queries_by_score=False, use_triton=False, use_null_kv=False,
                 use_null_q_tokens=False, use_flash_attn=False, masked_rows='zero', attends_to_padding=False,
                 masked_tokens_get_null_q=False):
        super().__init__()
        routing = dict(router_straight_through=router_straight_through, router_type=router_type)
        heads = dict(light_dim_head=light_dim_head, light_heads=light_heads, light_window_size=light_window_size,
                     heavy_dim_head=heavy_dim_head, heavy_heads=heavy_heads)
        options = dict(masked_rows=masked_rows, attends_to_padding=attends_to_padding, use_null_kv=use_null_kv,
                       use_null_q_tokens=use_null_q_tokens, masked_tokens_get_null_q=masked_tokens_get_null_q,
                       multiply_keys_by_score=multiply_keys_by_score, multiply_queries_by_score=multiply_queries_by_score)
        self.conditional_ff = ConditionalRoutedFeedForward(
            dim, num_heavy_tokens=num_heavy_ff_tokens, light_ff_mult=light_ff_mult, heavy_ff_mult=heavy_ff_mult,
            router_kwargs=router_kwargs, **routing)
        self.conditional_attn = ConditionalRoutedAttention(
            dim, num_heavy_tokens_q=num_heavy_attn_tokens_q, num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            num_routed_kv=num_routed_kv, router_kwargs=router_kwargs, **heads, **routing, **options)
        self._configure('ConditionalRoutedTransformerBlock', dict(
            dim=dim, num_heavy_attn_tokens_q=1, num_heavy_attn_tokens_kv=1, num_routed_kv=num_routed_kv, num_heavy_ff_tokens=1,
            **heads, light_ff_mult=light_ff_mult, heavy_ff_mult=heavy_ff_mult, **routing,
            router_kwargs=cpp_router_kwargs(router_type, router_kwargs), **options),
            'TransformerBlockCounts')

    def forward(self, x, mask=None, num_heavy_attn_tokens_q=None, num_heavy_attn_tokens_kv=None, num_heavy_ff_tokens=None):
        attn, ff = self.conditional_attn, self.conditional_ff
        return self._call((x,), (mask,), chosen(num_heavy_attn_tokens_q, attn.num_heavy_tokens_q),
                          chosen(num_heavy_attn_tokens_kv, attn.num_heavy_tokens_kv),
                          chosen(num_heavy_ff_tokens, ff.num_heavy_tokens))
