"""A counterexample as a Python file to run: exact numbers, the claim, the truth computed on the spot, an assert."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention
from lipbounds.targets.target import Target
from lipbounds.testing.loading import expression, load_spec


NO_PATH = "..."  # in the place of a bound that cannot be imported by a path
_HEAD = """import torch

import lipbounds
from {module} import {block_class}
from lipbounds.testing.contract import {checks}, load_spec

inf = float("inf")
spec = {spec}
block = {block}
"""
_TRUTH = """claimed = spec(block{radius}).value.double().item()

# The truth, by automatic differentiation of a forward pass written out here. Tokens are taken relative to the key
# that a query sees best: the differences are exact, and rows that are nearly one-hot lose no digits.
x, memory = block.x.double(), {memory}.double()
w_q, w_k, w_v, w_o = (weights.double() for weights in (block.w_q, block.w_k, block.w_v, block.w_o))
mask = torch.zeros(block.heads, block.tokens, len(memory)).double(){mask}
scale = block.scale
point = {point}.double()
{functions}

def forward(moving):
    x_, memory_ = {inputs}
    query = torch.einsum("nd,hde->hne", x_, w_q){query_bias}
{logits}
    best = logits.argmax(-1){best_key}
    away = memory_ - memory_[best].unsqueeze(-2)
    above = {above} + mask - mask.gather(-1, best.unsqueeze(-1))
    maps = above.exp() / above.exp().sum(-1, keepdim=True)
    mixed = memory_[best] + torch.einsum("hnm,hnmd->hnd", maps, away)
    return torch.einsum("hnd,hde,hef->nf", mixed, w_v, w_o)  # value and output biases are constants


jacobian = torch.func.jacrev(forward)(point).reshape(-1, point.numel())
truth = torch.linalg.matrix_norm(jacobian, 2).item()
print(f"claimed {{claimed!r}}, truth {{truth!r}}")
{assertion}
"""

_PLAIN = {
    "functions": "",
    "best_key": "",
    "logits": """\
    logits = scale * torch.einsum("hne,md,hde->hnm", query, memory_, w_k) + mask  # a key bias would cancel""",
    "above": """scale * torch.einsum("hne,hnmd,hde->hnm", query, away, w_k)""",
}
# Keys that are no linear function of their token alone.
_BY_TOKEN = {
    "best_key": "\n    best_key = torch.stack([rows[index] for rows, index in zip(key, best)])",
    "logits": """    query = {query}
    key = torch.einsum("md,hde->hme", memory_, w_k){key_bias}
    key = {key}
    logits = scale * torch.einsum("hne,hme->hnm", query, key) + mask""",
    "above": """scale * torch.einsum("hne,hnme->hnm", query, key.unsqueeze(1) - best_key.unsqueeze(2))""",
}
_TURN = """

def turn(rows, rotation):  # rotary positions: features e and e + pairs by the angle of the token
    cos, sin = rotation.double().unbind(-2)
    first, second, rest = rows.tensor_split([cos.shape[-1], 2 * cos.shape[-1]], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
"""
_NORM = """

def norm(rows, weight):  # QK-norm: over the features of each head, or of all heads of a token
    together = (0, 2) if block.norm_over == "all_heads" else 2
    square = rows.square().mean(together, keepdim=True)
    return rows / (square + block.norm_eps).sqrt() * weight.double().unsqueeze(1)
"""


def snippet(
    spec: BoundSpec | str, block: Attention, radius: float | None = None, *, point: Tensor | None = None
) -> str:
    """Python source that evaluates the bound at `block`, computes the truth by itself and fails at an assert.

    Args:
        spec: the bound, its registered name or its path `package.module:attribute`.
        block: the counterexample, without batch dimensions.
        radius: of the ball, for the scopes that have one.
        point: the input, within the scope, at which the truth is above the claim; None for the input of the block.
    """
    spec = load_spec(spec) if isinstance(spec, str) else spec
    bias = "" if block.logit_bias is None else " + block.logit_bias.double()"
    future = " + torch.full((len(x), len(x)), -inf).double().triu(1)" if block.causal else ""
    moving = {"self": "moving, moving", "query": "moving, memory", "memory": "x, moving"}
    if block.queries_at is not None:
        moving["self"] = "moving[block.queries_at], moving"
    text = _TRUTH.format(
        **_logits(block),
        radius="" if radius is None else f", radius={radius!r}",
        memory="block.x" if block.memory is None else "block.memory",
        mask=bias + future,
        point="block.moving_input" if point is None else tensor_source(point, "    "),
        inputs=moving[block.moves],
        query_bias="" if block.b_q is None else " + block.b_q.double().unsqueeze(-2)",
        assertion=_assertion(spec, radius, point is not None),
    )
    return head(spec, block) + text


