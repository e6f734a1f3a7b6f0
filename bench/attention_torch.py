# SPDX-License-Identifier: MIT
"""PyTorch programs for the CPU of what the package has not or cannot run: light attention with a relative position bias, attention routed in
blocks, and image attention routed over the map. Of the ways that we tried, the fastest stand here.

Parameters have the package's names, and the bias has ours. All tokens are real; the mask is not read. Lengths are multiples of BLOCK, and
those of more than ROUTED_BLOCK tokens multiples of that; sides of maps are multiples of WINDOW.
"""
import torch
import torch.nn.functional as F
from torch import nn

import colt5_attention
from paper_torch import FETCH_RATIO, Bias, RMSNorm, Router, bucket_of, rows_of

HEADS, DIM_HEAD, REACH = 8, 64, 64
BLOCK, AT_A_TIME = 32, 4  # tokens of a block, and blocks that a backward pass takes at a time
NEAR = REACH // BLOCK  # blocks to either side that a block sees
CHOSEN, ROUTED_BLOCK, WINDOW = 1024, 2048, 16
SCALE = DIM_HEAD ** -0.5


def scores_of_distances(weight):
    """What is added to the scores of a block of queries and of the keys around it: (h, BLOCK, BLOCK + 2 · REACH)"""
    distance = torch.arange(-REACH, BLOCK + REACH) - torch.arange(BLOCK)[:, None]
    beyond = torch.zeros(distance.shape).masked_fill_(distance.abs() > REACH, -float('inf'))
    return beyond + (torch.zeros(HEADS, 1, 1) if weight is None else weight[bucket_of(distance)].permute(2, 0, 1))


def in_blocks(x):
    """x (n, h, dim_head)  →  (blocks, h, BLOCK, dim_head)"""
    return x.unflatten(0, (-1, BLOCK)).transpose(1, 2)


def around_blocks(x):
    """x (n, h, dim_head)  →  (blocks that have all their neighbours, h, BLOCK + 2 · REACH, dim_head)"""
    return x.unfold(0, BLOCK + 2 * REACH, BLOCK).transpose(2, 3)


def attend(qkv, added):
    """SDPA of blocks, which holds no scores. qkv (b, n, 3, h, dim_head)  →  (b, n, h, dim_head)"""
    batch, length, _, heads, dim_head = qkv.shape
    out = qkv.new_empty(batch, length, heads, dim_head)
    for of, to in zip(qkv, out):
        q, to = in_blocks(of[:, 0]), in_blocks(to)
        blocks = len(q)
        inner = slice(NEAR, blocks - NEAR)
        if blocks > 2 * NEAR:
            to[inner] = F.scaled_dot_product_attention(q[inner], around_blocks(of[:, 1]), around_blocks(of[:, 2]), added[None])
        for i in {*range(min(NEAR, blocks)), *range(max(0, blocks - NEAR), blocks)}:
            first, last = max(0, i - NEAR), min(blocks, i + NEAR + 1)
            seen = added[None, ..., (first - i + NEAR) * BLOCK:(last - i + NEAR) * BLOCK]
            k, v = (of[None, first * BLOCK:last * BLOCK, j].transpose(1, 2) for j in (1, 2))
            to[i:i + 1] = F.scaled_dot_product_attention(q[i:i + 1], k, v, seen)
    return out


def gradients(q, k, v, d_out, out, added):
    """Of q, k, v and the scores"""
    p = torch.baddbmm(added, q, k.mT, alpha=SCALE).softmax(-1)
    d_scores = (torch.bmm(d_out, v.mT) - (d_out * out).sum(-1, keepdim=True)) * p
    return torch.bmm(d_scores, k) * SCALE, torch.bmm(d_scores.mT, q) * SCALE, torch.bmm(p.mT, d_out), d_scores


class LocalAttention(torch.autograd.Function):
    """The gradient of what is added to the scores comes from no flash attention on the CPU. So backward computes the weights again, of a few
    blocks at a time, which stay in the cache. That is faster than to hold all weights, compiled or not."""

    @staticmethod
    def forward(ctx, qkv, added):
        out = attend(qkv, added.detach())  # SDPA would hold all weights for a gradient
        ctx.save_for_backward(qkv, added, out)
        return out

    @staticmethod
    def backward(ctx, d_out):
        qkv, added, out = ctx.saved_tensors
        blocks = qkv.shape[1] // BLOCK
        d_added, d_qkv = torch.zeros_like(added), torch.empty_like(qkv)
        for i, of in enumerate(qkv):
            padded = F.pad(of[:, 1:], (0, 0, 0, 0, 0, 0, REACH, REACH))
            operands = in_blocks(of[:, 0]), around_blocks(padded[:, 0]), around_blocks(padded[:, 1]), in_blocks(d_out[i]), in_blocks(out[i])
            d_kv = qkv.new_zeros(2, blocks + 2 * NEAR, HEADS, BLOCK, DIM_HEAD)
            for first in range(0, blocks, AT_A_TIME):
                last = min(blocks, first + AT_A_TIME)
                count = last - first
                seen = added.repeat(count, 1, 1, 1)
                for end in range(NEAR):  # keys before the sequence, and behind it
                    if first <= end < last:
                        seen[end - first, ..., :REACH - end * BLOCK] = -float('inf')
                    if first <= blocks - 1 - end < last:
                        seen[blocks - 1 - end - first, ..., BLOCK + REACH + end * BLOCK:] = -float('inf')
                d_q, d_k, d_v, d_scores = gradients(*(x[first:last].flatten(0, 1) for x in operands), seen.flatten(0, 1))
                in_blocks(d_qkv[i, first * BLOCK:last * BLOCK, 0])[:] = d_q.view(count, HEADS, BLOCK, DIM_HEAD)
                for to, part in zip(d_kv, (d_k, d_v)):
                    for near, of_block in enumerate(part.view(count, HEADS, 2 * NEAR + 1, BLOCK, DIM_HEAD).unbind(2)):
                        to[first + near:last + near] += of_block
                d_added += d_scores.view(count, *added.shape).sum(0)
            for to, part in zip(d_qkv[i, :, 1:].unbind(1), d_kv):
                in_blocks(to)[:] = part[NEAR:-NEAR]
        return d_qkv, d_added


