"""Construction checks of `Attention`: one clear error for each way a block can be malformed."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lipbounds.devices import answers
from lipbounds.errors import InvalidInput
from lipbounds.ops.shapes import broadcast_shape
from lipbounds.targets.given import odd_kind
from lipbounds.targets.rms_norm import NORM_OVER


FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Number of trailing dimensions of each tensor field that are not batch dimensions.
TRAILING = {
    "x": 2,
    "memory": 2,
    "w_q": 3,
    "w_k": 3,
    "w_v": 3,
    "w_o": 3,
    "b_q": 2,
    "b_k": 2,
    "b_v": 2,
    "b_o": 1,
    "query_rotation": 3,
    "key_rotation": 3,
    "query_norm_weight": 2,
    "key_norm_weight": 2,
    "logit_bias": 3,
}
# Fields that the weights of one block are made of: they get one batch shape, which bounds may rely on.
WEIGHTS = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o", "query_norm_weight", "key_norm_weight")
ROTATIONS = ("query_rotation", "key_rotation")
NORM_FIELDS = ("query_norm_weight", "key_norm_weight", "norm_eps", "norm_over")
# |c^2 + s^2 - 1| of cosines and sines rounded to bfloat16 is at most 2^-7.9. A block in a wide dtype may hold floats of
# a short one (models compute angles in float32), so this is no check of the last digits: bounds use the norm there is.
ROTATION_TOLERANCE = 2.0**-6


@runtime_checkable
class AttentionFields(Protocol):
    """The fields of `Attention` that are checked. This module knows no class, so that `Attention` may import it."""

    @property
    def x(self) -> Tensor: ...
    @property
    def w_q(self) -> Tensor: ...
    @property
    def w_v(self) -> Tensor: ...
    @property
    def w_o(self) -> Tensor: ...
    @property
    def memory(self) -> Tensor | None: ...
    @property
    def logit_bias(self) -> Tensor | None: ...
    @property
    def query_rotation(self) -> Tensor | None: ...
    @property
    def key_rotation(self) -> Tensor | None: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def norm_eps(self) -> float | None: ...
    @property
    def norm_over(self) -> Any: ...
    @property
    def moves(self) -> str: ...
    @property
    def causal(self) -> bool: ...
    @property
    def queries_at(self) -> Tensor | None: ...
    @property
    def heads(self) -> int: ...
    @property
    def tokens(self) -> int: ...


def check_attention(block: AttentionFields) -> bool:
    """Raise InvalidInput for the first rule that `block` breaks; returns whether a bias of queries, keys or values is
    not zero, which is found out with the rest: whatever is read from the device makes the host wait."""
    present = {name: getattr(block, name) for name in TRAILING if getattr(block, name) is not None}
    _check_types(present)
    _check_norm(block)
    _check_moves(block)
    _check_queries(block)
    _check_shapes(block, present)
    _check_batches(present)
    _check_rotations(block)
    return _check_values(block, present)


def expand_groups(block: AttentionFields, name: str) -> Tensor | None:
    """Repeat a key or value tensor so that it has one entry a query head (grouped-query attention)."""
    tensor = getattr(block, name)
    if tensor is None:
        return None
    dim = -3 if name.startswith("w") else -2
    return (
        tensor.repeat_interleave(block.heads // tensor.shape[dim], dim) if tensor.shape[dim] != block.heads else tensor
    )


def expand_batches(block: AttentionFields) -> dict[str, Tensor]:
    """Those weights and biases that lack batch dimensions of the others, as views that have them."""
    present = {name: tensor for name in WEIGHTS if (tensor := getattr(block, name)) is not None}
    leading = {name: tensor.shape[: -TRAILING[name]] for name, tensor in present.items()}
    common = broadcast_shape(leading.values())
    return {
        name: present[name].expand(*common, *present[name].shape[-TRAILING[name] :])
        for name, shape in leading.items()
        if shape != common
    }


def _check_types(present: dict[str, Tensor]) -> None:
    for name, tensor in present.items():
        if not isinstance(tensor, Tensor):
            raise InvalidInput(f"{name} must be a torch tensor, got {type(tensor).__name__}; use torch.as_tensor.")
        if tensor.dtype not in FLOAT_DTYPES:
            allowed = [str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES]
            hint = "; turn a boolean mask into 0 and -inf" if name == "logit_bias" else ""
            raise InvalidInput(f"{name} must have one of the dtypes {allowed}, got {tensor.dtype}{hint}.")
        if tensor.dim() < TRAILING[name] and name != "logit_bias":
            raise InvalidInput(
                f"{name} must have at least {TRAILING[name]} dimensions, got shape {tuple(tensor.shape)}; "
                "weights have one matrix a head: add a leading dimension for a single head."
            )
    x = present["x"]
    for name, tensor in present.items():
        if tensor.dtype != x.dtype:
            raise InvalidInput(
                f"all tensors must share one dtype, got x={x.dtype} and {name}={tensor.dtype}; cast one."
            )
        if tensor.device != x.device:
            raise InvalidInput(
                f"all tensors must be on one device, got x on {x.device} and {name} on {tensor.device}; move one."
            )
        if (odd := odd_kind(tensor)) is not None:
            raise InvalidInput(f"{name} must be a plain tensor of real numbers, got {odd}; convert it.")


def _check_moves(block: AttentionFields) -> None:
    allowed = ("self",) if block.memory is None else ("query", "memory")
    if block.moves not in allowed:
        kind = "self-attention (memory=None)" if block.memory is None else "cross-attention"
        raise InvalidInput(f"moves must be one of {allowed} for {kind}, got moves={block.moves!r}.")
    if block.causal and block.memory is not None:
        raise InvalidInput(
            "causal=True needs self-attention: a rectangular causal mask has no single convention; "
            "pass the mask you mean as logit_bias (0 and -inf)."
        )
    if block.scale is not None and not (float("-inf") < block.scale < float("inf")):
        raise InvalidInput(f"scale must be finite, got scale={block.scale}; leave it out for 1/sqrt(head width).")


def _check_queries(block: AttentionFields) -> None:
    """`queries_at` must name tokens of self-attention, each once."""
    at = block.queries_at
    if at is None:
        return
    if not isinstance(at, Tensor) or at.dtype != torch.int64 or at.dim() != 1 or not len(at):
        got = f"{at.dtype} of shape {tuple(at.shape)}" if isinstance(at, Tensor) else type(at).__name__
        raise InvalidInput(
            f"queries_at must be a tensor of token numbers, int64 with one dimension and not empty, got {got}; "
            "write torch.tensor([0]) for the first token."
        )
    if block.memory is not None:
        raise InvalidInput("queries_at needs self-attention, got a memory; pass the tokens that have queries as x.")
    if block.causal:
        raise InvalidInput("queries_at needs causal=False; pass the rows of the mask as logit_bias (0 and -inf).")
    if at.device != block.x.device:
        raise InvalidInput(f"queries_at must be on the device of x, {block.x.device}, got {at.device}; move it.")
    numbers, tokens = at.tolist(), block.x.shape[-2]
    if len(set(numbers)) != len(numbers) or not all(0 <= number < tokens for number in numbers):
        raise InvalidInput(
            f"queries_at must name each token at most once, by numbers from 0 to {tokens - 1}, got {numbers[:20]}."
        )


def _check_norm(block: AttentionFields) -> None:
    given = {name: getattr(block, name) for name in NORM_FIELDS}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise InvalidInput(
            f"{', '.join(NORM_FIELDS)} go together, got no {' and no '.join(missing)}; pass all four (weights of ones "
            "where the norm has none), or none."
        )
    if block.norm_over not in NORM_OVER:
        raise InvalidInput(f"norm_over must be one of {NORM_OVER}, got norm_over={block.norm_over!r}.")
    if not 0 < given["norm_eps"] < float("inf"):
        raise InvalidInput(
            f"norm_eps must be finite and above 0, got norm_eps={block.norm_eps}; with 0 the norm of a query that is "
            "zero is not defined."
        )


def _check_shapes(block: AttentionFields, present: dict[str, Tensor]) -> None:
    heads, dim, head_dim = block.w_q.shape[-3:]
    groups, memory_dim, value_dim = block.w_v.shape[-3:]
    out_dim = block.w_o.shape[-1]
    source = block.x if block.memory is None else block.memory
    n, m, tokens = block.tokens, source.shape[-2], block.x.shape[-2]
    if 0 in (tokens, m, heads, groups, head_dim, value_dim, dim, memory_dim, out_dim):
        empty = {name: tuple(tensor.shape) for name, tensor in present.items() if tensor.numel() == 0}
        raise InvalidInput(f"need at least one token, head and feature, got the empty shapes {empty}.")
    if heads % groups:
        raise InvalidInput(
            f"the number of key-value heads must divide the number of query heads, got {groups} and {heads}."
        )
    expected = {
        "x": (tokens, dim),
        "memory": (m, memory_dim),
        "w_q": (heads, dim, head_dim),
        "w_k": (groups, memory_dim, head_dim),
        "w_v": (groups, memory_dim, value_dim),
        "w_o": (heads, value_dim, out_dim),
        "b_q": (heads, head_dim),
        "b_k": (groups, head_dim),
        "b_v": (groups, value_dim),
        "b_o": (out_dim,),
        "query_norm_weight": (heads, head_dim),
        "key_norm_weight": (groups, head_dim),
    }
    if block.query_rotation is not None and block.key_rotation is not None:
        pairs = block.query_rotation.shape[-1]
        expected |= {"query_rotation": (n, 2, pairs), "key_rotation": (m, 2, pairs)}
    if block.memory is None:
        expected["x"] = (tokens, memory_dim) if memory_dim != dim else (tokens, dim)
    for name, shape in expected.items():
        if name in present and tuple(present[name].shape[-len(shape) :]) != shape:
            raise InvalidInput(
                f"{name} must end in the shape {shape} to fit the other tensors, got {tuple(present[name].shape)}."
            )
    if block.logit_bias is not None:
        _check_logit_bias_shape(block.logit_bias, (heads, n, m))


def _check_logit_bias_shape(bias: Tensor, full: tuple[int, int, int]) -> None:
    if bias.dim() < 2 or any(
        size not in (1, need) for size, need in zip(bias.shape[-3:][::-1], full[::-1], strict=False)
    ):
        raise InvalidInput(
            f"logit_bias must broadcast to (heads, queries, keys) = {full}, got {tuple(bias.shape)}; "
            "add a dimension of size 1 for the heads if it has batch dimensions."
        )


def _check_batches(present: dict[str, Tensor]) -> None:
    leading = {name: tensor.shape[: -TRAILING[name]] for name, tensor in present.items()}
    try:
        broadcast_shape(leading.values())
    except ValueError:
        shapes = {name: tuple(shape) for name, shape in leading.items() if shape}
        raise InvalidInput(f"leading batch dimensions must broadcast against each other, got {shapes}.") from None


@torch.no_grad()
def check_finite(tensors: dict[str, Tensor]) -> None:
    """Raise InvalidInput for the first tensor with an entry that is not finite."""
    odd = answers(*(~tensor.isfinite() for tensor in tensors.values()))
    for (name, tensor), strange in zip(tensors.items(), odd, strict=True):
        if strange:
            _check_entries(name, tensor)


@torch.no_grad()
def _check_values(block: AttentionFields, present: dict[str, Tensor]) -> bool:
    biases = [present[name] for name in ("b_q", "b_k", "b_v") if name in present]
    rotations = [name for name in ROTATIONS if name in present]
    # Where the sum is finite, every entry is; one pass, without a second tensor.
    odd = [~tensor.sum().isfinite() for tensor in present.values()]
    wrong = [~(_rotation_error(present[name]) <= ROTATION_TOLERANCE) for name in rotations]
    found = answers(*odd, *wrong, *(bias != 0 for bias in biases), _hidden_rows(block))
    for (name, tensor), strange in zip(present.items(), found, strict=False):
        if strange:
            _check_entries(name, tensor)
    for name, off in zip(rotations, found[len(odd) :], strict=False):
        if off:
            raise InvalidInput(
                f"{name} must hold cosines and sines: c^2 + s^2 = 1 up to {ROTATION_TOLERANCE:g}, got an error of "
                f"{_rotation_error(present[name]).item():.3g}; pass torch.stack([angles.cos(), angles.sin()], -2)."
            )
    if found[-1]:
        raise InvalidInput(
            f"every query must see at least one key, got {int(_hidden_rows(block).sum())} fully masked rows in "
            "logit_bias; drop padded queries from x, or let them see themselves."
        )
    return any(found[len(odd) + len(wrong) : -1])


def _check_entries(name: str, tensor: Tensor) -> None:
    bad = tensor.isnan() | tensor.isposinf() if name == "logit_bias" else ~tensor.isfinite()
    if bool(bad.any()):
        rule = "finite or -inf" if name == "logit_bias" else "finite"
        raise InvalidInput(
            f"{name} must be {rule}, got {int(bad.sum())} of {tensor.numel()} entries that are not; "
            "check the checkpoint or the layer before this one."
        )


def _hidden_rows(block: AttentionFields) -> Tensor:
    """Whether a query sees no key."""
    if block.logit_bias is None:  # a causal mask alone leaves each query itself
        return torch.zeros((), dtype=torch.bool, device=block.x.device)
    mask = block.logit_bias.isneginf()
    if block.causal:
        mask = mask | torch.ones(block.tokens, block.tokens, dtype=torch.bool, device=mask.device).triu(1)
    return mask.all(-1) & torch.ones(block.tokens, dtype=torch.bool, device=mask.device)


def _rotation_error(rotation: Tensor) -> Tensor:
    return (rotation.double().square().sum(-2) - 1).abs().max()


def _check_rotations(block: AttentionFields) -> None:
    if block.query_rotation is None or block.key_rotation is None:
        if block.query_rotation is not None or block.key_rotation is not None:
            got = "query_rotation" if block.key_rotation is None else "key_rotation"
            raise InvalidInput(f"query_rotation and key_rotation go together, got {got} alone; pass both.")
        return
    pairs, width = block.query_rotation.shape[-1], block.w_q.shape[-1]
    if not 1 <= 2 * pairs <= width:
        raise InvalidInput(
            f"query_rotation must have 1 to {width // 2} pairs for queries of width {width}, got {pairs}; pass the "
            "cosine and the sine of each pair once, not of each feature."
        )
