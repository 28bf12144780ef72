"""The arguments of commands about a model at inputs: which model, and what it is run on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    from lipbounds.models.loading import LoadedModel
    from lipbounds.report import ModelInput


Model = Annotated[
    str,
    typer.Argument(help="A bundled name such as minilm, a Hugging Face name or folder, or package:attribute."),
]
Text = Annotated[list[str] | None, typer.Option(help="A text to run a text model on; repeatable.")]
Data = Annotated[
    Path | None, typer.Option(help="A text file, one text per line, or a tensor: .pt, .npy or .safetensors.")
]
Images = Annotated[Path | None, typer.Option(help="A folder with pictures, for an image model.")]


def runs_of(
    loaded: LoadedModel, text: list[str] | None, data: Path | None, images: Path | None, device: Any, dtype: Any
) -> list[ModelInput]:
    """The inputs that the options name, where the model is; the model is moved there, too.

    Args:
        loaded: the model.
        text: of --text.
        data: of --data.
        images: of --images.
        device: of --device.
        dtype: of --dtype.
    """
    from lipbounds.errors import InvalidInput
    from lipbounds.report.inputs import check_runs, default_inputs, from_file, from_images, from_texts, placed

    given: list[Any] = [name for name in (text, data, images) if name]
    if len(given) > 1:
        raise InvalidInput("inputs must come from one of --text, --data and --images, got more than one.")
    if text:
        runs = from_texts(loaded, text)
    elif data is not None:
        runs = from_file(loaded, data)
    elif images is not None:
        runs = from_images(loaded, images)
    else:
        runs = default_inputs(loaded)
    loaded.module.to(device, dtype)
    runs = placed(runs, device, dtype)
    check_runs(loaded, runs)
    return runs
