"""A copy of a module of another's making, in another dtype if need be, which leaves the original alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lipbounds.errors import Unsupported


Module = TypeVar("Module", bound=nn.Module)


class _CopyTensors(TorchFunctionMode):
    """Copies the tensors that `copy.deepcopy` meets, wherever they hang.

    torch refuses to copy results of a computation that gradients flow through, and modules hold such results: attention
    maps that were kept, and the weights that torch.nn.utils.weight_norm, spectral_norm and pruning work out before each
    call. Their copies are constants, which the next call replaces.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            made = tensor.detach().clone()
            made = made.to(self._dtype) if self._dtype is not None and made.is_floating_point() else made
            memo[id(tensor)] = made.requires_grad_(tensor.requires_grad and tensor.is_leaf)
        return memo[id(tensor)]


def module_copy(module: Module, dtype: torch.dtype | None = None) -> Module:
    """A copy of `module` in evaluation mode; in another dtype it is the same function up to rounding, where it can be.

    Args:
        module: any module.
        dtype: of all its floating-point tensors, also of those that are neither parameters nor buffers; None: as they
            are, and then the parameters are shared, not copied.

    Raises:
        Unsupported: it holds something that cannot be copied.
    """
    shared = {} if dtype is not None else {id(parameter): parameter for parameter in module.parameters()}
    try:
        with torch.inference_mode(False), _CopyTensors(dtype):
            made = copy.deepcopy(module, shared)
    except Exception as error:  # whatever the objects that hang on a module raise
        raise Unsupported(
            f"the module must be one that copy.deepcopy can copy, got {type(module).__name__}, which raised "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; take off what cannot be "
            "copied, or pass a function that calls the module."
        ) from error
    if dtype is None:
        return made.eval()
    _keep_epsilon(module, made)
    return made.to(dtype).eval()


def _keep_epsilon(module: nn.Module, made: nn.Module) -> None:
    """nn.RMSNorm(eps=None) adds the eps of the dtype it runs in: in float64 it would be another function."""
    of_model = next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)
    for old, new in zip(module.modules(), made.modules(), strict=True):
        if isinstance(old, nn.RMSNorm) and isinstance(new, nn.RMSNorm) and old.eps is None:
            weight = getattr(old, "weight", None)
            runs_in = of_model if weight is None else weight.dtype
            new.eps = torch.finfo(torch.float32).eps if runs_in == torch.float32 else None
