# SPDX-License-Identifier: MIT
"""The image classifier of colt5-attention 0.11. Its layers are compiled; what is around them is PyTorch's."""
import torch
from torch import nn

from .errors import shape_error, value_error
from .modules import VERSION_0_11, ConditionalRoutedFeedForward, ConditionalRoutedImageAttention


def pair(x):
    return x if isinstance(x, tuple) else (x, x)


class Patches(nn.Module):
    """Images (b, c, height, width) as maps of patches (b, h, w, pixels of a patch)."""

    def __init__(self, patch_size, channels):
        super().__init__()
        self.size = pair(patch_size)
        self.channels = channels

    def forward(self, images):
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise shape_error('img', (None, self.channels, None, None), images.shape)
        for name, extent, size in zip(('height', 'width'), images.shape[2:], self.size):
            if extent == 0 or extent % size != 0:
                raise value_error(f'{name} of img', f'a multiple of patch_size, {size}', extent)
        height, width = self.size
        x = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (b, c, h, height, w, width)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((1, 2))


def positions(h, w, like):
    """Sines and cosines of the places of patches (h, w, dim)"""
    dim, dtype = like.shape[-1], torch.promote_types(like.dtype, torch.float32)
    omega = 10000 ** -(torch.arange(dim // 4, device=like.device, dtype=dtype) / (dim // 4 - 1))
    y = torch.arange(h, device=like.device)[:, None, None] * omega
    x = torch.arange(w, device=like.device)[:, None] * omega
    return torch.cat([t.expand(h, w, dim // 4) for t in (x.sin(), x.cos(), y.sin(), y.cos())], -1).to(like.dtype)


class Transformer(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(layer) for layer in layers)

    def forward(self, x):  # (b, h, w, dim)
        for attn, ff in self.layers:
            x = attn(x) + x
            x = (ff(x.flatten(1, 2)) + x.flatten(1, 2)).view(x.shape)
        return x


class ConditionalRoutedViT(nn.Module):
    """Images (b, channels, h, w), of any size that is a multiple of the patch  ->  logits of classes (b, num_classes). The
    attention's routers choose from the whole map, or as in the package from each window (routing_scope='window')."""

    def __init__(self, *, image_size, patch_size, num_classes, dim, depth, attn_num_heavy_tokens_q, attn_num_heavy_tokens_kv,
                 attn_heavy_dim_head, attn_heavy_heads, attn_light_dim_head, attn_light_heads, attn_light_window_size,
                 ff_num_heavy_tokens, ff_heavy_mult, ff_light_mult, channels=3, router_straight_through=True,
                 router_kwargs: dict = {}, router_use_triton=False, flash_attn=True, attn_num_routed_kv=1,
                 default_coor_descent_eps=1., routing_scope='map'):
        super().__init__()
        for name, size, patch in zip(('height', 'width'), pair(image_size), pair(patch_size)):
            if size % patch != 0:
                raise value_error(f'{name} of image_size', f'a multiple of patch_size, {patch}', size)
        if dim < 8 or dim % 4 != 0:
            raise value_error('dim', 'a multiple of 4, at least 8', dim)
        pixels = channels * pair(patch_size)[0] * pair(patch_size)[1]
        self.to_patch_embedding = nn.Sequential(Patches(patch_size, channels), nn.LayerNorm(pixels), nn.Linear(pixels, dim),
                                                nn.LayerNorm(dim))
        routing = dict(router_straight_through=router_straight_through,
                       router_kwargs={**VERSION_0_11, 'eps': default_coor_descent_eps, **router_kwargs})

        def layer():
            ff = ConditionalRoutedFeedForward(dim, num_heavy_tokens=ff_num_heavy_tokens, light_ff_mult=ff_light_mult,
                                              heavy_ff_mult=ff_heavy_mult, **routing)
            attn = ConditionalRoutedImageAttention(
                dim, num_heavy_tokens_q=attn_num_heavy_tokens_q, num_heavy_tokens_kv=attn_num_heavy_tokens_kv,
                num_routed_kv=attn_num_routed_kv, light_dim_head=attn_light_dim_head, light_heads=attn_light_heads,
                light_window_size=attn_light_window_size, heavy_dim_head=attn_heavy_dim_head, heavy_heads=attn_heavy_heads,
                routing_scope=routing_scope, **routing)
            return attn, ff

        self.transformer = Transformer([layer() for _ in range(depth)])
        self.linear_head = nn.Sequential(Mean(), nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, img):
        x = self.to_patch_embedding(img)
        x = x + positions(x.shape[1], x.shape[2], x)
        return self.linear_head(self.transformer(x))
