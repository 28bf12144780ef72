"""The Triton kernels of the scores of JaSMin: through the interpreter, and compiled for a card that is not there.

Both in processes of their own: Triton's interpreter is chosen when the kernels are imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMPARE = """
import torch
from lipbounds.kernels import triton_jasmin as kernel
from lipbounds.ops.log_g import log_g_1, log_g_ratio

generator = torch.Generator().manual_seed(0)
CASES = (  # heads, groups, n, m, k, scale, causal, biased, dtype
    (1, 1, 40, 70, 0, 0.4, False, False, torch.float32),
    (2, 1, 70, 70, 0, 20.0, True, False, torch.float32),
    (2, 2, 36, 68, 10, 0.4, False, True, torch.float32),
    (4, 2, 33, 33, 3, 2.0, True, True, torch.float32),
    (1, 1, 5, 9, 1, 1.0, False, False, torch.float32),
    (1, 1, 40, 70, 2, 0.4, False, False, torch.bfloat16),
)
for heads, groups, n, m, k, scale, causal, biased, dtype in CASES:
    q = torch.randn(2, heads, n, 16, generator=generator).to(dtype).requires_grad_()
    keys = torch.randn(2, groups, m, 16, generator=generator).to(dtype).requires_grad_()
    bias = None
    if biased:
        bias = torch.randn(heads, 1, m, generator=generator)
        bias[0, 0, 3:9] = -torch.inf
        bias[-1, 0, 5:] = -torch.inf
    found = kernel.jasmin_scores(q, keys, scale, k, causal=causal, logit_bias=bias)
    factors = torch.randn(found.shape, generator=generator)
    visible = found.isfinite()
    (found * factors)[visible].sum().backward()
    wide_q, wide_k = (t.detach().double().requires_grad_() for t in (q, keys))
    logits = scale * wide_q @ wide_k.repeat_interleave(heads // groups, 1).mT
    if biased:
        logits = logits + bias.double()
    if causal:
        logits = logits.masked_fill(torch.ones(n, n).triu(1) > 0, -torch.inf)
    truth = log_g_ratio(logits, k) if k else log_g_1(logits)
    truth = truth * (k != 1)  # g_1 over itself
    assert torch.equal(visible, truth.isfinite())
    (truth * factors)[visible].sum().backward()
    error = kernel.logit_error(q, keys.repeat_interleave(heads // groups, 1), scale).max().item()
    rounding = 8 * error + 40 * 2.0**-23 * (1 + truth[visible].abs().max().item())
    assert (found - truth)[visible].abs().max() < rounding
    for given, wanted in ((q, wide_q), (keys, wide_k)):
        off = (given.grad - wanted.grad).abs().max()
        # In bfloat16 the gradients of the logits enter the product in that dtype, as those of FlashAttention do.
        allowed = rounding if dtype is torch.float32 else 2.0**-6
        assert off <= allowed * wanted.grad.abs().max(), (k, off)
"""

# What `JaSMin` gives where the kernel takes the maps, beside what it gives without.
PENALTIES = """
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend
from lipbounds.jasmin import JaSMin
from lipbounds.kernels import jasmin_rows

generator = torch.Generator().manual_seed(1)
BIAS = torch.randn(20, 20, generator=generator).masked_fill(torch.eye(20) > 0, -torch.inf)


class Model(nn.Module):
    def __init__(self, options, groups):
        super().__init__()
        self.options = options
        self.query = nn.Parameter(2 * torch.randn(1, 4, 20, 16, generator=generator))
        self.key = nn.Parameter(2 * torch.randn(1, groups, 20, 16, generator=generator))

    def forward(self):
        return attend(self.query, self.key, torch.ones_like(self.key), **self.options)


def penalty(model, use, **options):
    jasmin_rows.available, jasmin_rows.LONG = (lambda device: use), 16
    model.zero_grad()
    with JaSMin(model, **options) as reg:
        model()
        found = reg.penalty()
    found.backward()
    return [found.detach(), model.query.grad, model.key.grad]


plain = jasmin_rows.kernel_takes
for options, groups, k, over_rows in (
    ({}, 4, 10, "max"),
    ({"is_causal": True, "enable_gqa": True}, 2, 0, "max"),
    ({"attn_mask": BIAS, "scale": 0.7}, 4, 3, "mean"),
    ({"is_causal": True}, 4, 0, "mean"),
):
    model = Model(options, groups)
    q, keys = model.query, model.key
    there, here = (penalty(model, use, k=k, over_rows=over_rows) for use in (True, False))
    jasmin_rows.available = lambda device: True
    assert plain(q, keys, k, options.get("attn_mask"), causal="is_causal" in options) is True
    for found, wanted in zip(there, here):
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)
for given in (
    (q.double(), keys.double(), 0, None),
    (q[..., :12], keys[..., :12], 0, None),
    (q[..., :8, :], keys[..., :8, :], 0, None),
    (q, keys, 16, None),
    (q, keys, 0, torch.zeros(20, 20, requires_grad=True)),
    (q, keys, 0, torch.zeros(3, 1, 20, 20)),
):
    assert not plain(*given, causal=False)
assert not plain(q[:, :, :18], keys, 0, None, causal=True)
"""

REFUSED = """
import torch
from lipbounds.kernels.triton_jasmin import jasmin_scores

x, five = torch.zeros(1, 3, 16), torch.zeros(1, 3, 5)
for arguments, options, message in (
    ((five, five, 1.0), {}, "power of two"),
    ((x, torch.zeros(1, 3, 32), 1.0), {}, "one batch shape and width"),
    ((x, x[:, :2], 1.0), {"causal": True}, "as many queries as keys"),
    ((x.expand(3, 3, 16), x.expand(2, 3, 16), 1.0), {}, "must divide"),
    ((x, x, 1.0, 16), {}, "k must be from 0 to 15"),
    ((x, x, 1.0), {"logit_bias": torch.zeros(3, 4)}, "logit_bias must broadcast"),
    ((x, x, 1.0), {"precision": "half"}, "precision must be one of"),
):
    try:
        jasmin_scores(*arguments, **options)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
"""

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lipbounds.kernels import triton_jasmin

kernel = triton_jasmin._forward.fn
constants = {"D": 64, "KEPT": 2, "CAUSAL": True, "BIASED": True, "PRECISION": "ieee", "ROWS": 64, "COLS": 64}
floats = dict.fromkeys(("queries", "keys"), "*bf16") | dict.fromkeys(("bias", "top", "rest"), "*fp32")
kinds = floats | {"place": "*i32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
source = ASTSource(
    fn=kernel,
    signature={name: kinds.get(name, "i32") for name in kernel.arg_names},
    constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
assert "wgmma" in made.asm["ptx"], "the product is not on tensor cores"
assert made.asm["cubin"]
"""


def run(program: str, **environment: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_kernels_are_the_reference() -> None:
    run(COMPARE + REFUSED + PENALTIES, TRITON_INTERPRET="1")  # one process: torch is loaded once


def test_the_kernel_compiles_for_tensor_cores(tmp_path: Path) -> None:
    run(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
