# SPDX-License-Identifier: MIT
"""Tensors of NumPy and PyTorch go through from_dlpack and to_dlpack of C++ and back, without a copy."""
import ctypes
import functools
import gc
import weakref

import numpy
import pytest
import torch
from colt5 import build

SOURCE = '''
#include <colt5/colt5.hpp>
#include <colt5/io/dlpack.hpp>
namespace colt5_python {
using Policy = colt5::Cpu;
}
#include "call.hpp"

namespace {

using namespace colt5;

template <typename Element, typename Managed>
Managed* there_and_back(void* from) {
    const Cpu policy(1);
    const auto view = from_dlpack<TokensView<Element>>(policy, static_cast<Managed*>(from));
    if constexpr (!std::is_const_v<Element>) scale(policy, view, 2.0);
    return to_dlpack<Managed>(policy, view, std::make_shared<DLPackView<TokensView<Element>, Cpu>>(view));
}

}  // namespace

/// What is exported, as an address.
COLT5_EXPORT std::int64_t there_and_back(void* from, int versioned, int writable) {
    return colt5_python::guarded([&] {
        void* managed;
        if (!versioned)
            managed = there_and_back<float, dlpack::DLManagedTensor>(from);
        else if (writable)
            managed = there_and_back<float, dlpack::DLManagedTensorVersioned>(from);
        else
            managed = there_and_back<const float, dlpack::DLManagedTensorVersioned>(from);
        return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(managed));
    });
}
'''
NAMES = b'dltensor', b'dltensor_versioned'
USED = b'used_dltensor', b'used_dltensor_versioned'  # capsules do not copy their names

python = ctypes.pythonapi
python.PyCapsule_GetPointer.restype = ctypes.c_void_p
python.PyCapsule_GetPointer.argtypes = ctypes.py_object, ctypes.c_char_p
python.PyCapsule_SetName.argtypes = ctypes.py_object, ctypes.c_char_p
python.PyCapsule_New.restype = ctypes.py_object
python.PyCapsule_New.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p


@functools.lru_cache(maxsize=None)
def library():
    loaded = build.load(SOURCE, ['float'], 'a test of DLPack')
    loaded.there_and_back.argtypes, loaded.there_and_back.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int], ctypes.c_int64
    loaded.colt5_message.restype = ctypes.c_char_p
    return loaded


class Exported:
    """What from_dlpack of NumPy and PyTorch asks for."""

    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **_):
        return self.capsule

    def __dlpack_device__(self):
        return 1, 0


@functools.lru_cache(maxsize=None)
def have_versions():
    """Of NumPy and PyTorch, the older one may not know the struct with a version."""
    try:
        return all(x.__dlpack__(max_version=(1, 0)) is not None for x in (numpy.zeros(1), torch.zeros(1)))
    except TypeError:
        return False


def capsule_of(x, versioned):
    if versioned and not have_versions():
        pytest.skip('NumPy or PyTorch has no versioned DLPack')
    return x.__dlpack__(max_version=(1, 0)) if versioned else x.__dlpack__()


def there_and_back(x, versioned, writable=True):
    capsule = capsule_of(x, versioned)
    result = library().there_and_back(python.PyCapsule_GetPointer(capsule, NAMES[versioned]), versioned, writable)
    if result < 0:  # the tensor is still the capsule's
        raise ValueError(library().colt5_message().decode())
    python.PyCapsule_SetName(capsule, USED[versioned])
    return Exported(python.PyCapsule_New(result, NAMES[versioned], None))


def numpy_array():
    return numpy.arange(24, dtype=numpy.float32).reshape(2, 3, 4)


def address_of(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x.__array_interface__['data'][0]


@pytest.mark.parametrize('versioned', [False, True])
@pytest.mark.parametrize('back', [numpy.from_dlpack, torch.from_dlpack])
@pytest.mark.parametrize('there', [numpy_array, lambda: torch.arange(24.).view(2, 3, 4)], ids=['numpy', 'torch'])
def test_no_copy_there_and_back(there, back, versioned):
    x = there()
    y = back(there_and_back(x, versioned))
    assert address_of(y) == address_of(x) and tuple(y.shape) == (2, 3, 4)
    for t in x, y:
        assert (numpy.asarray(t) == 2 * numpy_array()).all()


def test_the_owner_lives_as_long_as_what_is_exported():
    x = numpy_array()
    of_x, y = weakref.ref(x), torch.from_dlpack(there_and_back(x, True))
    del x
    gc.collect()
    assert of_x() is not None and (y.numpy() == 2 * numpy_array()).all()
    del y
    gc.collect()
    assert of_x() is None


def test_arrays_that_are_read_only():
    x = numpy_array()
    x.flags.writeable = False
    with pytest.raises(ValueError, match='writable, or imported as a view of const elements'):
        there_and_back(x, True)
    y = numpy.from_dlpack(there_and_back(x, True, writable=False))
    assert address_of(y) == address_of(x) and not y.flags.writeable and (y == numpy_array()).all()


@pytest.mark.parametrize('x, message', [
    (numpy.zeros((2, 3, 4)), 'of type code 2, 32 bits'),
    (numpy.zeros((2, 3), numpy.float32), 'has 2 dimensions'),
    (numpy_array().transpose(0, 2, 1), 'contiguous and row-major'),
    (torch.zeros(2, 3, 4, dtype=torch.bfloat16), 'of type code 2, 32 bits'),
])
def test_tensors_that_do_not_fit(x, message):
    with pytest.raises(ValueError, match=message):
        there_and_back(x, False)
