# SPDX-License-Identifier: MIT
"""generate.py FOLDER: writes what the installed colt5-attention computes in float64. With version 0.2.3 (and local-attention 1.8.6) it
writes the v023_*.safetensors files; with 0.11 (and local-attention 1.9.15) the four head_*_b1.safetensors. A program like this one wrote
the other head_* files, in the same form, with 0.11.1.

One file a case; the loss is sum(out.y * in.cotangent):

    __metadata__.config   JSON: the class, its constructor arguments, the shape of in.x
    in.x, in.context, …   inputs, exact in float32                                                        float32
    in.mask, …            true marks a real token                                                         uint8
    in.gumbel_<i>         the noise that the i-th Sinkhorn routing drew, in the order of the calls        float32
    param.<name>          parameters under their state_dict names, exact in float32                       float32
    in.cotangent          d loss / d out.y                                                                float32
    out.y, out.scores     outputs                                                                         float64
    grad.<input>, grad.param.<name>                                                                       float32

grad.k, in files of version 0.11, is for the k of each row.

No case depends on how equal scores at the edge of a selection are ordered: a draw that has some is replaced by another one.
"""
import json
import os
import struct
import sys

import colt5_attention as reference
import colt5_attention.transformer_block
import torch

REFERENCE = 'head' if hasattr(reference, 'topk') else 'v023'
if REFERENCE == 'v023':
    import colt5_attention.sinkhorn

torch.set_default_dtype(torch.float64)

DIM, LENGTH, BATCH = 32, 64, 2
CONTEXT_LENGTH = 3 * LENGTH + 5
ATTENTION = dict(dim=DIM, light_dim_head=8, light_heads=4, light_window_size=16, heavy_dim_head=8, heavy_heads=4)
NUM_Q, NUM_KV, NUM_FF = 12, 16, 20


def round32(tensor):
    """Exact in float32, still computed with in float64."""
    return tensor.float().double()


