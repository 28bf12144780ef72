"""Shapes, dtypes and types of the library's calls, checked in tests by jaxtyping and beartype: each kind of call once.

What they find in a call depends on the types of its arguments and on the shapes and dtypes of their tensors, and a
check costs as much as a dozen operations on small tensors. So a call whose arguments are, in all of that, those of one
that has passed in this process runs unchecked. Checkers are made at the first call: most functions of a module that a
test imports are not called in it.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
import torch
from jaxtyping import config
from torch import Tensor
from torch.nn import Module, Parameter


Kind = Any  # hashable
TENSORS = frozenset({Tensor, Parameter})
# Their values are part of the kind of a call: the shape of a result may depend on them.
VALUES = frozenset({bool, int, str, type(None), range, frozenset, torch.Size, torch.dtype, torch.device})
SEQUENCES = frozenset({tuple, list})


LARGEST = 300  # parts of a kind: shared parts of a nested object count each time, and could be without end


class _Unknown(Exception):
    """An argument of which only a check itself can tell the kind."""


class _TooLarge(Exception):
    """Arguments whose kind would have more than `LARGEST` parts: such a call is always checked."""


def check_each_kind_of_call_once() -> None:
    """Replace `jaxtyping.jaxtyped`, which modules of the library that are imported from now on are decorated with."""
    if not isinstance(jaxtyping.jaxtyped, functools.partial):
        jaxtyping.jaxtyped = functools.partial(_jaxtyped, jaxtyping.jaxtyped)


def _jaxtyped(original: Callable[..., Any], /, *, typechecker: Any) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        if type(function) is not FunctionType or inspect.isgeneratorfunction(function):
            return original(function, typechecker=typechecker)
        return _once_for_each_kind(function, functools.partial(original, typechecker=typechecker))

    return decorate


_seen: dict[CodeType, set[Kind]] = {}
_parts = 0  # of the kind that is being made


def _once_for_each_kind(function: FunctionType, check: Callable[[Any], Any]) -> Callable[..., Any]:
    seen = _seen.setdefault(function.__code__, set())  # a function inside another is made anew at each call of that
    checked: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checked
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        global _parts
        _parts = 0
        try:
            kind = (*map(kind_of, args), *kwargs, *map(kind_of, kwargs.values()))
            if kind in seen:
                return function(*args, **kwargs)
        except (_Unknown, _TooLarge):
            kind = None
        if checked is None:
            checked = check(function)
        assert checked is not None
        result = checked(*args, **kwargs)
        if kind is not None:
            seen.add(kind)
        return result

    return call


def kind_of(value: Any) -> Kind:
    """What a check sees of an argument.

    Raises:
        _Unknown: what it is made of is not known here.
        _TooLarge: it has too many parts.
    """
    global _parts
    _parts += 1
    if _parts > LARGEST:
        raise _TooLarge
    made_of = type(value)
    if made_of in TENSORS:
        if value.is_nested:  # has no shape
            raise _Unknown
        return value.shape, value.dtype
    if made_of in VALUES:
        return made_of, value
    if made_of is float:
        return float
    if made_of in SEQUENCES:
        return made_of, *map(kind_of, value)
    if made_of is dict:
        return dict, *value, *map(kind_of, value.values())
    if made_of is FunctionType:
        return value.__code__
    if not made_of.__module__.startswith("lipbounds.") or isinstance(value, (Module, Tensor)):
        raise _Unknown
    if made_of.__weakrefoffset__:
        return _of_object(value)
    fields = getattr(made_of, "__dataclass_fields__", None)
    if fields is None:
        raise _Unknown
    return made_of, *(_of_field(getattr(value, field)) for field in fields)


_objects: dict[int, tuple[weakref.ref[Any], int]] = {}
_numbers: dict[Kind, int] = {}


def _of_object(value: Any) -> int:
    """A number for the types, shapes and dtypes of what an object of the library held when it was first seen."""
    name = id(value)
    known = _objects.get(name)
    if known is not None and known[0]() is value:
        return known[1]
    kept = weakref.ref(value, lambda _: _objects.pop(name, None))
    _objects[name] = kept, -1  # where it holds itself
    try:
        kind = (type(value), *((field, _of_field(content)) for field, content in vars(value).items()))
    except _TooLarge:
        del _objects[name]
        raise
    number = _numbers.setdefault(kind, len(_numbers))
    _objects[name] = kept, number
    return number


def _of_field(content: Any) -> Kind:
    try:
        return kind_of(content)
    except _Unknown:
        return type(content)
