# SPDX-License-Identifier: MIT
"""On a GPU: the values of the host's double, streams, CUDA graphs, autocast."""
import pytest
import torch
from support import check_equal, mask_of, ours, run, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
NAME, LARGER = 'ConditionalRoutedFeedForward', dict(dim=64, num_heavy_tokens=64)


def on_host(results):
    return {name: None if value is None else value.cpu().double() for name, value in results.items()}


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_values_are_those_of_the_host(dtype, tolerance):
    """Of the rounded numbers: which scores the descent cuts off at 1, and so have no gradient, depends on rounding."""
    x, mask = tokens(2, 64, 64).to(dtype), mask_of(2, 64)
    expected = run(ours(NAME, dtype, **LARGER).double(), x.double(), mask)
    actual = run(FromHost(ours(NAME, dtype, **LARGER).cuda()), x.cuda(), mask)
    check_equal(on_host(actual), expected, tolerance, tolerance)


class FromHost:
    """A module whose cotangent comes from the host: see support.run."""

    def __init__(self, module):
        self.module, self.zero_grad, self.named_parameters = module, module.zero_grad, module.named_parameters

    def __call__(self, x, mask=None):
        return Cross.apply(self.module(x, mask=mask.cuda()))


class Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        ctx.dtype = out.dtype
        return out.cpu().double()

    @staticmethod
    def backward(ctx, d_out):
        return d_out.to('cuda', ctx.dtype)


def test_the_current_stream():
    module, x = ours(NAME, torch.float32, **LARGER).cuda(), tokens(2, 64, 64, dtype=torch.float32).cuda()
    expected = module(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = x * 0
        torch.cuda._sleep(100_000_000)  # what comes before the call on the stream is not done yet
        late.add_(x)
        out = module(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


def in_graph(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_cuda_graphs():
    """Calls of the same module beside and between replays, and of other graphs, change nothing."""
    module = ours(NAME, torch.float32, **LARGER).cuda()
    x, d_out = (tokens(2, 64, 64, dtype=torch.float32, seed=seed).cuda() for seed in (2, 4))
    x.requires_grad_()
    wanted = [x, *module.parameters()]

    def step():
        out = module(x)
        return [out.detach(), *torch.autograd.grad(out, wanted, d_out)]

    def infer():
        with torch.no_grad():
            return module(x)

    training, of_step = in_graph(step)  # the first call of all
    inference, of_inference = in_graph(infer)
    for seed in range(5, 8):
        x.data.copy_(tokens(2, 64, 64, dtype=torch.float32, seed=seed))
        module(torch.randn(3, 40, 64, device='cuda'))
        training.replay()
        inference.replay()
        expected = step()
        assert all(torch.equal(a, b) for a, b in zip(of_step, expected))
        assert torch.equal(of_inference, expected[0])
    del training, inference
    again, of_again = in_graph(step)  # in the memory of the first two
    again.replay()
    assert all(torch.equal(a, b) for a, b in zip(of_again, expected))


def test_autocast():
    module, x = ours(NAME, torch.float32, **LARGER).cuda(), tokens(2, 64, 64, dtype=torch.float32).cuda().requires_grad_()
    with torch.autocast('cuda', torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in module.parameters())
    assert (out - module(x)).abs().max() < 0.05 * out.abs().max()
