"""Options that commands about a model share; torch is imported when one of them is read, and not before."""

from __future__ import annotations

from typing import Annotated, Any

import typer


DTYPES = ("float64", "float32", "bfloat16", "float16")


def device_named(name: str) -> Any:
    """The torch.device of that name.

    Args:
        name: such as "cpu", "cuda", "cuda:1" or "mps".
    """
    from lipbounds.devices import device_named as named
    from lipbounds.errors import InvalidInput

    try:
        return named(name)
    except InvalidInput as error:
        raise typer.BadParameter(str(error)) from error


def dtype_named(name: str) -> Any:
    """The torch.dtype of that name.

    Args:
        name: one of `DTYPES`.
    """
    import torch

    if name not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, name)


# `device: Device = "cpu"` is a torch.device in the command, and `dtype: Dtype = "float32"` a torch.dtype.
Device = Annotated[Any, typer.Option("--device", parser=device_named, metavar="DEVICE", help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[Any, typer.Option("--dtype", parser=dtype_named, metavar="DTYPE", help=", ".join(DTYPES))]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.", min=0, max=2**32 - 1)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with a Hugging Face checkpoint.")
]
