# SPDX-License-Identifier: MIT
"""What goes wrong, as exceptions. Messages name the argument, what it must be, and what it is."""


class Error(RuntimeError):
    """Base of the exceptions of this package that are no ValueError."""


class ShapeError(ValueError):
    """A tensor has the wrong shape."""


class BuildError(Error):
    """A module could not be compiled: what is missing, or the end of what the compiler said."""


def shape_error(argument, expected, actual):
    """expected: extents, None where any will do"""
    expected = '(' + ', '.join('any' if extent is None else str(extent) for extent in expected) + ')'
    return ShapeError(f'colt5: `{argument}` must have shape {expected}, but has ({", ".join(map(str, actual))})')


def value_error(argument, condition, value):
    return ValueError(f'colt5: `{argument}` must be {condition}, but is {value}')
