# SPDX-License-Identifier: MIT
"""The modules of colt5-attention under its names, with its arguments, defaults, parameters and initialization."""
import functools

import torch
from torch import nn

from . import ops
from .errors import value_error
from .library import Spec, library_of

# Fields of the C++ structs, in the order in which they are declared there; those of router_kwargs for each router type.
ROUTER_KWARGS = {
    'coor_descent': ('n_iters', 'fetch_k_ratio', 'eps', 'eps_init', 'eps_decay', 'start', 'score_scale', 'iterate_to_convergence',
                     'cosine_sim_routing', 'cosine_sim_scale', 'short_rows_score_one'),
    'cum_softmax': ('temperature', 'cosine_sim_routing', 'cosine_sim_scale', 'short_rows_score_one'),
    'sinkhorn': ('n_iters', 'temperature', 'masked_tokens_take_part', 'cosine_sim_routing', 'cosine_sim_scale'),
}
ENUMS = {'start': 'DescentStart', 'masked_rows': 'MaskedRows', 'router_type': 'RouterType'}


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
    """Where a module's parameters are, for each order in which calls take them. Not part of a copy of the module."""

    def __reduce__(self):
        return Slots, ()


class CompiledModule(nn.Module):
    """A module whose forward and backward pass are C++, compiled when it is first called, for each scalar type and kind of
    device. Forward hooks of the modules in it do not run: those only hold parameters."""

    _names = ('x',)

    def _configure(self, module, config, counts, router_type, **num_tokens):
        """config: fields of the C++ struct"""
        name = module.removeprefix('ConditionalRouted') + 'Config'
        text = cpp_struct(name, [(key, value) for key, value in config.items() if value is not None])
        self._spec = Spec(module, text, counts, len(self._names), router_type == 'sinkhorn')
        self._counts = num_tokens
        self._slots = Slots()

    def _call(self, inputs, masks, **counts):
        """counts: None: as the module was made with"""
        x = inputs[0]
        dtype = x.dtype
        if x.is_cuda and torch.is_autocast_enabled('cuda'):
            dtype = torch.get_autocast_dtype('cuda')
            inputs = [t.to(dtype) for t in inputs]
        library = library_of(self._spec.key, dtype, x.device)
        library.expect_inputs(self._names, inputs, masks)
        parameters = self._parameters_of(library)
        if dtype != parameters[0].dtype and dtype != x.dtype:
            parameters = [p.to(dtype) for p in parameters]
        library.expect_parameters(parameters)
        numbers = [self._count(name, value) for name, value in counts.items()]
        noise = None
        if self._spec.draws_noise and self.training:
            noise = torch.randint(2 ** 62, ())
        return ops.call(self._spec, inputs, masks, numbers, parameters, noise)

    def _count(self, name, value):
        return self._counts[name] if value is None else value

    def _parameters_of(self, library):
        """In the order of library.names."""
        slots = self._slots.get('slots')
        if slots is None:
            slots = self._slots['slots'] = [self._slot(name) for name in library.names]
        try:
            return [owner[name] for owner, name in slots]
        except KeyError:  # a parametrization, for instance, keeps them elsewhere
            return [getattr(self.get_submodule(path), leaf) for path, _, leaf in (n.rpartition('.') for n in library.names)]

    def _slot(self, name):
        path, _, leaf = name.rpartition('.')
        return self.get_submodule(path)._parameters, leaf

    def extra_repr(self):
        return ', '.join(f'{name}={value}' for name, value in self._counts.items())


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
            'FeedForwardTokens', router_type, num_heavy_tokens=num_heavy_tokens)

    def forward(self, x, mask=None, num_heavy_tokens=None):
        return self._call((x,), (mask,), num_heavy_tokens=num_heavy_tokens)
