"""`lipbounds train-digits`: the bundled vision transformer, made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lipbounds.cli.console import AsJson, messages, output, print_json
from lipbounds.cli.options import Seed
from lipbounds.files import check_writable


# As in lipbounds.models.train_digits, which is not imported before the command runs.
EPOCHS = 60


def command(
    output_file: Annotated[Path, typer.Option("--output", help="The file to write.")] = Path("digits_vit.safetensors"),
    seed: Seed = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = EPOCHS,
    as_json: AsJson = False,
) -> None:
    """Train the vision transformer on the 8 x 8 digits, in minutes on one core; write its weights.

    The weights appear whole at the end or, after Ctrl-C, not at all.
    """
    check_writable(output_file)
    from lipbounds.models.train_digits import train_and_save

    accuracy = train_and_save(output_file, seed=seed, epochs=epochs, console=messages)
    if as_json:
        print_json({"schema_version": 1, "output": str(output_file), "seed": seed, "test_accuracy": accuracy})
    else:
        output.print(f"test accuracy {accuracy:.4f}; weights in {output_file}", markup=False, soft_wrap=True)
