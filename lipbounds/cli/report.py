"""`lipbounds report`: which layers and heads of a model are fragile, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from lipbounds.cli.console import messages, output, progress
from lipbounds.cli.inputs import Data, Images, Model, Text, runs_of
from lipbounds.cli.options import Device, Dtype, Seed, TrustRemoteCode


if TYPE_CHECKING:
    from lipbounds.cluster import Cluster
    from lipbounds.report.schema import ModelReport


Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Compute on the Ray cluster at host:port, auto or local; without an address, on the running one or "
        "else on all cores of this machine.",
    ),
]


class WithRay(TyperCommand):
    """Typer has no options with a value that may be left out: `--ray` alone becomes `--ray=`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with a bare --ray where no value follows."""
        after = [*args[1:], "-"][: len(args)]
        bare = [one == "--ray" and other.startswith("-") for one, other in zip(args, after, strict=True)]
        return super().parse_args(ctx, [f"{one}=" if alone else one for one, alone in zip(args, bare, strict=True)])


def command(
    model: Model,
    text: Text = None,
    data: Data = None,
    images: Images = None,
    bounds: Annotated[
        list[str] | None, typer.Option(help="A proved bound instead of the default ones; repeatable.")
    ] = None,
    eps: Annotated[list[float] | None, typer.Option(help="The radius of a ball; repeatable.")] = None,
    layers: Annotated[
        list[int] | None, typer.Option(help="The number of a layer; repeatable. All if left out.")
    ] = None,
    page: Annotated[Path, typer.Option("--output", help="The HTML file to write.")] = Path("report.html"),
    json: Annotated[Path | None, typer.Option(help="Write the same numbers here as JSON, too.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    max_seconds: Annotated[
        float | None,
        typer.Option(help="End what is being computed, or run, after this time; the page names what is missing."),
    ] = None,
    ray: Ray = None,
    gpus_per_job: Annotated[float, typer.Option(help="With --ray: compute on GPUs, so many for each job.")] = 0.0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write one HTML file: layers and heads with bounds and constants, attention maps, bounds on balls.

    Without data a text model gets one short sentence, and a bundled image model one image.
    """
    from lipbounds.files import check_writable
    from lipbounds.models.loading import load_model
    from lipbounds.report import measure
    from lipbounds.report.evaluation import plan

    for path in (page, json):
        if path is not None:
            check_writable(path)
    if json is not None and json.resolve() == page.resolve():
        raise typer.BadParameter("--json and --output must be two files")
    plan(bounds=bounds or (), radii=eps or None, delta=1e-9, seed=seed)  # a wrong name is told before a model is loaded
    with progress() as bar, _cluster(ray, gpus_per_job) as cluster:
        task = bar.add_task(escape(f"{model}: loading"), total=1.0)
        loaded = load_model(model, trust_remote_code=trust_remote_code)
        runs = runs_of(loaded, text, data, images, device, dtype)
        found = measure(
            loaded.module,
            runs,
            name=loaded.name,
            bounds=bounds or (),
            radii=eps or None,
            layers=layers or (),
            seed=seed,
            max_seconds=max_seconds,
            cluster=cluster,
            progress=lambda what, share: bar.update(task, completed=share, description=escape(f"{model}: {what}")),
        )
    _write(found, page, json)


def _write(found: ModelReport, page: Path, json: Path | None) -> None:
    """Write the files, and print what they say in short."""
    from lipbounds.files import write_atomically
    from lipbounds.report import to_json, write_page
    from lipbounds.report.summary import notes_of, summary

    write_page(found, page)
    if json is not None:
        write_atomically(json, to_json(found).encode())
    for run in found.inputs:
        for note in notes_of(run):
            messages.print(f"{run.name[:40]}: {note}", highlight=False, markup=False, soft_wrap=True)
        output.print(summary(run), highlight=False, markup=False, soft_wrap=True)
    output.print(f"Open {page} in a browser.", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _cluster(address: str | None, gpus_per_job: float) -> Iterator[Cluster | None]:
    """The Ray cluster that the options name; None without --ray."""
    if address is None:
        if gpus_per_job:
            raise typer.BadParameter("--gpus-per-job goes with --ray; without, pass --device cuda")
        yield None
        return
    from lipbounds.cluster import connect

    with connect(address or None, gpus_per_job=gpus_per_job) as found:
        yield found
