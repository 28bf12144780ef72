r"""A pretend accelerator: code is proved to be right on a device of its own, on a machine that has none.

Tensors on the device `pretend:0` compute on the CPU, with its numbers, and behave as those of CUDA where it matters:

- an operation on tensors of both devices is refused, but for pointwise ones with a CPU tensor without dimensions,
  indices and copies, as CUDA does it; so is a CPU generator for random numbers on the device;
- a tensor that is made without `device=` is on the CPU, one that is made with it on the device;
- `.numpy()` is refused; products of matrices of integers are, which CUDA has no kernels for;
- whatever makes the host wait for the device is seen by `synchronisations`: scalars that leave (`item`, `bool`,
  `tolist`), copies between the devices, results whose size depends on the data, and the status of factorisations.

It is the backend of torch for devices that it does not know (`PrivateUse1`), so that factory functions, automatic
differentiation, `torch.func` and `torch.nn.Module.to` go the way that they go on an accelerator. Two things it cannot
show: kernels that round in another way, and memory.
"""

from __future__ import annotations

import dataclasses as dc
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jaxtyping
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

from lipbounds.errors import Unsupported


NAME = "pretend"
Kind = Literal["scalar", "to host", "to device", "size", "status"]
aten = torch.ops.aten
READ = (aten._local_scalar_dense.default, aten.equal.default, aten.allclose.default, aten.is_nonzero.default)
SIZES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")  # chosen by the data
STATUS = ("_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig", "_linalg_eigvals", "linalg_lstsq")
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
MATRIX_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "dot", "mv", "addmv")
OWN_FILES = (__file__, str(Path(torch.__file__).parent), str(Path(jaxtyping.__file__).parent))


@dc.dataclass(frozen=True)
class Synchronisation:
    """One time at which the host waits for the device.

    Args:
        kind: `scalar`, a number that leaves; `to host` and `to device`, copies; `size`, a result whose size depends on
            the data; `status` of a factorisation.
        operation: of torch.
        where: the line of the code that called torch, `file:line`.
    """

    kind: Kind
    operation: str
    where: str


_KEPT: list[Any] = []  # libraries of kernels: one that is collected takes its kernels away
_WATCHERS: list[list[Synchronisation]] = []


@contextmanager
def synchronisations() -> Iterator[list[Synchronisation]]:
    """The list of the times at which the host waited for the pretend device, filled while the context is open.

    As `torch.cuda.set_sync_debug_mode` counts them: a copy counts, in both directions, unless it is `non_blocking`.
    """
    seen: list[Synchronisation] = []
    _WATCHERS.append(seen)
    try:
        yield seen
    finally:
        _WATCHERS[:] = [watcher for watcher in _WATCHERS if watcher is not seen]


def pretend_device() -> torch.device:
    """The pretend accelerator, `pretend:0`, which is made known to torch by the first call in a process.

    Call it before the first backward pass of the process, in a conftest.py, say: torch then fixes its devices.

    Raises:
        Unsupported: torch is too old, another backend has its place, or there was a backward pass.
    """
    _register()
    device = torch.device(NAME, 0)
    probe = torch.ones(1, dtype=torch.float32, device=device, requires_grad=True)
    try:
        torch.autograd.grad(probe * probe, probe, torch.ones_like(probe))
    except RuntimeError as error:
        raise Unsupported(
            "pretend_device must be called before the first backward pass of a process, which fixes the devices that "
            "torch knows; call it in a conftest.py."
        ) from error
    return device


class PretendTensor(Tensor):
    """A tensor on the pretend device: `raw` on the CPU, and what torch knows about it."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, raw: Tensor) -> PretendTensor:
        """Wrap a CPU tensor without copying it."""
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on the CPU."""
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        """As for every tensor; one that is assigned replaces what is behind this one, too."""
        return Tensor.data.__get__(self)  # pyright: ignore[reportAttributeAccessIssue]

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # pyright: ignore[reportAttributeAccessIssue]
        self.raw = value.raw  # pyright: ignore[reportAttributeAccessIssue] - torch refuses what is on the CPU

    def tolist(self) -> Any:
        """As a list of Python numbers, which waits for the device."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused without `force`, as for CUDA."""
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")
        return self.detach().cpu().numpy()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def __repr__(self, *, tensor_contents: str | None = None) -> str:
        return f"{self.raw!r} on {self.device}"


