# SPDX-License-Identifier: MIT
"""The modules are ordinary ones: gradcheck, the compiler, copies, devices, processes, hooks of saved tensors."""
import concurrent.futures
import copy
import gc
import io
import pathlib
import pickle
import sysconfig

import colt5
import pytest
import torch
import torch.multiprocessing
from support import check_equal, mask_of, ours, run, tokens, unsaturated
from torch.utils.checkpoint import checkpoint

SOFT = dict(router_straight_through=False)


@pytest.mark.parametrize('with_mask', [False, True])
def test_gradcheck_of_the_block(with_mask):
    module = unsaturated(ours('ConditionalRoutedTransformerBlock', **SOFT))
    mask = mask_of(2, 24) if with_mask else None

    def f(x, *parameters):
        named = dict(zip(dict(module.named_parameters()), parameters))
        out = torch.func.functional_call(module, named, (x,), dict(mask=mask))
        return out if mask is None else out.masked_fill(~mask[..., None], 0)

    inputs = (tokens(2, 24, 32).requires_grad_(), *[p.detach().clone().requires_grad_() for p in module.parameters()])
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


def test_gradcheck_of_cross_attention():
    module = unsaturated(ours('ConditionalRoutedCrossAttention', kv_routing_tokens=2, **SOFT))
    inputs = tokens(2, 12, 32).requires_grad_(), tokens(2, 15, 32, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, context: module(x, context, context_mask=mask_of(2, 15)), inputs,
                                    fast_mode=True)


def test_backward_twice():
    module, x = ours('ConditionalRoutedFeedForward'), tokens(2, 20, 32).requires_grad_()
    out = module(x)
    first, = torch.autograd.grad(out.sum(), x, retain_graph=True)
    second, = torch.autograd.grad(out.sum(), x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match='second time'):
        torch.autograd.grad(out.sum(), x)
    out = module(x)
    with torch.no_grad():
        module.heavy_ff[1].weight += 1
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()
    x, out = x.detach().requires_grad_(), module(x)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient, = torch.autograd.grad(out.square().sum(), module.heavy_ff[1].weight, create_graph=True)
        gradient.sum().backward()


def test_only_what_is_asked_for_has_a_gradient():
    module = ours('ConditionalRoutedFeedForward')
    module.light_ff.requires_grad_(False)
    x = tokens(2, 20, 32)
    module(x).sum().backward()
    assert x.grad is None and module.light_ff[1].weight.grad is None
    assert module.heavy_ff[1].weight.grad is not None
    module.requires_grad_(False)
    assert not module(x).requires_grad
    assert module(x.requires_grad_()).requires_grad


def test_tensors_that_are_not_contiguous():
    module, x, mask = ours('ConditionalRoutedFeedForward'), tokens(2, 20, 32), mask_of(2, 20)
    expected = run(module, x, mask)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    actual = run(module, turned, mask.t().contiguous().t())
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    out = module(x.requires_grad_())
    out.sum().backward()  # whose gradient is an expanded tensor
    out.detach().relu_()


def test_memory_is_that_of_the_tensors():
    module, x = ours('ConditionalRoutedFeedForward'), tokens(2, 20, 32)
    with torch.no_grad():
        before = module(x)
        module.heavy_ff[3].bias.add_(1)
        after = module(x)
    assert not torch.equal(before, after)
    module(x.requires_grad_()).sum().backward()
    storage = module.router.routing_token.grad.untyped_storage().data_ptr()
    assert all(p.grad.untyped_storage().data_ptr() == storage for p in module.parameters())


def test_copies_and_files():
    module, x = ours('ConditionalRoutedFeedForward'), tokens(2, 20, 32)
    expected = module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = ours('ConditionalRoutedFeedForward').requires_grad_(False)
    loaded.heavy_ff[1].weight.zero_()
    loaded.load_state_dict(torch.load(file))
    replica = module._replicate_for_data_parallel()  # shallow; its parameters are attributes
    assert replica._slots is module._slots
    for name, part in module.named_children():
        setattr(replica, name, copy.deepcopy(part))
    for other in copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, replica:
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.heavy_ff[3].bias.add_(1)
        assert not torch.equal(other(x), expected)
    assert torch.equal(module(x), expected)