class LightAttention(nn.Module):
    """`attend` maps qkv (b, n, 3, h, dim_head)  →  (b, n, h, dim_head)"""

    def __init__(self, dim, norm, attend=None, has_bias=False):
        super().__init__()
        self.norm = norm
        self.to_qkv = nn.Linear(dim, 3 * HEADS * DIM_HEAD, bias=False)
        self.to_out = nn.Linear(HEADS * DIM_HEAD, dim, bias=False)
        self.relative_attention_bias = Bias(HEADS, dim) if has_bias else None
        self.attend = attend or self.attend_nearby

    def attend_nearby(self, qkv):
        return LocalAttention.apply(qkv, scores_of_distances(self.relative_attention_bias and self.relative_attention_bias.weight))

    def forward(self, x, mask=None):
        return self.to_out(self.attend(self.to_qkv(self.norm(x)).unflatten(-1, (3, HEADS, DIM_HEAD))).flatten(2))


class HeavyAttention(nn.Module):
    def __init__(self, dim, has_null_kv):
        super().__init__()
        inner = HEADS * DIM_HEAD
        self.norm = RMSNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.null_kv = nn.Parameter(torch.randn(2, HEADS, DIM_HEAD)) if has_null_kv else None

    def forward(self, queries, context, scores):
        """queries (b, q, d), context (b, k, d), scores (b, k)  →  (b, q, d)"""
        q = self.to_q(self.norm(queries)).unflatten(-1, (HEADS, DIM_HEAD)).transpose(1, 2)
        k, v = self.to_kv(self.norm(context)).unflatten(-1, (HEADS, 2, DIM_HEAD)).permute(3, 0, 2, 1, 4)
        v = v * scores[:, None, :, None]
        if self.null_kv is not None:
            k, v = (torch.cat([null[None, :, None].expand(len(x), -1, -1, -1), x], 2) for null, x in zip(self.null_kv, (k, v)))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class RoutedAttention(nn.Module):
    """Routes in blocks of `block` tokens, as if each were a sequence, or the sequence as a whole."""

    def __init__(self, dim, light_attn, descent, block=None, has_null_tokens=False):
        super().__init__()
        self.light_attn, self.heavy_attn = light_attn, HeavyAttention(dim, has_null_tokens)
        self.q_router, self.kv_router = Router(dim), Router(dim)
        self.null_q_token = nn.Parameter(torch.randn(dim)) if has_null_tokens else None
        self.descent, self.block = descent, block

    def route(self, x, router):
        """x (b, n, d)  →  indices and scores (b, k). The scores are 1; in training they have the gradient of the descent's."""
        batch, length, _ = x.shape
        size = min(self.block or length, length)
        picks = min(CHOSEN, length) * size // length
        logits = (x @ router.routing_token[0]).view(-1, size)
        indices = logits.topk(picks, dim=-1, sorted=False).indices
        scores = torch.ones(indices.shape)
        if torch.is_grad_enabled():
            k = torch.tensor([min(picks * FETCH_RATIO, size)])
            soft = colt5_attention.coor_descent(logits, k=k, **self.descent).gather(-1, indices)
            scores = scores + soft - soft.detach()
        first = torch.arange(0, length, size).repeat(batch)[:, None]
        return (indices + first).view(batch, -1), scores.view(batch, -1)

    def forward(self, x, mask=None):
        indices_q, scores_q = self.route(x, self.q_router)
        indices_kv, scores_kv = self.route(x, self.kv_router)
        heavy = self.heavy_attn(rows_of(x, indices_q), rows_of(x, indices_kv), scores_kv) * scores_q[..., None]
        out = self.light_attn(x)
        if self.null_q_token is not None:
            out, heavy = out + self.null_q_token, heavy - self.null_q_token
        return out.scatter_add(1, indices_q[..., None].expand(heavy.shape), heavy)


def light_attention_with_bias(dim):
    return LightAttention(dim, nn.LayerNorm(dim), has_bias=True)


def attention_in_blocks(dim):
    return RoutedAttention(dim, LightAttention(dim, nn.LayerNorm(dim)), dict(n_iters=50, eps=1.), ROUTED_BLOCK)


class ImageAttention(RoutedAttention):
    """Over the map; the descent is that of version 0.11, with its defaults."""

    def __init__(self, dim):
        light_attn = LightAttention(dim, RMSNorm(dim), self.attend_in_windows)
        super().__init__(dim, light_attn, dict(n_iters=20, eps=0.03, eps_init=4., eps_decay=0.7), has_null_tokens=True)

    @staticmethod
    def attend_in_windows(qkv):
        """Tokens stand window by window."""
        q, k, v = qkv.view(-1, WINDOW * WINDOW, 3, HEADS, DIM_HEAD).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(qkv), -1, HEADS, DIM_HEAD)

    def forward(self, maps):
        """maps (b, h, w, d)"""
        batch, height, width, dim = maps.shape
        windows = maps.view(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, dim).transpose(2, 3)
        out = super().forward(windows.reshape(batch, -1, dim))
        return out.view(windows.shape).transpose(2, 3).reshape(maps.shape)
