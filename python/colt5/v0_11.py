# SPDX-License-Identifier: MIT
"""The modules with the defaults of colt5-attention 0.11: its router, a null key and value, and null query tokens."""
from . import modules
from .modules import VERSION_0_11, ConditionalRoutedAutoregressiveAttention, ConditionalRoutedImageAttention
from .topk import topk
from .vit import ConditionalRoutedViT

__all__ = ['ConditionalRoutedFeedForward', 'ConditionalRoutedAttention', 'ConditionalRoutedImageAttention',
           'ConditionalRoutedAutoregressiveAttention', 'ConditionalRoutedCrossAttention', 'ConditionalRoutedTransformerBlock',
           'ConditionalRoutedViT', 'topk']


class ConditionalRoutedFeedForward(modules.ConditionalRoutedFeedForward):
    def __init__(self, dim, *, router_kwargs: dict = {}, **options):
        super().__init__(dim, router_kwargs={**VERSION_0_11, **router_kwargs}, **options)


class WithNullTokens:
    def __init__(self, dim, *, router_kwargs: dict = {}, use_null_kv=True, use_null_q_tokens=True, **options):
        super().__init__(dim, router_kwargs={**VERSION_0_11, **router_kwargs}, use_null_kv=use_null_kv,
                         use_null_q_tokens=use_null_q_tokens, **options)


class ConditionalRoutedAttention(WithNullTokens, modules.ConditionalRoutedAttention):
    pass


class ConditionalRoutedCrossAttention(WithNullTokens, modules.ConditionalRoutedCrossAttention):
    pass


class ConditionalRoutedTransformerBlock(WithNullTokens, modules.ConditionalRoutedTransformerBlock):
    pass
