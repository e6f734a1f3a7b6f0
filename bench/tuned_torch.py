# SPDX-License-Identifier: MIT
"""The modules of colt5-attention 0.2.3 as fast as we could make them in PyTorch: what to beat on a GPU.

FlexAttention with a block mask for the local window, SDPA for the heavy branch, everything through torch.compile,
routing beside the light branch on a stream of its own, nothing that a CUDA graph could not hold. Where we had a choice, the
fastest on an H200 stands here. Two ways to descend:

- `package`: the Triton kernel of colt5-attention 0.11, with as many checkpoints as is fastest and both attention
  routers in one launch;
- `threshold`: our own way in Triton. The descent's state is one number a row (see op/coordinate_descent.hpp), so that
  its backward pass is one kernel; and where straight-through makes every score 1, inference makes no descent.

Parameters have the names of the package's state_dict. All tokens are real: there is no mask.
"""
import contextlib
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from colt5_attention.triton_coor_descent import triton_coor_descent

HEADS, DIM_HEAD, REACH, CHOSEN = 8, 64, 64, 1024
EPS, FETCHED = 1., CHOSEN * 9 / 8  # of the descent
CHECKPOINTS = {50: 25, 20: 10}  # of the package's kernel for a backward pass, by the number of steps
LONGEST_ROW = 131072  # that one program of Triton can hold


@triton.jit
def descent_kernel(logits, thresholds, saturated, length, steps, log_k, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    s = tl.load(logits + row * length + columns, mask=columns < length, other=-float('inf'))
    threshold = 0.
    tl.store(thresholds + row * (steps + 1), threshold)
    for step in range(steps):
        tl.store(saturated + row * steps + step, tl.sum((s > threshold).to(tl.float32)))
        total = tl.sum(tl.exp(tl.minimum(s - threshold, 0.) / eps))
        threshold += eps * (tl.log(total) - log_k)
        tl.store(thresholds + row * (steps + 1) + step + 1, threshold)


@triton.jit
def descent_vjp_kernel(d_logits, logits, d_own, thresholds, saturated, d_total, length, steps, k, eps, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = columns < length
    s = tl.load(logits + row * length + columns, mask=real, other=-float('inf'))
    d = tl.load(d_own + row * length + columns, mask=real, other=0.)
    alpha = tl.load(d_total + row)
    threshold = tl.load(thresholds + row * (steps + 1) + steps)
    for back in range(steps):
        step = steps - 1 - back
        before = tl.load(thresholds + row * (steps + 1) + step)
        d -= tl.where(s <= before, alpha / k * tl.exp((tl.minimum(s, before) - threshold) / eps), 0.)
        alpha *= tl.load(saturated + row * steps + step) * tl.exp((before - threshold) / eps) / k
        threshold = before
    tl.store(d_logits + row * length + columns, d, mask=real)


@torch.compile
def descent_step(logits, threshold, log_k):
    total = torch.exp((logits - threshold).clamp(max=0) / EPS).sum(-1, keepdim=True)
    return threshold + EPS * (total.log() - log_k), (logits > threshold).sum(-1, keepdim=True, dtype=torch.float32)


class ThresholdDescent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, steps):
        rows, length = logits.shape
        log_k = math.log(FETCHED)
        if length <= LONGEST_ROW:
            thresholds = logits.new_empty(rows, steps + 1)
            saturated = logits.new_empty(rows, steps)
            descent_kernel[(rows,)](logits, thresholds, saturated, length, steps, log_k, EPS,
                                    BLOCK=triton.next_power_of_2(length), num_warps=32)
        else:
            thresholds, saturated = [logits.new_zeros(rows, 1)], []
            for _ in range(steps):
                threshold, above = descent_step(logits, thresholds[-1], log_k)
                thresholds.append(threshold)
                saturated.append(above)
            thresholds, saturated = torch.cat(thresholds, -1), torch.cat(saturated, -1)
        scores = ((logits - thresholds[:, -1:]).clamp(max=0) / EPS).exp()
        ctx.save_for_backward(logits, scores, thresholds, saturated)
        return scores

    @staticmethod
    def backward(ctx, d_scores):
        logits, scores, thresholds, saturated = ctx.saved_tensors
        rows, length = logits.shape
        d_own = torch.where(logits <= thresholds[:, -1:], d_scores * scores / EPS, 0.)
        d_logits = torch.empty_like(logits)
        block = 1024
        descent_vjp_kernel[(rows, triton.cdiv(length, block))](
            d_logits, logits, d_own, thresholds, saturated, d_own.sum(-1), length, saturated.shape[1], FETCHED, EPS, BLOCK=block)
        return d_logits, None


def coordinate_descent(logits, steps, k, eps):
    """The package's kernel; logits (rows, n), k (rows)"""
    return triton_coor_descent(logits, n_iters=steps, k=k, eps=eps,
                               checkpoint_segments=CHECKPOINTS[steps] if torch.is_grad_enabled() else 1)


class Selection:
    """Chooses tokens by their logits; scores are 1 with the gradient of the descent's (straight-through)."""

    def __init__(self):
        self.descent, self.steps = 'package', 50
        self.k = {}  # the package's kernel reads one number a row

    def scores(self, logits):
        """logits (rows, n)"""
        if self.descent == 'threshold':
            return ThresholdDescent.apply(logits, self.steps)
        rows = logits.shape[0]
        if rows not in self.k:
            self.k[rows] = logits.new_full((rows,), FETCHED)
        return coordinate_descent(logits, self.steps, self.k[rows], EPS)

    @torch.compiler.disable
    def __call__(self, logits):
        """logits (r, b, n)  →  scores and indices of the b · n tokens, both (r, b · k)"""
        routes, batch, length = logits.shape
        if self.descent == 'package':
            scores, indices = self.scores(logits.flatten(0, 1)).view_as(logits).topk(CHOSEN, sorted=False)
        else:
            indices = logits.topk(CHOSEN, sorted=False).indices
            if torch.is_grad_enabled():
                scores = self.scores(logits.flatten(0, 1)).view_as(logits).gather(-1, indices)
            else:
                scores = logits.new_ones(indices.shape)
        scores = scores + (1 - scores).detach()
        first = torch.arange(0, batch * length, length, device=logits.device)
        return scores.flatten(1), (indices + first[:, None]).flatten(1)


def route_logits(x, *routing_tokens):
    """x (b, n, d)  →  (r, b, n), in float: one pass over x"""
    x = x.float()
    return torch.stack([(x * token.float()).sum(-1) for token in routing_tokens])


def add_rows(x, rows, indices):
    """rows (b · k, d) added to those tokens of x (b, n, d)"""
    return x.flatten(0, 1).index_add(0, indices, rows.to(x.dtype)).view_as(x)


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, self.gamma.shape, self.gamma)


