r"""JaSMin, Jacobian Softmax norm Minimization: a penalty on attention maps that lowers the local Lipschitz constant.

Source: Yudin, Gaponov, Kudriashov, Rakhuba 2025 (arXiv 2507.07814). For each row P_i of an attention map the score is

    log g_1(P_i)                 with k = 0,
    log( g_1(P_i) / g_k(P_i) )   with k >= 1,

g_k as in `lipbounds.ops.softmax`. The second is >= 0, small at rows that are nearly uniform on k keys or more and
bounded at rows that are nearly one-hot; the first falls without limit there. The defaults follow a public
reimplementation that cites equations (8) and (9) of the paper: k = 10, the largest row of each head (as in max_i g_1
of Theorem 3), the mean over heads, batch and layers. How the paper itself aggregates, and with which weight, was not
available to us. Rows that see one key are constant and do not count; a head that has no other row contributes 0.

With the largest row of each head nothing else has a gradient: all scores are computed without one, and only the row
that was found is computed again with it; `JaSMin` scores these rows of all layers together. On CUDA the Triton kernel
finds it where it takes the map, and then no map is stored (lipbounds.kernels.jasmin_rows).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lipbounds.capture import operations as ops
from lipbounds.capture.masks import additive
from lipbounds.capture.multi_head import multi_head_arguments, multi_head_logit_inputs
from lipbounds.capture.replay import tensors_in
from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.kernels.jasmin_rows import kernel_scores, kernel_takes
from lipbounds.number_format import counted
from lipbounds.ops.log_g import log_g_1, log_g_ratio, scores
from lipbounds.ops.shapes import broadcast_shape
from lipbounds.targets.attention import Attention


K = 10
REMEMBERED = 64  # softmax results whose use in a product is waited for
AGAIN = "again"  # stands for the names of modules that backward runs
BACKWARD = (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)
EXP = frozenset({torch.exp, torch.Tensor.exp, torch.exp2, torch.Tensor.exp2})
# What leaves a map the map it was, and what may make another of it.
KEEP = ops.DROPOUT | ops.CAST | ops.COPY
CHANGE = ops.REINDEX | ops.MULTIPLY | ops.DIVIDE | ops.ADD | ops.SUBTRACT | ops.FILL | ops.JOIN
PRODUCTS = ops.PRODUCT | ops.OTHER_PRODUCT
WATCHED = ops.FUSED_ATTENTION | ops.MULTI_HEAD_ATTENTION | ops.SOFTMAX | EXP | KEEP | CHANGE | PRODUCTS
Handle = torch.utils.hooks.RemovableHandle
Reduction = Literal["max", "mean"]
Fused = Callable[[], tuple[Tensor, Tensor]] | None  # scores of rows, and which of them count
Function = TypeVar("Function", bound=Callable[..., Any])


def _uncompiled(function: Function) -> Function:
    """Not to be traced by torch.compile: it would compile anew for every layer."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


def jasmin(
    logits: Float[Tensor, "*batch heads n m"],
    *,
    k: int = K,
    over_rows: Reduction = "max",
    over_heads: Reduction = "mean",
    over_batch: Reduction = "mean",
) -> Float[Tensor, ""]:
    """The penalty of one attention layer, a number with a gradient; not a bound.

    Args:
        logits: of the attention map, scaled and with its mask, -inf where a key is hidden; short floats are widened.
        k: 0 for log g_1, otherwise the rank that g_1 is compared with.
        over_rows: how the rows of a head are reduced.
        over_heads: how the heads of a batch item are reduced.
        over_batch: how the batch items are reduced.

    Raises:
        InvalidInput: an option is unknown, k is negative, or the logits have fewer than three dimensions.
    """
    _check(k, over_rows=over_rows, over_heads=over_heads, over_batch=over_batch)
    if logits.dim() < 3:
        raise InvalidInput(f"logits must have the shape (*batch, heads, n, m), got {tuple(logits.shape)}.")
    rows = _counting(k, over_rows, lambda chosen: _rows(logits, chosen))
    return _reduced(_reduced(_of_heads(rows, k, over_rows), over_heads, -1).flatten(), over_batch, 0)


def jasmin_of(block: Attention, *, k: int = K, over_rows: Reduction = "max", over_heads: Reduction = "mean") -> Tensor:
    """The penalty of a captured attention block, for each of its batch items.

    Args:
        block: the block.
        k: as in `jasmin`.
        over_rows: as in `jasmin`.
        over_heads: as in `jasmin`.

    Raises:
        InvalidInput: as `jasmin`.
    """
    _check(k, over_rows=over_rows, over_heads=over_heads)
    rows = _counting(k, over_rows, lambda chosen: _rows(block.logits, chosen))
    return _reduced(_of_heads(rows, k, over_rows), over_heads, -1)


