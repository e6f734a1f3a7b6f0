# SPDX-License-Identifier: MIT
"""Conditionally routed attention and feedforward (CoLT5) as PyTorch modules: those of colt5-attention, in C++."""
from .errors import BuildError, Error, ShapeError
from .modules import ConditionalRoutedFeedForward

__all__ = ['ConditionalRoutedFeedForward', 'BuildError', 'Error', 'ShapeError']