def feed_forward(dim, mult):
    return nn.Sequential(RMSNorm(dim), nn.Linear(dim, int(dim * mult)), nn.GELU(), nn.Linear(int(dim * mult), dim))


class Router(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.routing_token = nn.Parameter(torch.randn(1, dim))


def compiled(function, mode='default'):
    return torch.compile(function, mode=mode, dynamic=False)


def banded_attention(qkv, of_distance=None):
    """Local attention in blocks of REACH tokens, as products of blocks: what float trains fastest with, by three times, and what trains
    a bias of_distance (2 · REACH + 1, h): FlexAttention adds its gradient up by atomic additions, and autotuning that takes minutes."""
    batch, length, _, heads, dim_head = qkv.shape
    # With a block of zeros after each sequence and one before them all, neighbours are neighbours in one long row of blocks.
    q, k, v = (F.pad(x.reshape(-1, length, dim_head), (0, 0, 0, REACH)).view(-1, REACH, dim_head)
               for x in qkv.permute(2, 0, 3, 1, 4))
    k, v = (F.pad(x, (0, 0, 0, 0, 1, 1)) for x in (k, v))
    blocks = length // REACH + 1
    i = torch.arange(REACH, device=q.device)[:, None]
    j = torch.arange(-REACH, 2 * REACH, device=q.device)
    token = torch.arange(len(q), device=q.device)[:, None, None] % blocks * REACH + j
    visible = ((i - j).abs() <= REACH) & (token >= 0) & (token < length)
    scores = torch.cat([q @ k[near:near + len(q)].mT for near in range(3)], -1) * dim_head ** -0.5
    if of_distance is not None:
        bias = of_distance[(j - i).clamp(-REACH, REACH) + REACH].permute(2, 0, 1)[None, :, None]
        scores = (scores.unflatten(0, (batch, heads, blocks)) + bias).flatten(0, 2)
    weights = scores.masked_fill(~visible, -float('inf')).softmax(-1)
    out = sum(part @ v[near:near + len(q)] for near, part in enumerate(weights.split(REACH, -1)))
    return out.view(batch, heads, blocks * REACH, dim_head)[:, :, :length].transpose(1, 2)


class RelativePositionBias(nn.Module):
    """T5's, by the distance of key and query within a window"""

    def __init__(self, device):
        super().__init__()
        self.table = nn.Embedding(32, HEADS)
        distance = torch.arange(-REACH, REACH + 1, device=device)
        large = 8 + (torch.log(distance.abs().clamp(min=1) / 8) / math.log(128 / 8) * 8).long().clamp(max=7)
        self.bucket = torch.where(distance.abs() < 8, distance.abs(), large) + 16 * (distance > 0)

    def forward(self):
        return self.table(self.bucket)  # (2 · REACH + 1, h)


class LocalAttention:
    """qkv (b, n, 3, h, dim_head)  →  (b, n, h, dim_head). `banded` trains in float, or with a bias; it takes qkv and bias()."""

    def __init__(self, length, dtype, device, bias=None, reach=REACH, banded=banded_attention):
        # In bfloat16, blocks of 64 are faster by half, but the compiler knows no default for them.
        block, mode = (64, 'max-autotune-no-cudagraphs') if dtype == torch.bfloat16 else (128, 'default')
        # Compiled, the mask does not hold length² numbers.
        mask = create_block_mask(lambda b, h, q, k: (q - k).abs() <= reach, None, None, length, length, device=device,
                                 BLOCK_SIZE=block, _compile=device == 'cuda')

        def flex(qkv):
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            if bias is None:
                return flex_attention(q, k, v, block_mask=mask).transpose(1, 2)
            of_distance = bias()

            def add_bias(score, b, h, q, k):
                return score + of_distance[(k - q).clamp(-reach, reach) + reach, h]
            return flex_attention(q, k, v, score_mod=add_bias, block_mask=mask).transpose(1, 2)

        self.flex, self.banded, self.bias = compiled(flex, mode), compiled(lambda qkv: banded(qkv, bias() if bias else None)), bias

    def __call__(self, qkv):
        in_bands = torch.is_grad_enabled() and (qkv.dtype == torch.float32 or self.bias is not None)
        return self.banded(qkv) if in_bands else self.flex(qkv)


class Rotary:
    """Rotary embedding of queries and keys, qkv (b, n, 3, h, dim_head)."""

    def __init__(self, length, device):
        frequencies = 10000 ** -(torch.arange(0, DIM_HEAD, 2, device=device) / DIM_HEAD)
        angles = torch.arange(length, device=device)[:, None] * frequencies
        self.cos, self.sin = angles.cos()[:, None, None], angles.sin()[:, None, None]

    def __call__(self, qkv):
        (low, high), v = qkv[:, :, :2].float().chunk(2, -1), qkv[:, :, 2:]
        turned = torch.cat((low * self.cos - high * self.sin, high * self.cos + low * self.sin), -1)
        return torch.cat((turned.to(qkv.dtype), v), 2)


class LightAttention(nn.Module):
    def __init__(self, dim, attend, turn=None, relative_attention_bias=None):
        super().__init__()
        self.relative_attention_bias = relative_attention_bias  # of `attend`
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * HEADS * DIM_HEAD, bias=False)
        self.to_out = nn.Linear(HEADS * DIM_HEAD, dim, bias=False)
        self.attend = attend
        turn = turn or (lambda qkv: qkv)
        self.before = compiled(lambda x: turn(self.to_qkv(self.norm(x)).unflatten(-1, (3, HEADS, DIM_HEAD))))
        self.after = compiled(lambda attended: self.to_out(attended.flatten(2)))

    def forward(self, x):
        return self.after(self.attend(self.before(x)))


class HeavyAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        inner = HEADS * DIM_HEAD
        self.norm = RMSNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, context, scores):
        """x (b, q, d), context (b, k, d), scores (b, k)"""
        q = self.to_q(self.norm(x)).unflatten(-1, (HEADS, DIM_HEAD)).transpose(1, 2)
        k, v = self.to_kv(self.norm(context)).unflatten(-1, (HEADS, 2, DIM_HEAD)).permute(3, 0, 2, 1, 4)
        v = v * scores[:, None, :, None].to(v.dtype)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ConditionalAttention(nn.Module):
    def __init__(self, dim, attend):
        super().__init__()
        self.light_attn = LightAttention(dim, attend)
        self.q_router, self.kv_router = Router(dim), Router(dim)
        self.heavy_attn = HeavyAttention(dim)

    def logits(self, x):
        return route_logits(x, self.q_router.routing_token[0], self.kv_router.routing_token[0])

    def heavy(self, x, scores, indices):
        batch, length, dim = x.shape
        q, kv = (x.flatten(0, 1)[index].view(batch, -1, dim) for index in indices)
        out = self.heavy_attn(q, kv, scores[1].view(batch, -1)).flatten(0, 1)
        return out * scores[0][:, None].to(out.dtype)


class ConditionalFeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.router = Router(dim)
        self.light_ff, self.heavy_ff = feed_forward(dim, 0.5), feed_forward(dim, 4)

    def logits(self, x):
        return route_logits(x, self.router.routing_token[0])

    def heavy(self, x, scores, indices):
        out = self.heavy_ff(x.flatten(0, 1)[indices[0]])
        return out * scores[0][:, None].to(out.dtype)


