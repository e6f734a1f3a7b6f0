# SPDX-License-Identifier: MIT
"""The examples of the package's README run line for line, with only the import changed."""
import os
import pathlib
import re

import pytest
import torch
from support import check_equal

TEXT = (pathlib.Path(__file__).parent / 'readme_0.2.3.md').read_text()
if os.environ.get('COLT5_QUICK'):
    TEXT = TEXT.replace('32768', '4096').replace('1e6', '1e5')
EXAMPLES = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch):
    if not torch.cuda.is_available():
        for owner in torch.Tensor, torch.nn.Module:
            monkeypatch.setattr(owner, 'cuda', lambda self, *_: self)


def execute(example, package):
    torch.manual_seed(0)
    names = {}
    exec(example.replace('from colt5_attention import', f'from {package} import'), names)
    return names


def gradients(names, module, out):
    parameters = names[module].named_parameters()
    names[out].sum().backward()
    return {'out': names[out].detach(), **{name: p.grad for name, p in parameters}}


def test_feedforward_attention_and_block():
    assert len(EXAMPLES) == 2 and 'ConditionalRoutedTransformerBlock' in EXAMPLES[0]
    # Logits of deviation √512 saturate: which of the tokens with a score of exactly 1 are taken is arbitrary in the package.
    example = re.sub(r'(tokens = torch.randn\(.*\))', r'\1 / 512 ** 0.5', EXAMPLES[0])
    names, expected = execute(example, 'colt5'), execute(example, 'colt5_attention')
    assert torch.equal(names['tokens'], expected['tokens'])
    for module, out in ('ff', 'ff_out'), ('attn', 'attn_out'), ('block', 'block_out'):
        check_equal(gradients(names, module, out), gradients(expected, module, out), 2e-5)


def test_cross_attention():  # which fails in the package; tests/golden has its numbers
    names = execute(EXAMPLES[1], 'colt5')
    assert names['cross_attn_out'].shape == (2, 1024, 512)
    assert names['cross_attn_out'].isfinite().all()
    chosen = names['cross_attn_out'].abs().sum(-1) > 0
    assert (chosen.sum(-1) == 512).all()
