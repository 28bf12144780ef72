"""`lipbounds compare`: bounds of the attention of a model side by side, with the truth."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lipbounds.cli.console import AsJson, progress, remarks
from lipbounds.cli.inputs import Data, Images, Model, Text, runs_of
from lipbounds.cli.options import Device, Dtype, TrustRemoteCode
from lipbounds.files import check_writable


def command(
    model: Model,
    text: Text = None,
    data: Data = None,
    images: Images = None,
    bounds: Annotated[
        list[str] | None, typer.Option(help="The name of a bound; repeatable. All proved ones in l2 if left out.")
    ] = None,
    eps: Annotated[
        list[float] | None, typer.Option(help="The l2 radius of a ball around the input of a block; repeatable.")
    ] = None,
    truth: Annotated[
        str, typer.Option(help="exact, certificate, auto (exact for small blocks) or none.", metavar="METHOD")
    ] = "auto",
    latex: Annotated[Path | None, typer.Option(help="Write the tables here as LaTeX (booktabs).")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write all numbers here as CSV.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the ratios here: .pdf, .png or .svg.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare bounds on the attention blocks of a model, ranked within kind, scope and norm.

    Without data a text model gets one short sentence, and a bundled image model one image. To compare two files of
    results, see `lipbounds diff`.
    """
    import torch

    from lipbounds.capture import capture
    from lipbounds.comparison.measure import compare_runs
    from lipbounds.models.loading import load_model

    for path in (latex, csv, figure):
        if path is not None:
            check_writable(path)
    with progress() as bar:
        task = bar.add_task(escape(f"{model}: loading"), total=1.0)
        loaded = load_model(model, trust_remote_code=trust_remote_code)
        with torch.no_grad():
            found = {
                run.name: capture(loaded.module, *run.args, **run.kwargs)
                for run in runs_of(loaded, text, data, images, device, dtype)
            }
        _say_cost(truth, found.values())
        compared = compare_runs(
            found,
            bounds=bounds or None,
            truth=truth,
            radii=eps or None,
            name=loaded.name,
            progress=lambda what, share: bar.update(task, completed=share, description=escape(f"{model}: {what}")),
        )
    if latex is not None:
        compared.to_latex(latex)
    if csv is not None:
        compared.to_csv(csv)
    if figure is not None:
        compared.plot(figure)
    print(compared.to_json() if as_json else repr(compared))  # noqa: T201 - a table as it is, whatever the width


def _say_cost(truth: str, runs: Collection[Sequence[Any]]) -> None:
    """What the truth will cost, on stderr before it is computed."""
    from lipbounds.comparison.ground_truth import cost

    if truth in ("auto", "exact", "certificate"):
        said = f"truth: {cost(next(iter(runs))[0], method=truth)}, for each of {sum(map(len, runs))} blocks"
        remarks.print(said, highlight=False, soft_wrap=True)
