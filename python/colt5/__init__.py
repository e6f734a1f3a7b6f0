# SPDX-License-Identifier: MIT
"""Conditionally routed attention and feedforward (CoLT5) as PyTorch modules: those of colt5-attention, in C++."""
from .errors import BuildError, Error, ShapeError
from .library import release_memory
from .modules import (ConditionalRoutedAttention, ConditionalRoutedCrossAttention, ConditionalRoutedFeedForward,
                      ConditionalRoutedImageAttention, ConditionalRoutedTransformerBlock)

__all__ = ['ConditionalRoutedFeedForward', 'ConditionalRoutedAttention', 'ConditionalRoutedCrossAttention',
           'ConditionalRoutedImageAttention', 'ConditionalRoutedTransformerBlock', 'BuildError', 'Error', 'ShapeError',
           'release_memory']
