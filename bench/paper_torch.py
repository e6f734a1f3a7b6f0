# SPDX-License-Identifier: MIT
"""The paper's block in PyTorch, as config::colt5_base computes it: on the CPU eager, on the GPU with what tuned_torch.py gives it.

Parameters have our names.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

REACH, DIM_HEAD, BUCKETS, FARTHEST = 127, 64, 32, 128
LIGHT_HEADS, HEAVY_HEADS = 4, 8
BLOCK = 128
ITERATIONS, EPS, FETCH_RATIO = 50, 1., 9 / 8


def bucket_of(distance):
    """T5's bucket of key − query"""
    half = BUCKETS // 2
    exact, size = half // 2, distance.abs()
    large = exact + (torch.log(size.clamp(min=1) / exact) / math.log(FARTHEST / exact) * (half - exact)).long().clamp(max=half - exact - 1)
    return torch.where(size < exact, size, large) + half * (distance > 0)


def entries(table, buckets):
    """table[buckets]; on a GPU a product, since the gradient of what is indexed adds millions of numbers to few by atomic additions."""
    if not table.is_cuda:
        return table[buckets]
    return (buckets[..., None] == torch.arange(len(table), device=table.device)).to(table.dtype) @ table


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, self.gamma.shape, self.gamma)


class Bias(nn.Module):
    def __init__(self, heads, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(BUCKETS, heads) * dim ** -0.5)

    def within_reach(self):
        """By distance: (2 · REACH + 1, h)"""
        return self.weight[bucket_of(torch.arange(-REACH, REACH + 1, device=self.weight.device))]


def banded_attention(qkv, table):
    """qkv (b, n, 3, h, dim_head)  →  (b, n, h, dim_head): products of blocks of queries with three blocks of keys"""
    batch, length, _, heads, dim_head = qkv.shape
    blocks = -(-length // BLOCK)
    rows = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, blocks * BLOCK - length)).permute(2, 0, 3, 1, 4)  # (3, b, h, n, dim_head)
    q, k, v = rows.unflatten(3, (blocks, BLOCK))
    k, v = (F.pad(x, (0, 0, 0, 0, 1, 1)) for x in (k, v))
    i = torch.arange(BLOCK, device=q.device)[:, None]
    j = torch.arange(-BLOCK, 2 * BLOCK, device=q.device)
    token = torch.arange(blocks, device=q.device)[:, None, None] * BLOCK + j
    visible = ((i - j).abs() <= REACH) & (token >= 0) & (token < length)  # (blocks, BLOCK, 3 · BLOCK)
    bias = entries(table, bucket_of(j - i)).permute(2, 0, 1)[:, None]
    scores = torch.cat([q @ k[:, :, near:near + blocks].mT for near in range(3)], -1) * dim_head ** -0.5 + bias
    weights = scores.masked_fill(~visible, -float('inf')).softmax(-1)
    out = sum(part @ v[:, :, near:near + blocks] for near, part in enumerate(weights.split(BLOCK, -1)))
    return out.flatten(2, 3)[:, :, :length].transpose(1, 2)


class LightAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * LIGHT_HEADS * DIM_HEAD, bias=False)
        self.to_out = nn.Linear(LIGHT_HEADS * DIM_HEAD, dim, bias=False)
        self.relative_attention_bias = Bias(LIGHT_HEADS, dim)

    def project(self, x):
        return self.to_qkv(self.norm(x)).unflatten(-1, (3, LIGHT_HEADS, DIM_HEAD))


class HeavyAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        inner = HEAVY_HEADS * DIM_HEAD
        self.norm = RMSNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.relative_attention_bias = Bias(HEAVY_HEADS, dim)

    def forward(self, x, indices_q, indices_kv, scores_kv):
        """x (b, n, d), indices and scores (b, k)  →  (b, q, d)"""
        queries, context = rows_of(x, indices_q), rows_of(x, indices_kv)
        q = self.to_q(self.norm(queries)).unflatten(-1, (HEAVY_HEADS, DIM_HEAD)).transpose(1, 2)
        context = self.norm(context) * scores_kv[..., None].to(x.dtype)  # the scores multiply the normed inputs
        k, v = self.to_kv(context).unflatten(-1, (HEAVY_HEADS, 2, DIM_HEAD)).permute(3, 0, 2, 1, 4)
        bias = entries(self.relative_attention_bias.weight, bucket_of(indices_kv[:, None] - indices_q[..., None])).permute(0, 3, 1, 2)
        return self.to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.wi_0, self.wi_1 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        x = self.norm(x)
        return self.wo(F.gelu(self.wi_0(x), approximate='tanh') * self.wi_1(x))


class Router(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.routing_token = nn.Parameter(torch.randn(1, dim))


def rows_of(x, indices):
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


class PaperBlock(nn.Module):
    """`descent(logits (b, n), k)` gives scores; `compiled` compiles the pieces."""

    def __init__(self, dim, descent, compiled=lambda function: function):
        super().__init__()
        self.conditional_attn, self.conditional_ff = nn.Module(), nn.Module()
        attn, ff = self.conditional_attn, self.conditional_ff
        attn.light_attn, attn.heavy_attn = LightAttention(dim), HeavyAttention(dim)
        attn.q_router, attn.kv_router = Router(dim), Router(dim)
        ff.router, ff.light_ff, ff.heavy_ff = Router(dim), GatedFeedForward(dim, dim // 2), GatedFeedForward(dim, 4 * dim)
        self.descent = descent
        self.attend = compiled(lambda qkv: banded_attention(qkv, attn.light_attn.relative_attention_bias.weight))
        self.project, self.heavy_attn = compiled(attn.light_attn.project), compiled(attn.heavy_attn.forward)
        self.project_out = compiled(lambda attended: attn.light_attn.to_out(attended.flatten(2)))
        self.light_ff, self.heavy_ff = compiled(ff.light_ff.forward), compiled(lambda x, indices: ff.heavy_ff(rows_of(x, indices)))
        self.logits = compiled(lambda x, token: (x.float() * token.float()).sum(-1))
        self.add = compiled(lambda x, light, heavy, indices, scores: (x + light).scatter_add(
            1, indices[..., None].expand(heavy.shape), heavy * scores[..., None].to(heavy.dtype)))

    def route(self, x, router, k):
        logits = self.logits(x, router.routing_token)
        indices = logits.topk(k, dim=-1, sorted=False).indices
        return indices, self.descent(logits, k * FETCH_RATIO).gather(-1, indices)

    def forward(self, x):
        attn, ff, length = self.conditional_attn, self.conditional_ff, x.shape[1]
        indices_q, scores_q = self.route(x, attn.q_router, length // 16)
        indices_kv, scores_kv = self.route(x, attn.kv_router, length // 8)
        heavy = self.heavy_attn(x, indices_q, indices_kv, scores_kv)
        light = self.project_out(self.attend(self.project(x)))
        x = self.add(x, light, heavy, indices_q, scores_q)
        indices, scores = self.route(x, ff.router, length // 16)
        return self.add(x, self.light_ff(x), self.heavy_ff(x, indices), indices, scores)