def test_conversion_and_parametrization():
    module, x = ours('ConditionalRoutedFeedForward'), tokens(2, 20, 32)
    expected = module(x)
    assert (module.float()(x.float()) - expected).abs().max() < 1e-5
    assert (module.double()(x) - expected).abs().max() < 1e-5  # the parameters were rounded
    before = module(x)
    torch.nn.utils.parametrizations.weight_norm(module.heavy_ff[1])
    assert (module(x) - before).abs().max() < 1e-12
    module(x).sum().backward()
    assert module.heavy_ff[1].parametrizations.weight.original0.grad is not None


def test_autocast_of_the_host_computes_in_the_type_of_the_parameters():
    module, x = ours('ConditionalRoutedFeedForward', torch.float32), tokens(2, 20, 32, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(module(x), module(x))
        assert module(x.bfloat16()).dtype == torch.float32
        assert torch.equal(module(x.bfloat16()), module(x.bfloat16().float()))


def test_checkpoints_and_saved_tensor_hooks():
    module, x = ours('ConditionalRoutedFeedForward'), tokens(2, 20, 32)
    expected = run(module, x)
    for reentrant in False, True:
        actual = run(lambda_module(module, lambda x, **_: checkpoint(module, x, use_reentrant=reentrant)), x)
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or (t if t.dtype == torch.uint8 else t.clone()),
                                                  lambda t: t):
        actual = run(module, x)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t), pytest.raises(ValueError, match='a copy of it'):
        run(module, x)


class lambda_module:
    def __init__(self, module, function):
        self.zero_grad, self.named_parameters, self.function = module.zero_grad, module.named_parameters, function

    def __call__(self, *arguments, **named):
        return self.function(*arguments, **named)


def test_the_compiler():
    module, x, mask = unsaturated(ours('ConditionalRoutedFeedForward')), tokens(2, 20, 32), mask_of(2, 20)
    expected = run(module, x, mask)
    torch.compiler.reset()
    actual = run(torch.compile(module, fullgraph=True, backend='aot_eager'), x, mask)
    actual = {key.removeprefix('_orig_mod.'): value for key, value in actual.items()}
    assert all(torch.equal(actual[key], expected[key]) for key in expected)

    def inside(x, mask):  # what the operator reads is computed, and perhaps computed again
        return module((x * 2).relu(), mask=mask).square()

    compiled, x = torch.compile(inside, fullgraph=True, backend='aot_eager_decomp_partition'), x.requires_grad_()
    for mask in mask, None:
        expected, = torch.autograd.grad(inside(x, mask).sum(), x)
        actual, = torch.autograd.grad(compiled(x, mask).sum(), x)
        assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_the_default_backend_of_the_compiler():
    if not any(pathlib.Path(sysconfig.get_path(path), 'Python.h').exists() for path in ('include', 'platinclude')):
        pytest.skip('inductor needs the header files of Python')
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        get_cpp_compiler()
    except Exception as error:  # whose kind depends on the version
        pytest.skip(f'inductor finds no C++ compiler: {error}')
    module, x, mask = unsaturated(ours('ConditionalRoutedFeedForward', **SOFT)), tokens(2, 20, 32), mask_of(2, 20)

    def around(x, mask):  # what inductor compiles itself
        return module(x, mask=mask).square()

    torch.compiler.reset()
    wrapped = [lambda_module(module, function) for function in (around, torch.compile(around, fullgraph=True))]
    expected, actual = (run(each, x, mask) for each in wrapped)
    check_equal(actual, expected, 1e-12, 1e-12)


