"""`python -m bench tightness --model --bounds`: a stranger's model and bound, beside the records of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bench import __main__ as command_line
from bench.engine.machine import ROOT
from bench.tests.samples import records_at
from bench.tightness import features
from bench.tightness.command import TASK
from lipbounds import BoundSpec, Claim, Source, registry


LOOSE = BoundSpec(
    name="stranger.loose",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="a test", statement="twice a bound is a bound"),
    supports=frozenset({"heads", "biases"}),
    cost="O(H n^2 d)",
    compute=lambda block: 2 * registry.get("yudin2025.biased")(block).value,
)


def encoder() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True).eval()


def test_a_model_and_a_bound_of_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [registry.get(name) for name in ("exact", "lanczos", "lanczos_certificate", "yudin2025.biased")]
    monkeypatch.setattr(registry.registry, "_specs", dict(registry.registry._specs))  # forgets LOOSE at the end
    monkeypatch.setattr(registry, "select", lambda **_: [*chosen, LOOSE])
    monkeypatch.setattr(registry, "refuted", list)
    monkeypatch.setattr(features, "page", lambda _: "# Bounds\n")
    torch.save(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), tmp_path / "x.pt")
    folder = tmp_path / "mine"
    committed = (ROOT / "results" / "tightness.jsonl").read_bytes()
    monkeypatch.setattr("bench.engine.options.ROOT", tmp_path)  # no records are copied: this is another test's
    place = "bench.tests.test_of_user"
    status = command_line.main(
        [
            *("tightness", "--model", f"{place}:encoder", "--data", str(tmp_path / "x.pt")),
            *("--bounds", f"{place}:LOOSE", "--results", str(folder)),
        ]
    )
    assert status == 0
    values = {
        (record.question.bound, record.question.input): record.value
        for record in records_at(folder / "tightness.jsonl").values()
        if record.question.bound in ("stranger.loose", "yudin2025.biased")
    }
    assert len(values) == 4
    for (name, given), value in values.items():
        if name == "stranger.loose":
            paper = values["yudin2025.biased", given]
            assert paper is not None
            assert value == pytest.approx(2 * paper)
    assert "`stranger.loose`" in (folder / "tightness.md").read_text()
    assert (ROOT / "results" / "tightness.jsonl").read_bytes() == committed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "minilm"], "pass another folder by --results DIR"),
        (["--bounds", "a:b"], "pass another folder by --results DIR"),
        (["--bounds", "sharp", "--results", "{folder}"], "must be package.module:ATTRIBUTE"),
        (["--data", "x.pt", "--results", "{folder}"], "--data goes with --model"),
    ],
)
def test_what_is_brought_stays_out_of_the_results_of_the_repository(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(folder=tmp_path / "mine") for argument in arguments]
    assert command_line.main(["tightness", *given]) == command_line.MISUSE
    assert message in capsys.readouterr().err


def test_bounds_of_other_packages_stay_out_of_the_results_of_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.engine.options.ROOT", tmp_path)
    monkeypatch.setattr(registry.registry, "_specs", {**registry.registry._specs, LOOSE.name: LOOSE})
    assert command_line.main(["tightness", "--results", str(tmp_path / "results")]) == command_line.MISUSE
    assert "other packages have registered stranger.loose; pass another folder" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_records_of_the_repository_are_copied_and_not_written(tmp_path: Path) -> None:
    options = command_line._parser().parse_args(["tightness", "--model", "minilm", "--results", str(tmp_path / "mine")])
    TASK.prepare(options)
    assert (tmp_path / "mine" / "tightness.jsonl").read_bytes() == (ROOT / "results/tightness.jsonl").read_bytes()