def _logits(block: Attention) -> dict[str, str]:
    """The parts of the source that depend on whether queries and keys are normalised or turned."""
    norm, turned = block.norm_eps is not None, block.query_rotation is not None
    if not norm and not turned:
        return _PLAIN
    rows = {"query": "query", "key": "key"}
    if norm:
        rows = {side: f"norm({row}, block.{side}_norm_weight)" for side, row in rows.items()}
    if turned:
        rows = {side: f"turn({row}, block.{side}_rotation)" for side, row in rows.items()}
    key_bias = "" if block.b_k is None else " + block.b_k.double().unsqueeze(-2)"
    functions = _NORM * norm + _TURN * turned
    logits = _BY_TOKEN["logits"].format(key_bias=key_bias, **rows)
    return _BY_TOKEN | {"functions": functions, "logits": logits}


def check_snippet(spec: BoundSpec, check: str, block: Target, radius: float | None, seed: int) -> str:
    """Python source that runs one check again at `block`, for properties that need more than one number."""
    call = f'{_checks(block)}["{check}"].function(spec, block, radius={radius!r}, seed={seed})'
    return head(spec, block) + call + "  # raises Refuted, which says what must hold\n"


def tensor_source(tensor: Tensor, indent: str = "") -> str:
    """Source of a tensor with exactly the same entries, dtype and shape; `inf` must be defined where it is used."""
    tensor = tensor.detach().cpu()
    entries = _nested(tensor.to(torch.float64), indent)
    return f"torch.tensor({entries}, dtype={tensor.dtype})"


def _nested(tensor: Tensor, indent: str) -> str:
    flat = repr(tensor.tolist())
    if tensor.dim() < 2 or len(flat) + len(indent) < 80:
        return flat
    inner = indent + "    "
    return "[\n" + "".join(f"{inner}{_nested(row, inner)},\n" for row in tensor) + indent + "]"


def _checks(block: Target) -> str:
    """Name in `contract` of the checks for this kind of block."""
    return "CHECKS" if isinstance(block, Attention) else "TARGET_CHECKS"


def head(spec: BoundSpec, block: Target) -> str:
    """The beginning of a file: the imports, `spec` and `block` with exactly the same numbers.

    Args:
        spec: the bound.
        block: where it fails.
    """
    name = type(block).__name__
    lines = []
    for field in dc.fields(block):  # pyright: ignore[reportArgumentType] a target is a dataclass
        value = getattr(block, field.name)
        default = field.default
        if isinstance(value, Tensor):
            lines.append(f"    {field.name}={tensor_source(value, '    ')},\n")
        elif isinstance(value, tuple):
            entries = [repr(v) if v is None else tensor_source(v, "        ") for v in value]
            lines.append(f"    {field.name}=(\n" + "".join(f"        {e},\n" for e in entries) + "    ),\n")
        elif value != default:
            lines.append(f"    {field.name}={value!r},\n")
    found = expression(spec) or f"{NO_PATH}  # {spec.name} cannot be imported by a path: put your BoundSpec here"
    return _HEAD.format(
        spec=found,
        block=f"{name}(\n" + "".join(lines) + ")",
        module="lipbounds" if isinstance(block, Attention) else type(block).__module__,
        block_class=name,
        checks=_checks(block),
    )


def _assertion(spec: BoundSpec, radius: float | None, at_point: bool) -> str:
    if spec.claim.kind == "lower":
        return 'assert claimed <= truth, "the lower bound is above the truth"'
    inside = {
        "ball": f"assert (point - block.moving_input.double()).norm() <= {radius!r}\n",
        "compact": f"assert point.norm(dim=-1).max() <= {radius!r}\n",
    }
    within = inside.get(spec.claim.scope, "") if at_point else ""
    return within + 'assert truth <= claimed, "the bound is below the truth"'
