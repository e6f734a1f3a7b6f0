# SPDX-License-Identifier: MIT
"""Our modules take the package's arguments: the same names, in the same order, with the same defaults. They may take more."""
import inspect

import colt5
import colt5.v0_11
import colt5_attention
import pytest
from colt5.modules import VERSION_0_11
from support import CONFIGS, version_0_11


def parameters_of(function):
    return {name: (p.kind, p.default) for name, p in inspect.signature(function).parameters.items()}


def arguments_of(kind):
    """Of the initialization, with those that **options hands to a base class. The defaults of the class itself hold."""
    arguments = {}
    for owner in kind.__mro__:
        if '__init__' in vars(owner):
            own = parameters_of(owner.__init__)
            arguments = {**own, **arguments}
            if not any(kind is inspect.Parameter.VAR_KEYWORD for kind, _ in own.values()):
                return arguments


def check(actual, expected):
    assert {name: actual.get(name) for name in expected} == expected
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    of = [[name for name, (kind, _) in given.items() if kind is positional] for given in (actual, expected)]
    assert of[0][:len(of[1])] == of[1]


@pytest.mark.parametrize('name', CONFIGS)
def test_signatures(name):
    actual, expected = getattr(colt5, name), getattr(colt5_attention, name)
    check(arguments_of(actual), parameters_of(expected.__init__))
    check(parameters_of(actual.forward), parameters_of(expected.forward))


@pytest.mark.parametrize('name', [name for name in colt5.v0_11.__all__ if name != 'topk'])
def test_signatures_of_version_0_11(name):
    actual, expected = getattr(colt5.v0_11, name), getattr(version_0_11(), name)
    check(arguments_of(actual), parameters_of(expected.__init__))
    check(parameters_of(actual.forward), parameters_of(expected.forward))


def test_signature_of_topk():
    check(parameters_of(colt5.v0_11.topk), parameters_of(version_0_11().topk))


def test_defaults_of_the_router_of_version_0_11():
    expected = parameters_of(version_0_11().CoordinateDescentRouter.__init__)
    for name in 'n_iters', 'eps', 'eps_init', 'eps_decay':  # the others of VERSION_0_11 are no arguments there
        assert VERSION_0_11[name] == expected[name][1], name