class Beside:
    """with beside: … runs on a second stream what needs nothing from what follows; join() waits for it."""

    def __init__(self):
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def __call__(self):
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def join(self):
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


class TunedFeedForward(nn.Module):
    """The routed feedforward, without a residual."""

    def __init__(self, dim, select):
        super().__init__()
        self.conditional_ff = ConditionalFeedForward(dim)
        self.select, self.beside = select, Beside()
        ff = self.conditional_ff
        self.logits, self.heavy, self.light = compiled(ff.logits), compiled(ff.heavy), compiled(ff.light_ff.forward)
        self.add_rows = compiled(add_rows)

    def forward(self, x):
        logits = self.logits(x)
        with self.beside():
            scores, indices = self.select(logits)
            heavy = self.heavy(x, scores, indices)
        light = self.light(x)
        self.beside.join()
        return self.add_rows(light, heavy, indices[0])


class TunedBlock(nn.Module):
    def __init__(self, dim, attend, select):
        super().__init__()
        self.conditional_attn = ConditionalAttention(dim, attend)
        self.conditional_ff = ConditionalFeedForward(dim)
        self.select, self.beside = select, Beside()
        attn, ff = self.conditional_attn, self.conditional_ff
        self.attn_logits, self.heavy_attn = compiled(attn.logits), compiled(attn.heavy)
        self.heavy_ff, self.light_ff = compiled(ff.heavy), compiled(ff.light_ff.forward)
        self.add = compiled(lambda x, light, heavy, indices: add_rows(x + light, heavy, indices[0]))
        self.ff_logits = compiled(ff.logits)

    def forward(self, x):
        logits = self.attn_logits(x)
        with self.beside():
            scores, indices = self.select(logits)
            heavy = self.heavy_attn(x, scores, indices)
        light = self.conditional_attn.light_attn(x)
        self.beside.join()
        x = self.add(x, light, heavy, indices)
        logits = self.ff_logits(x)
        with self.beside():
            scores, indices = self.select(logits)
            heavy = self.heavy_ff(x, scores, indices)
        light = self.light_ff(x)
        self.beside.join()
        return self.add(x, light, heavy, indices)


class TunedCrossAttention(nn.Module):
    """Cross attention whose queries are not routed; keys and values come from the context."""

    def __init__(self, dim, select):
        super().__init__()
        self.q_router, self.kv_router = Router(dim), Router(dim)
        self.heavy_attn = HeavyAttention(dim)
        self.select = select
        self.logits = compiled(lambda context: route_logits(context, self.kv_router.routing_token[0]))
        self.attend = compiled(self.heavy_attn.forward)

    def forward(self, x, context):
        batch, _, dim = context.shape
        scores, indices = self.select(self.logits(context))
        picked = context.flatten(0, 1)[indices[0]].view(batch, -1, dim)
        return self.attend(x, picked, scores[0].view(batch, -1))
