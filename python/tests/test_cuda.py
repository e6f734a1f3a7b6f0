# SPDX-License-Identifier: MIT
"""On a GPU: the values of the host's double, streams, autocast."""
import pytest
import torch
from support import check_equal, mask_of, ours, run, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
NAME, LARGER = 'ConditionalRoutedFeedForward', dict(dim=64, num_heavy_tokens=64)  # all tokens: no choice depends on rounding


def on_host(results):
    return {name: None if value is None else value.cpu().double() for name, value in results.items()}


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_values_are_those_of_the_host(dtype, tolerance):
    module, x, mask = ours(NAME, **LARGER), tokens(2, 64, 64), mask_of(2, 64)
    expected = run(module, x, mask)
    actual = run(FromHost(ours(NAME, dtype, **LARGER).cuda()), x.to('cuda', dtype), mask)
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


def test_autocast():
    module, x = ours(NAME, torch.float32, **LARGER).cuda(), tokens(2, 64, 64, dtype=torch.float32).cuda().requires_grad_()
    with torch.autocast('cuda', torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in module.parameters())
    assert (out - module(x)).abs().max() < 0.05 * out.abs().max()