class JaSMin(TorchFunctionMode):
    """Collects the penalty of the attention layers of a model while it runs inside the `with` block.

        with JaSMin(model) as reg:
            loss = task_loss(model(inputs), targets) + weight * reg.penalty()
            loss.backward()

    Attention is found where it is computed: `scaled_dot_product_attention` (Hugging Face with its default
    implementation), `nn.MultiheadAttention`, and `softmax(...) @ v` written out. A map that was written out with exp,
    or changed after its softmax, is refused by `penalty`. Keep `backward` inside the block where
    activations are checkpointed: the layers run again then, and must be watched again.

    Over 150 lines, because torch has one hook for all calls, and the penalty is a state of the run.

    Args:
        model: the model; a module made by torch.compile will do.
        k: as in `jasmin`.
        layers: numbers of the layers that count, from 0 in the order of their first call; None for all.
        over_rows: as in `jasmin`.
        over_heads: as in `jasmin`.
        over_batch: as in `jasmin`.
        over_layers: how the layers, and the forward passes since the last `penalty`, are reduced.

    Raises:
        InvalidInput: an option is unknown, k is negative, or `model` is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        k: int = K,
        layers: Collection[int] | None = None,
        over_rows: Reduction = "max",
        over_heads: Reduction = "mean",
        over_batch: Reduction = "mean",
        over_layers: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check(k, over_rows=over_rows, over_heads=over_heads, over_batch=over_batch, over_layers=over_layers)
        if not isinstance(model, nn.Module):
            raise InvalidInput(
                f"model must be a torch.nn.Module, got {type(model).__name__}; wrap the function in one."
            )
        self.model, self.k, self.layers = model, k, None if layers is None else frozenset(layers)
        self.over_rows: Reduction = over_rows
        self.over_heads: Reduction = over_heads
        self.over_batch: Reduction = over_batch
        self.over_layers: Reduction = over_layers
        self._found: list[Tensor] = []
        # Maps and their logits; None where what was computed is no softmax any more, or never was one.
        self._maps: deque[tuple[Tensor, Tensor | None]] = deque(maxlen=REMEMBERED)
        self._missed = 0
        # Names of the modules that are running ("" is the model), and of those that have computed attention, in order.
        self._running: list[str] = []
        self._numbers: dict[str, int] = {}
        self._seen = 0
        self._handles: list[Handle] = []
        self._backward = False

    def penalty(self) -> Float[Tensor, ""]:
        """The penalty of the forward passes since the last call of this method.

        Raises:
            InvalidInput: no attention layer was seen, or none with a gradient where gradients are enabled.
            Unsupported: some attention was computed in a way that is not known, and `layers` does not name what counts.
        """
        self._maps.clear()
        found, self._found = self._found, []
        missed, self._missed = self._missed, 0
        if missed and self.layers is None:
            raise Unsupported(
                f"model must compute all attention in ways that JaSMin knows, got {counted(len(found), 'layer')} that "
                f"count and {counted(missed, 'product')} with a map that is no plain softmax (written out with "
                "exp, or changed after the softmax); use scaled_dot_product_attention or softmax(...) @ v, "
                "or name the layers that count with layers=, which leaves the others out."
            )
        if not found:
            kept = "" if self.layers is None else f", and layers={sorted(self.layers)} to name some of its layers"
            raise InvalidInput(
                f"model must compute attention inside the `with` block before penalty() is called{kept}, got "
                f"{len(self._numbers) or self._seen} attention layers; run the model first, and do not let it hide "
                "attention in a kernel of its own (transformers: attn_implementation='sdpa' or 'eager')."
            )
        trained = any(parameter.requires_grad for parameter in self.model.parameters())
        if torch.is_grad_enabled() and trained and not any(score.requires_grad for score in found):
            raise InvalidInput(
                "model must run with gradients, got attention without any; where activations are checkpointed, "
                "pass use_reentrant=False."
            )
        return _reduced(self._of_layers(found), self.over_layers, 0)

    def __enter__(self) -> JaSMin:
        self._found, self._running, self._numbers, self._seen, self._missed = [], [], {}, 0, 0
        # Which layer it is matters for `layers` alone. Other hooks would cost compiled models more than they give.
        watched = [("", self.model)] if self.layers is None else self.model.named_modules()
        self._handles = self._watch(watched)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._maps.clear()
        _remove(self._handles)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one torch function and, if it is attention, take its penalty."""
        kwargs = kwargs or {}
        if func in BACKWARD:
            return self._watch_again(func, args, kwargs)
        result = func(*args, **kwargs)
        if func not in WATCHED:
            return result
        if func in ops.FUSED_ATTENTION:
            self._fused(*args, **kwargs)
        elif func in ops.MULTI_HEAD_ATTENTION:
            self._multi_head(args, kwargs)
        elif func in ops.SOFTMAX or func in EXP:
            self._may_be_a_map(func, args[0] if args else kwargs["input"], result)
        elif self._maps and (func in KEEP or func in CHANGE):
            self._follow(func, args, result)
        elif self._maps and func in PRODUCTS:
            self._eager(func, args)
        return result

    @_uncompiled
    def _watch_again(self, backward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run backward, which runs checkpointed layers again; a mode is off while it handles a call, such as this."""
        self._backward = True
        watched = []
        if self.layers is None:
            watched.append(register_module_forward_pre_hook(partial(self._enter_module, AGAIN)))
            watched.append(register_module_forward_hook(self._leave_module, always_call=True))
        try:
            return backward(*args, **kwargs)
        finally:
            self._backward = False
            _remove(watched)

    # -- the three ways in which models compute attention ---------------------------------------------------------

    @_uncompiled
    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        del value, dropout_p
        mask = None if attn_mask is None else additive(attn_mask, _wide(query.dtype))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        self._take(query, key, factor, mask, causal=is_causal, grouped=enable_gqa)

    @_uncompiled
    def _multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key, mask = multi_head_logit_inputs(multi_head_arguments(args, kwargs))
        self._take(query, key, query.shape[-1] ** -0.5, mask)

    def _may_be_a_map(self, func: Callable[..., Any], logits: Tensor, result: Tensor) -> None:
        """A softmax, or the exponentials that one may be written out with; of one item without heads it is none."""
        if result.dim() >= 3:
            self._maps.append((result, logits if func in ops.SOFTMAX else None))

    @_uncompiled
    def _eager(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """A product whose left factor is the result of a softmax over its last dimension: the map times the values."""
        factors = tensors_in(args)
        used = next((pair for pair in self._maps if any(factor is pair[0] for factor in factors)), None)
        if used is None:
            return
        self._maps = deque((pair for pair in self._maps if pair is not used), maxlen=REMEMBERED)
        table, logits = used
        if logits is None and any(isinstance(factor, nn.Parameter) for factor in factors):
            return  # a layer with weights: exp and the softmax of experts are no maps there
        if logits is None or func not in ops.PRODUCT or args[0] is not table:
            self._missed += "" in self._running
            return
        logits = additive(logits, logits.dtype)  # models write the most negative float for -inf
        self._keep(lambda chosen: _rows(logits, chosen))

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        """Dropout and casts of a map are still that map; entries that were moved, scaled or shifted are not."""
        given = tensors_in(args)
        for known, logits in list(self._maps):
            if any(tensor is known for tensor in given) and result is not known and isinstance(result, Tensor):
                same = func in KEEP and args[0] is known
                self._maps.append((result, logits if same else None))

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _watch(self, modules: Iterable[tuple[str, nn.Module]]) -> list[Handle]:
        handles = []
        for name, module in modules:
            handles.append(module.register_forward_pre_hook(partial(self._enter_module, name)))
            handles.append(module.register_forward_hook(self._leave_module, always_call=True))
        return handles

    def _enter_module(self, name: str, *_: Any) -> None:
        if self._backward and not self._running:
            super().__enter__()
        self._running.append(name)

    def _leave_module(self, *_: Any) -> None:
        self._running.pop()
        if self._backward and not self._running:
            super().__exit__(None, None, None)

    def _counts(self) -> bool:
        """Whether the layer that is running is one of those asked for."""
        self._seen += 1
        if self.layers is None or not self._running:
            return self.layers is None
        return self._numbers.setdefault(self._running[-1], len(self._numbers)) in self.layers

    def _take(
        self,
        query: Tensor,
        key: Tensor,
        scale: float,
        mask: Tensor | None,
        *,
        causal: bool = False,
        grouped: bool = False,
    ) -> None:
        with torch.autocast(query.device.type, enabled=False):
            fused = None
            if kernel_takes(query, key, self.k, mask, causal=causal):
                fused = partial(kernel_scores, query, key, scale, self.k, mask, causal=causal)
            if grouped:
                key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            wide, key = _wide(query.dtype), key.to(_wide(key.dtype))
            if mask is not None:
                mask = mask.expand(*broadcast_shape((mask.shape[:-1], query.shape[:-1])), mask.shape[-1])

            def logits(chosen: Tensor | None) -> Tensor:
                rows = _rows(query, chosen).to(wide) * scale
                # Of one row a sum of products, whose gradient is cheaper than that of many small matrix products.
                product = rows @ key.mT if chosen is None else (rows * key).sum(-1).unsqueeze(-2)
                if mask is not None:
                    product = product + _rows(mask, chosen)
                return _without_later(product, chosen) if causal else product

            self._keep(logits, fresh=True, fused=fused)

    def _keep(self, logits: Callable[[Tensor | None], Tensor], fresh: bool = False, fused: Fused = None) -> None:
        if not self._counts():
            return
        rows = _counting(self.k, self.over_rows, logits, fresh, fused)
        # Other models do not count, nor do layers that backward runs again: those must save the same, no more.
        if "" in self._running:
            self._found.append(rows)

    def _of_layers(self, found: list[Tensor]) -> Float[Tensor, " layers"]:
        """The score of each layer, of all that are alike at once: the operations are many and small."""
        alike: dict[Any, list[Tensor]] = {}
        for rows in found:
            alike.setdefault((rows.shape, rows.dtype, rows.device), []).append(rows)
        with torch.autocast(found[0].device.type, enabled=False):
            heads = [_of_heads(torch.stack(layers), self.k, self.over_rows) for layers in alike.values()]
            scores = [_reduced(_reduced(each, self.over_heads, -1).flatten(1), self.over_batch, 1) for each in heads]
            return torch.cat(scores)


def _remove(handles: list[Handle]) -> None:
    while handles:
        handles.pop().remove()


def _counting(
    k: int,
    over_rows: Reduction,
    logits: Callable[[Tensor | None], Float[Tensor, "*batch heads rows m"]],
    fresh: bool = False,
    fused: Fused = None,
) -> Tensor:
    """What the score of each head is made of: the logits of its largest row, or the mean over its rows.

    Args:
        k: as in `jasmin`.
        over_rows: as in `jasmin`.
        logits: gives the logits of one row of each head, or of all rows for None.
        fresh: whether it makes them anew, so that they may be overwritten.
        fused: gives the score of each row, and whether it counts, without the logits; None where nothing can.
    """
    if over_rows == "mean":
        if fused is None:
            table = logits(None)
            found, counts = _scores(table, k), (table > -torch.inf).sum(-1) > 1
        else:
            found, counts = fused()
        return torch.where(counts, found, 0.0).sum(-1) / counts.sum(-1).clamp(min=1)
    with torch.no_grad():
        if fused is None:
            table = logits(None)
            found = scores(table.to(_wide(table.dtype), copy=not fresh), k)
        else:
            found, _ = fused()
        chosen = found.argmax(-1, keepdim=True)
    return logits(chosen).squeeze(-2)


def _of_heads(counting: Tensor, k: int, over_rows: Reduction) -> Float[Tensor, "*batch heads"]:
    """Score of each head, from what `_counting` gives."""
    if over_rows == "mean":
        return counting
    found = _scores(counting, k)
    return torch.where(found.isfinite(), found, 0.0)


def _scores(logits: Tensor, k: int) -> Tensor:
    wide = logits.to(_wide(logits.dtype))
    return log_g_1(wide) if k == 0 else log_g_ratio(wide, k)


def _rows(table: Tensor, chosen: Tensor | None) -> Tensor:
    """One row of each head, or all of them."""
    return table if chosen is None else table.take_along_dim(chosen.unsqueeze(-1), -2)


def _without_later(table: Tensor, chosen: Tensor | None) -> Tensor:
    """The causal mask of torch: row i sees the keys 0 .. i, counted from the first key."""
    rows, keys = table.shape[-2:]
    places = torch.arange(rows, device=table.device) if chosen is None else chosen
    return table.masked_fill(torch.arange(keys, device=table.device) > places.unsqueeze(-1), -torch.inf)


def _reduced(values: Tensor, how: Reduction, dim: int) -> Tensor:
    return values.amax(dim) if how == "max" else values.mean(dim)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(k: int, **reductions: str) -> None:
    if k < 0:
        raise InvalidInput(f"k must be 0 or a rank of at least 1, got k={k}.")
    for name, how in reductions.items():
        if how not in ("max", "mean"):
            raise InvalidInput(f"{name} must be 'max' or 'mean', got {name}={how!r}.")
