"""Any differentiable torch function at one input: the target for whole networks.

Both products with the Jacobian come from one recorded graph: `vjp` is reverse mode, and `jvp` is reverse mode through
it, since u -> J^T u is linear and its transpose is J. Forward mode was tried and left out: it fails on the fused
attention kernels, on the fast path of nn.TransformerEncoderLayer, and its rules for the plain kernels go through the
deprecated torch.jit. Reverse mode twice works for all of those once the plain kernels are selected, which is done here.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lipbounds.claims import Feature
from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.targets._attention_checks import FLOAT_DTYPES
from lipbounds.targets.derivative_check import check_derivative


_RULE = "the function must be differentiable twice in reverse mode, and its weights must stay as they were at first use"
_REMEDY = (
    "Replace the operation at fault (often torch.compile, a custom kernel or a reentrant checkpoint), "
    "or build a new Network after a change of weights."
)


@dc.dataclass(frozen=True, slots=True)
class _Graph:
    """x -> y and u -> J^T u, recorded once; the second is linear in u, so recording it at u = 0 loses nothing.

    `checked` says of each batch item whether the Jacobian was seen to be the derivative of the function.
    """

    x: Tensor
    y: Tensor
    u: Tensor
    pulled_back: Tensor
    checked: Tensor


@dc.dataclass(frozen=True, eq=False)
class Network:
    """A torch function at one input, with products with its Jacobian.

    With `batch_dims` > 0 the leading dimensions hold independent items: output item i must depend on input item i
    alone. Products with random covectors check it; it is false for batch normalisation in training mode, and for an
    input without a batch dimension.

    At the first use the function is run in the precision of `x` and of its weights, with gradients enabled, the plain
    attention kernels selected and the fast path of torch.nn off; both settings are restored, and the buffers of a
    module are left alone. One run is recorded, and four or more others compare its Jacobian with difference quotients
    (lipbounds.targets.derivative_check). A module whose weights have changed in place since then needs a new Network.

    Args:
        function: an nn.Module or any callable that takes `x` and returns one tensor; wrap a model with several
            outputs, such as `lambda e: model(inputs_embeds=e).last_hidden_state`.
        x: the input; finite floating point.
        batch_dims: number of leading dimensions of `x` that are batch; 0: the whole input is one point.

    Raises:
        InvalidInput: `x` is not a finite, non-empty floating tensor, or `batch_dims` does not fit it; at the first
            use: the output is not a finite floating tensor with the same batch dimensions, or is cut off from `x`; an
            item of the output depends on other items of `x`.
        Unsupported: at the first use: an operation of the function cannot be differentiated twice; its gradient is not
            its derivative; two runs at `x` differ, as with dropout in training mode.
    """

    function: Callable[[Tensor], Tensor]
    x: Float[Tensor, "..."]
    batch_dims: int = 0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InvalidInput(f"function must be callable, got {type(self.function).__name__}; pass an nn.Module.")
        _check_floating("x", self.x)
        if not 0 <= self.batch_dims <= self.x.dim():
            raise InvalidInput(
                f"batch_dims must be between 0 and the {self.x.dim()} dimensions of x, got "
                f"batch_dims={self.batch_dims} and x of shape {tuple(self.x.shape)}."
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def moving_input(self) -> Tensor:
        """The input that the Lipschitz constant is about."""
        return self.x

    @property
    def batch_shape(self) -> torch.Size:
        return self.x.shape[: self.batch_dims]

    @property
    def derivative_checked(self) -> Bool[Tensor, "..."]:
        """For each batch item, whether difference quotients agree with the Jacobian in one random direction.

        False: they are too uncertain to tell, as at a kink or where the output does not move but for rounding.
        """
        return self._graph.checked

    @property
    def detached(self) -> Network:
        """Itself: no product with its Jacobian carries a gradient."""
        return self

    @property
    def features(self) -> frozenset[Feature]:
        """None: the features that bounds declare are those of attention blocks."""
        return frozenset()

    def forward(self) -> Float[Tensor, "..."]:
        """The output at `x`, detached."""
        return self._graph.y.detach()

    def at(self, moving: Float[Tensor, "..."]) -> Network:
        """The same function at another input."""
        return dc.replace(self, x=moving)

    def jvp(self, tangent: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Jacobian times `tangent`, shaped like `x`; extra leading dimensions are directions.

        Raises:
            InvalidInput: `tangent` does not end in the shape of `x`, or is not finite and of its dtype.
        """
        graph = self._graph
        _check_direction("tangent", tangent, graph.x)
        return _each(graph.pulled_back, graph.u, tangent)

    def vjp(self, cotangent: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Transposed Jacobian times `cotangent`, shaped like the output; extra leading dimensions are directions.

        Raises:
            InvalidInput: `cotangent` does not end in the shape of the output, or is not finite and of its dtype.
        """
        graph = self._graph
        _check_direction("cotangent", cotangent, graph.y)
        return _each(graph.y, graph.x, cotangent)

    @cached_property
    def _graph(self) -> _Graph:
        with plain_kernels():
            x = self.x.detach().clone().requires_grad_()
            y = detached_call(self.function)(x)
            _check_output(y, x, self.batch_dims)
            u = torch.zeros_like(y, requires_grad=True)
            pulled_back = _gradient(y, x, u, create_graph=True)
            if pulled_back is None:
                raise InvalidInput(
                    "the output must depend on x through recorded operations, got an output cut off from x; "
                    "remove torch.no_grad() or detach() inside the function."
                )
            _check_adjoint(x, y, u, pulled_back)
            _check_items(x, y, self.batch_dims)
            generator = torch.Generator().manual_seed(1)
            v = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=generator.device).to(x)
            checked = check_derivative(
                detached_call(self.function),
                self.x.detach(),
                v,
                _gradient_or_zero(pulled_back, u, v),
                batch_dims=self.batch_dims,
            )
        return _Graph(x, y, u, pulled_back, checked)


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Gradients on, and only attention kernels that can be differentiated twice; all settings restored on exit."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def detached_call(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`function`, and for a module the same with constant parameters and, at each call, with copies of its buffers."""
    if not isinstance(function, nn.Module):
        return function
    # clone: tensors made under inference_mode cannot be recorded, and running averages must not move.
    weights = {name: p.detach().clone() if p.is_inference() else p.detach() for name, p in function.named_parameters()}

    def call(x: Tensor) -> Tensor:
        buffers = {name: buffer.detach().clone() for name, buffer in function.named_buffers()}
        return torch.func.functional_call(function, {**weights, **buffers}, (x,))

    return call


def _each(output: Tensor, source: Tensor, directions: Tensor) -> Tensor:
    """The gradient of `output` at `source` for each of the leading `directions`.

    A plain loop: vmap over a recorded graph needs a batching rule for every operation in it.
    """
    extra = directions.shape[: directions.dim() - output.dim()]
    flat = directions.detach().reshape(math.prod(extra), *output.shape)
    with plain_kernels():
        rows = [_gradient_or_zero(output, source, direction) for direction in flat]
    stacked = torch.stack(rows) if rows else source.new_zeros(0, *source.shape)
    return stacked.detach().reshape(*extra, *source.shape)


def _gradient(output: Tensor, source: Tensor, direction: Tensor, create_graph: bool = False) -> Tensor | None:
    """Gradient of <output, direction> at `source`; None where the two are not connected."""
    if not output.requires_grad:
        return None
    try:
        return torch.autograd.grad(
            output, source, direction, retain_graph=True, create_graph=create_graph, allow_unused=True
        )[0]
    except RuntimeError as error:
        raise Unsupported(f"{_RULE}; torch says: {str(error).splitlines()[0]} {_REMEDY}") from error


def _gradient_or_zero(output: Tensor, source: Tensor, direction: Tensor) -> Tensor:
    gradient = _gradient(output, source, direction)
    return torch.zeros_like(source) if gradient is None else gradient


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise InvalidInput(f"{name} must be one torch tensor, got {type(tensor).__name__}; wrap the function to fit.")
    if tensor.dtype not in FLOAT_DTYPES:
        raise InvalidInput(
            f"{name} must be real floating point, got {tensor.dtype}; for token numbers, start at the embeddings."
        )
    if tensor.numel() == 0:
        raise InvalidInput(f"{name} must not be empty, got shape {tuple(tensor.shape)}.")
    bad = int((~tensor.detach().isfinite()).sum())
    if bad:
        raise InvalidInput(
            f"{name} must be finite, got {bad} of {tensor.numel()} entries that are not; check the input."
        )


def _check_direction(name: str, direction: Tensor, like: Tensor) -> None:
    if not isinstance(direction, Tensor) or direction.dtype != like.dtype:
        got = direction.dtype if isinstance(direction, Tensor) else type(direction).__name__
        raise InvalidInput(f"{name} must be a tensor of dtype {like.dtype}, got {got}; cast it.")
    if direction.shape[max(direction.dim() - like.dim(), 0) :] != like.shape:
        raise InvalidInput(f"{name} must end in the shape {tuple(like.shape)}, got {tuple(direction.shape)}.")
    if not bool(direction.isfinite().all()):
        raise InvalidInput(f"{name} must be finite, got {int((~direction.isfinite()).sum())} entries that are not.")


def _check_output(y: Tensor, x: Tensor, batch_dims: int) -> None:
    _check_floating("the output of function", y)
    if y.shape[:batch_dims] != x.shape[:batch_dims]:
        raise InvalidInput(
            f"the output must keep the batch dimensions {tuple(x.shape[:batch_dims])} of x, "
            f"got shape {tuple(y.shape)}; give x a batch dimension (x[None] for one input), lower "
            f"batch_dims={batch_dims}, or return one output per item."
        )


def _check_items(x: Tensor, y: Tensor, batch_dims: int) -> None:
    """Refuse a function in which one half of the items moves the outputs of the other half, in either direction."""
    items = math.prod(x.shape[:batch_dims])
    if items < 2:
        return
    generator = torch.Generator().manual_seed(2)
    c = torch.randn(y.shape, generator=generator, dtype=torch.float32, device=generator.device).to(y)
    first = torch.arange(items, device=x.device) < items // 2
    for chosen in (first, ~first):
        kept = chosen.reshape(x.shape[:batch_dims] + (1,) * (y.dim() - batch_dims))
        moved = _gradient_or_zero(y, x, c * kept).double().reshape(items, -1)
        inside, leaked = (torch.linalg.vector_norm(moved[part]) for part in (chosen, ~chosen))
        if not bool(leaked <= 1e3 * torch.finfo(y.dtype).eps * inside):
            raise InvalidInput(
                f"each of the {items} items along the first {batch_dims} dimensions of x, of shape {tuple(x.shape)}, "
                "must give its own output alone, got outputs that depend on other items; give x a batch dimension "
                "(x[None] for one input), pass batch_dims=0 for one constant of all of x, or call model.eval()."
            )


def _check_adjoint(x: Tensor, y: Tensor, u: Tensor, pulled_back: Tensor) -> None:
    """Compare both products once: a backward rule that is itself cut off gives a wrong `jvp` without an error."""
    generator = torch.Generator().manual_seed(0)
    t, c = (
        torch.randn(z.shape, generator=generator, dtype=torch.float32, device=generator.device).to(z) for z in (x, y)
    )
    forward = _gradient_or_zero(pulled_back, u, t)
    c = forward if bool(forward.any()) else c
    backward = _gradient_or_zero(y, x, c)
    one, other = (float((a.detach().double() * b.detach().double()).sum()) for a, b in ((forward, c), (t, backward)))
    tolerance = 0.1 if torch.finfo(t.dtype).eps > 1e-4 else 1e-2
    if not abs(one - other) <= tolerance * max(abs(one), abs(other)):
        raise Unsupported(f"{_RULE}; got <Jt, c> = {one:.6g} and <t, J^T c> = {other:.6g}, which must agree. {_REMEDY}")