def test_the_operator():
    module, x = unsaturated(ours('ConditionalRoutedFeedForward', **SOFT)), tokens(2, 20, 32).requires_grad_()
    for mask in mask_of(2, 20), None:
        torch.library.opcheck(torch.ops.colt5.forward, ([x], mask, None, list(module.parameters()), module._key, [5], None, False,
                                                       True))
    torch.library.opcheck(torch.ops.colt5.forward, ([x.detach()], None, None, [p.detach() for p in module.parameters()],
                                                   module._key, [5], None, False, False))


def test_the_compiler_on_noise_and_two_inputs():
    module, x = ours('ConditionalRoutedFeedForward', router_type='sinkhorn'), tokens(2, 40, 32).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    assert not torch.equal(compiled(x), compiled(x))
    compiled(x).sum().backward()
    assert x.grad.isfinite().all()
    module.eval()
    assert torch.equal(compiled(x), module(x))
    module = unsaturated(ours('ConditionalRoutedCrossAttention', kv_routing_tokens=2, **SOFT))
    context, mask = tokens(2, 15, 32, seed=5).requires_grad_(), mask_of(2, 15)
    expected = torch.autograd.grad(module(x, context, context_mask=mask).sum(), [x, context])
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    actual = torch.autograd.grad(compiled(x, context, context_mask=mask).sum(), [x, context])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_graphs_that_nobody_runs_backward_are_freed():
    module, x = ours('ConditionalRoutedFeedForward'), tokens(4, 4000, 32).requires_grad_()

    def resident():
        gc.collect()
        with open('/proc/self/statm') as file:
            return int(file.read().split()[1]) * 4096

    for _ in range(3):
        module(x)
    before = resident()
    for _ in range(30):
        module(x)
    assert resident() - before < 20 << 20  # what one keeps: 4 MB for the output alone


def test_memory_is_handed_back():
    module, x = ours('ConditionalRoutedFeedForward'), tokens(8, 8000, 32)
    with torch.no_grad():
        module(x)

    def resident():
        with open('/proc/self/statm') as file:
            return int(file.read().split()[1]) * 4096

    out = module(x.requires_grad_())
    out.sum().backward()
    out, before = None, resident()
    colt5.release_memory()
    assert resident() < before - (1 << 20)
    module(x)


def test_sinkhorn_noise_comes_from_torch():
    module, x = ours('ConditionalRoutedFeedForward', router_type='sinkhorn'), tokens(2, 40, 32)
    torch.manual_seed(7)
    first, second = module(x), module(x)
    torch.manual_seed(7)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(module(x), module(x))
    assert torch.equal(module(x.requires_grad_()), module(x.detach()))
    module(x).sum().backward()
    assert module.router.routing_token.grad.isfinite().all()


def test_threads_that_call_at_the_same_time():
    module = ours('ConditionalRoutedFeedForward')

    def work(seed):
        x = tokens(2, 40, 32, seed=seed).requires_grad_()
        return torch.autograd.grad(module(x).square().sum(), x)[0]

    expected = [work(seed) for seed in range(40)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for actual, wanted in zip(threads.map(work, range(40)), expected):
            assert torch.equal(actual, wanted)


def train_in_parallel(rank, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    module = unsaturated(ours('ConditionalRoutedFeedForward'))
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    x = tokens(2, 20, 32)
    parallel(x[rank:rank + 1]).square().mean().backward()
    queue.put((rank, {name: p.grad.numpy() for name, p in module.named_parameters()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one():
    module, x = unsaturated(ours('ConditionalRoutedFeedForward')), tokens(2, 20, 32)
    module(x).square().mean().backward()
    import socket
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context('spawn')
    queue = context.SimpleQueue()
    processes = [context.Process(target=train_in_parallel, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for name, p in module.named_parameters():
        for rank in range(2):
            assert (torch.from_numpy(results[rank][name]) - p.grad).abs().max() <= 1e-12, name
