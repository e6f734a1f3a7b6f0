# SPDX-License-Identifier: MIT
"""Conditionally routed attention and feedforward (CoLT5) as PyTorch modules: those of colt5-attention, in C++."""
from .errors import BuildError, Error, ShapeError
from .library import release_memory
from .modules import (ConditionalRoutedAttention, ConditionalRoutedAutoregressiveAttention, ConditionalRoutedCrossAttention,
                      ConditionalRoutedFeedForward, ConditionalRoutedImageAttention, ConditionalRoutedTransformerBlock)
from .topk import topk
from .vit import ConditionalRoutedViT

__all__ = ['ConditionalRoutedFeedForward', 'ConditionalRoutedAttention', 'ConditionalRoutedCrossAttention',
           'ConditionalRoutedAutoregressiveAttention', 'ConditionalRoutedImageAttention', 'ConditionalRoutedTransformerBlock',
           'ConditionalRoutedViT', 'BuildError', 'Error', 'ShapeError', 'release_memory',
           'topk']