class _Module:
    """What torch asks about a device, as `torch.cuda` answers it."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)  # random numbers come from the generator of the CPU
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
    _is_in_bad_fork = staticmethod(lambda: False)


@functools.cache
def _register() -> None:
    """Make the backend known to torch, once: there is no way back."""
    register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if register is None:
        raise Unsupported(f"pretend_device needs torch 2.10 or newer, got {torch.__version__}.")
    try:
        register(NAME, _Module())
    except RuntimeError as error:
        raise Unsupported(
            f"pretend_device needs torch's place for one more backend, which is taken: {error}"
        ) from error
    everything, copies = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    copies.impl("_copy_from", lambda source, to, wait_not=False: _copy(to, source, wait_not), "PrivateUse1")
    _KEPT.extend((everything, copies))


@dc.dataclass(frozen=True)
class _Operation:
    """What is asked about an operation of torch at every call."""

    name: str
    aliases: bool
    pointwise: bool
    writes: bool
    resizes: bool


@functools.cache
def _operation(func: Any) -> _Operation:
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    return _Operation(
        name=name,
        aliases=any(value.alias_info is not None for value in (*schema.arguments, *schema.returns)),
        pointwise=torch.Tag.pointwise in func.tags or name in ("where", "fill_", "masked_fill", "masked_fill_", "lerp"),
        writes=name.endswith("_") and not name.endswith("__"),
        resizes=name.startswith("resize") or any(value.is_out for value in schema.arguments),
    )


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation with tensors on the device or with `device=` it: on the CPU, after the checks of an accelerator."""
    if func is aten.copy_.default:
        return _copy(*args, **kwargs)
    known = _operation(func)
    target = kwargs.get("device")
    here = torch.device(target).type if target is not None else NAME
    raw = _unwrapped(args, known), {name: _unwrapped(value, known) for name, value in kwargs.items()}
    if target is not None:
        raw[1]["device"] = torch.device("cpu")
    _refuse(known, args, raw, here)
    _watch(func, known, args, raw[0], here)
    result = func(*raw[0], **raw[1])
    if here == "cpu" or func in READ:
        return result
    if known.resizes:
        for each in (*args, *kwargs.values()):
            if isinstance(each, PretendTensor) and each.shape != each.raw.shape:
                each.data = PretendTensor(each.raw)
    result = _wrapped(result)
    return return_and_correct_aliasing(func, args, kwargs, result) if known.aliases else result


def _copy(to: Tensor, source: Tensor, wait_not: bool = False) -> Tensor:
    """`to.copy_(source)`, between the devices or on one."""
    ours = isinstance(to, PretendTensor), isinstance(source, PretendTensor)
    if ours[0] != ours[1] and not wait_not:
        _saw("to host" if ours[1] else "to device", "copy_")
    (to.raw if isinstance(to, PretendTensor) else to).copy_(source.raw if isinstance(source, PretendTensor) else source)
    return to


def _unwrapped(value: Any, known: _Operation, depth: int = 0) -> Any:
    """The tensors of the CPU behind those of the device; those that were on the CPU must be allowed there."""
    if isinstance(value, PretendTensor):
        return value.raw
    if isinstance(value, Tensor):
        may_mix = (value.dim() == 0 and (known.pointwise or known.name in INDEXED)) or (
            depth > 0 and known.name in INDEXED
        )
        if not may_mix and known.name != "_to_copy":
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
                f"{value.device}! (a tensor of shape {tuple(value.shape)} in {known.name})"
            )
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_unwrapped(item, known, depth + 1) for item in value)
    return value


def _wrapped(result: Any) -> Any:
    if isinstance(result, Tensor):
        return PretendTensor(result)
    if isinstance(result, (list, tuple)):
        return type(result)(_wrapped(item) for item in result)  # the named tuples of operations come as tuples
    return result


def _refuse(known: _Operation, args: tuple[Any, ...], raw: tuple[tuple[Any, ...], dict[str, Any]], here: str) -> None:
    """What the CPU can do and an accelerator cannot."""
    generator = raw[1].get("generator")
    if generator is not None and here == NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    if args and isinstance(args[0], Tensor) and not isinstance(args[0], PretendTensor):
        if known.name in INDEXED:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if known.writes:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {known.name} changes one on cpu!")
    if known.name in MATRIX_PRODUCTS and not (raw[0][0].is_floating_point() or raw[0][0].is_complex()):
        raise RuntimeError(f'"{known.name}" not implemented for {raw[0][0].dtype} on {NAME}: CUDA has no such kernel')


def _watch(func: Any, known: _Operation, args: tuple[Any, ...], raw: tuple[Any, ...], here: str) -> None:
    """Tell the watchers of what the host waits for."""
    if not _WATCHERS:
        return
    if func in READ:
        _saw("scalar", known.name)
    elif known.name == "_to_copy" and here == "cpu":
        _saw("to host", known.name)
    elif known.name in INDEXED:
        indices = [index for index in raw[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _saw("size", known.name)
        if any(not isinstance(index, PretendTensor) for index in args[1] if index is not None):
            _saw("to device", known.name)
    elif known.name in SIZES or (known.name == "repeat_interleave" and len(raw) == 1):
        _saw("size", known.name)
    elif known.name in STATUS:
        _saw("status", known.name)


def _saw(kind: Kind, operation: str) -> None:
    for watcher in _WATCHERS:
        watcher.append(Synchronisation(kind, operation, _caller()))


def _caller() -> str:
    """The line that called torch, the nearest outside of it, of this file and of what hides itself in tracebacks."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        hidden = "__tracebackhide__" in frame.f_code.co_varnames  # what pytest leaves out, too: checks around a call
        if not hidden and not file.startswith(OWN_FILES) and not file.startswith("<"):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"