def save(name, config, tensors):
    """A safetensors file: length of the header, header, raw little-endian data."""
    kinds = {torch.float64: 'F64', torch.float32: 'F32', torch.uint8: 'U8'}
    header, data, end = {'__metadata__': {'config': json.dumps(config, sort_keys=True)}}, [], 0
    for key in sorted(tensors):
        tensor = tensors[key].detach().contiguous()
        if tensor.dtype == torch.bool:
            tensor = tensor.to(torch.uint8)
        elif not key.startswith('out.'):
            tensor = tensor.to(torch.float32)
        data.append(tensor.numpy().tobytes())
        begin, end = end, end + len(data[-1])
        header[key] = {'dtype': kinds[tensor.dtype], 'shape': list(tensor.shape), 'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(os.path.join(sys.argv[1], f'{REFERENCE}_{name}.safetensors'), 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text + b''.join(data))


def seed_of(name):
    value = 0
    for character in name:
        value = (value * 131 + ord(character)) % 99991
    return 1000 + value


def ragged_mask(batch, length, generator):
    """Between half and all of each row's tokens are real."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row in mask:
        row[:int(torch.randint(length // 2, length + 1, (1,), generator=generator))] = True
    return mask


class Tie(Exception):
    pass


class TieGuard:
    """Watches coordinate descent, and the top-k of its scores, for equal scores at the edge of the selection."""

    def __init__(self):
        self.descend, self.topk = reference.transformer_block.coor_descent, torch.Tensor.topk
        self.descended, self.mask = False, None
        reference.transformer_block.coor_descent = self.guarded_descend
        guard = self
        torch.Tensor.topk = lambda self, k, dim=-1, **kwargs: guard.guarded_topk(self, k, dim, **kwargs)

    def guarded_descend(self, logits, **kwargs):
        scores = self.descend(logits, **kwargs)
        self.descended, self.mask = True, kwargs.get('mask')
        return scores

    def guarded_topk(self, scores, k, dim, **kwargs):
        if self.descended:
            for i, row in enumerate(scores.detach()):
                real = (row if self.mask is None else row[self.mask[i]]).sort(descending=True).values
                if len(real) > k and not real[k - 1] > real[k]:
                    raise Tie
                if 0 < len(real) <= k and not real[-1] > 0:
                    raise Tie
        self.descended = False
        return self.topk(scores, k, dim=dim, **kwargs)


guard = TieGuard()
drawn_noise = []

if REFERENCE == 'v023':
    sample_gumbel = reference.sinkhorn.sample_gumbel

    def recorded_gumbel(*arguments):
        drawn_noise.append(round32(sample_gumbel(*arguments)))
        return drawn_noise[-1]

    reference.sinkhorn.sample_gumbel = recorded_gumbel


def module_case(name, cls, config, batch=BATCH, length=LENGTH, mask=False, call=None, seed=None, **inputs):
    """inputs: functions of a generator that draw further arguments of the module."""
    for attempt in range(50):
        guard.descended = False
        try:
            return draw_module_case(name, cls, config, (batch, length, DIM), mask, call, inputs, (seed or seed_of(name)) + 100 * attempt)
        except Tie:
            continue
    raise RuntimeError(f'{name}: every draw has ties')


def draw_module_case(name, cls, config, shape, mask, call, inputs, seed):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    module = cls(**config).double()
    for parameter in module.parameters():  # off the trivial initial values (gamma = 1, bias = 0)
        with torch.no_grad():
            parameter.copy_(round32(parameter + 0.05 * torch.randn(parameter.shape, generator=generator)))
    x = round32(torch.randn(*shape, generator=generator)).requires_grad_()
    arguments = {'mask': ragged_mask(*shape[:2], generator)} if mask else {}
    for key, draw in inputs.items():
        value = draw(generator)
        arguments[key] = round32(value).requires_grad_() if value.dtype.is_floating_point else value

    drawn_noise.clear()
    y = call(module, x, **arguments) if call else module(x, **arguments)
    cotangent = round32(torch.randn(y.shape, generator=generator))
    (y * cotangent).sum().backward()

    arguments['x'] = x
    tensors = {'in.' + key: value for key, value in arguments.items()}
    tensors |= {f'in.gumbel_{i}': noise for i, noise in enumerate(drawn_noise)}
    tensors |= {'in.cotangent': cotangent, 'out.y': y}
    tensors |= {'param.' + key: value for key, value in module.named_parameters()}
    tensors |= {'grad.param.' + key: value.grad for key, value in module.named_parameters() if value.grad is not None}
    tensors |= {'grad.' + key: value.grad for key, value in arguments.items() if value.grad is not None}
    save(name, {'class': cls.__name__, 'reference': REFERENCE, **config, 'shape': list(shape)}, tensors)


def descent_case(name, length, rows, k, mask=False, **config):
    generator = torch.Generator().manual_seed(seed_of(name))
    logits = round32(torch.randn(rows, length, generator=generator) * 3.0).requires_grad_()
    tensors = {'in.s': logits}
    if mask:
        tensors['in.mask'] = ragged_mask(rows, length, generator)
    scores = reference.coor_descent(logits, k=torch.tensor([k]), mask=tensors.get('in.mask'), **config)
    cotangent = round32(torch.randn(scores.shape, generator=generator))
    (scores * cotangent).sum().backward()
    tensors |= {'in.cotangent': cotangent, 'out.scores': scores, 'grad.s': logits.grad}
    save(name, {'class': 'coor_descent', 'reference': REFERENCE, 'k': k, **config}, tensors)


def cross_attention(module, x, context, mask=None, context_mask=None):
    """What the reference means: it gathers keys and values from x where its comments say context."""
    batch = torch.arange(x.shape[0])[:, None]
    scores_q, indices_q = module.q_router(x, num_tokens=module.num_tokens_q, mask=mask)
    scores_kv, indices_kv = module.kv_router(context, num_tokens=module.num_tokens_kv, mask=context_mask)
    batch_kv = batch if indices_kv.ndim == 2 else batch[..., None]
    y = module.heavy_attn(x[batch, indices_q], context=context[batch_kv, indices_kv], normalized_scores_kv=scores_kv,
                          mask=None if context_mask is None else context_mask[batch_kv, indices_kv])
    out = torch.zeros_like(x)
    out[batch, indices_q] = y * scores_q[..., None]
    return out


def main():
    os.makedirs(sys.argv[1], exist_ok=True)
    cases_of_version_0_11() if REFERENCE == 'head' else cases_of_version_0_2_3()


def cases_of_version_0_11():
    """With two key/value routes, the package gathers from the right sample only when there is but one; in autoregressive attention,
    whose windows are samples to it, also from the right window only when there is but one that has keys."""
    attention = dict(**ATTENTION, num_heavy_tokens_q=NUM_Q, num_heavy_tokens_kv=NUM_KV, num_routed_kv=2)
    for tag, options in (('', {}), ('_rotary', dict(rotary_emb=True))):
        module_case(f'attn_routes2{tag}_b1', reference.ConditionalRoutedAttention, dict(**attention, **options), batch=1)
    module_case('attn_routes2_mask_b1', reference.ConditionalRoutedAttention, attention, batch=1, mask=True, seed=1001)
    module_case('autoregressive_routes2_rotary_b1', reference.ConditionalRoutedAutoregressiveAttention,
                {**attention, 'light_window_size': 8, 'num_heavy_tokens_q': 5, 'num_heavy_tokens_kv': 6, 'rotary_emb': True}, batch=1, length=16)


def cases_of_version_0_2_3():
    descent_case('coor_descent_50', 2048, 2, 72.0, n_iters=50, eps=1.0)
    descent_case('coor_descent_50_mask', 512, 3, 36.0, mask=True, n_iters=50, eps=1.0)
    descent_case('coor_descent_small_eps', 300, 2, 20.25, n_iters=20, eps=0.1)

    attention = dict(**ATTENTION, num_heavy_tokens_q=NUM_Q, num_heavy_tokens_kv=NUM_KV)
    block = dict(**ATTENTION, light_ff_mult=0.5, heavy_ff_mult=4,
                 num_heavy_ff_tokens=NUM_FF, num_heavy_attn_tokens_q=NUM_Q, num_heavy_attn_tokens_kv=NUM_KV)
    for router in ('coor_descent', 'cum_softmax', 'sinkhorn'):
        for tag, mask, straight_through in (('', False, True), ('_soft', False, False), ('_mask', True, True)):
            options = dict(router_type=router, router_straight_through=straight_through)
            module_case(f'ff_{router}{tag}', reference.ConditionalRoutedFeedForward,
                        dict(dim=DIM, num_heavy_tokens=NUM_FF, **options), mask=mask)
            module_case(f'attn_{router}{tag}', reference.ConditionalRoutedAttention, dict(**attention, **options), mask=mask)
            if straight_through:
                module_case(f'block_{router}{tag}', reference.ConditionalRoutedTransformerBlock,
                            dict(**block, router_type=router), mask=mask)

    # Without a mask, the last tokens also attend to the zeros that pad a sequence to a multiple of 8.
    module_case('attn_padding', reference.ConditionalRoutedAttention, attention, length=LENGTH + 5)

    # With two key/value routes, the reference gathers from the right sample only when there is but one.
    module_case('attn_routes2_b1', reference.ConditionalRoutedAttention, dict(**attention, num_routed_kv=2), batch=1)
    module_case('block_routes2_b1', reference.ConditionalRoutedTransformerBlock, dict(**block, num_routed_kv=2), batch=1)

    def context(generator):
        return torch.randn(BATCH, CONTEXT_LENGTH, DIM, generator=generator)

    cross = dict(dim=DIM, dim_head=8, heads=4, num_tokens_q=NUM_Q, num_tokens_kv=NUM_KV)
    for routes in (1, 2):
        module_case(f'cross_routes{routes}', reference.ConditionalRoutedCrossAttention, dict(**cross, kv_routing_tokens=routes),
                    call=cross_attention, context=context)
    module_case('cross_mask', reference.ConditionalRoutedCrossAttention, cross, mask=True, call=cross_attention, context=context,
                context_mask=lambda generator: ragged_mask(BATCH, CONTEXT_LENGTH, generator))


if __name__ == '__main__':
    main()
