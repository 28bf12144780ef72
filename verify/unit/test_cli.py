"""The command line: help, output, exit statuses, and errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import lipbounds
from lipbounds import cli, registry
from lipbounds.cli import bench as bench_command
from lipbounds.cli.app import app
from lipbounds.cli.console import OneLineErrors, extra_of
from lipbounds.cli.options import Device, Dtype
from lipbounds.errors import LipboundsError
from lipbounds.testing import session
from lipbounds.testing.session import Comparison, Report


RESULTS = Path(__file__).parents[2] / "results"
COMMANDS = [command.name or "" for command in app.registered_commands]
SOUND = Report(
    name="sharp",
    kind="proved",
    scope="point",
    seed=3,
    examples={"value": 60},
    rounds=2,
    starts=200,
    worst_ratio=0.5,
    comparisons=[Comparison(name="[red]", median=float("inf"), worst=2.0, blocks=3)],
)
WRONG = Report(
    name="mine", kind="proved", scope="point", seed=0, refuted_by="value", message="[red]too small", snippet="x = 1\n"
)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def one_line_error(*arguments: str) -> str:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Make the session return a report, or raise, without searching."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command puts the working directory there

    def outcome(found: Any) -> None:
        monkeypatch.setattr(session, "verify", mock.Mock(side_effect=[found]))

    return outcome


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"Usage: lipbounds {command}" in done.stdout.replace("root", "lipbounds")
    listed = run("--help").stdout
    assert f" {command} " in listed


def test_without_a_command_the_help_is_shown() -> None:
    done = run()
    assert done.exit_code == 2
    assert "Usage" in done.stdout
    assert "bounds" in done.stdout


def test_help_waits_for_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "hypothesis", "transformers", "sklearn", "pytest")
    source = f"""
import sys
from lipbounds.cli import main
for command in {[[], *([name] for name in COMMANDS)]}:
    sys.argv = ["lipbounds", *command, "--help"]
    try:
        main()
    except SystemExit as exit:
        assert not exit.code, exit.code
assert not set({heavy}) & set(sys.modules), set({heavy}) & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", source], check=True, capture_output=True)


def test_the_package_has_its_public_names_before_they_are_used() -> None:
    source = """
import sys, lipbounds
assert "torch" not in sys.modules
assert {"Attention", "get", "select"} <= set(dir(lipbounds))
assert lipbounds.get("sharp").name == "sharp"
assert lipbounds.ops.softmax and lipbounds.registry.registry
from lipbounds import Attention
assert not hasattr(lipbounds, "no_such_name")
"""
    subprocess.run([sys.executable, "-c", source], check=True)


def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lipbounds", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: lipbounds" in done.stdout


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_bounds_lists_what_is_registered() -> None:
    done = run("bounds", "--json")
    assert done.exit_code == 0
    rows = json.loads(done.stdout)["bounds"]
    assert [row["name"] for row in rows] == [spec.name for spec in registry.standing()]
    row = next(row for row in rows if row["name"] == "yudin2025.biased")
    assert (row["kind"], row["scope"], row["norm"]) == ("proved", "point", "l2")
    assert "2507.07814" in row["source"]
    shown = run("bounds")
    assert shown.exit_code == 0
    listed = [line.split()[0] for line in shown.stdout.splitlines()]
    assert listed == ["name", *(spec.name for spec in registry.standing())]


def test_bounds_are_filtered_and_a_wrong_filter_is_told() -> None:
    rows = json.loads(run("bounds", "--kind", "proved", "--scope", "ball", "--supports", "mask", "--json").stdout)[
        "bounds"
    ]
    assert {row["kind"] + row["scope"] for row in rows} == {"provedball"}
    assert all("mask" in row["supports"] for row in rows)
    assert {row["target"] for row in json.loads(run("bounds", "--target", "Mlp", "--json").stdout)["bounds"]} == {"Mlp"}
    for option, value in (("--kind", "upper"), ("--target", "mlp"), ("--supports", "masks")):
        done = run("bounds", option, value)
        assert done.exit_code == 2
        assert "must be one of" in done.stderr


# -- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("found", "status"), [(SOUND, 0), (WRONG, 1)])
def test_verify_says_what_was_found(found: Report, status: int, verified: Any, tmp_path: Path) -> None:
    verified(found)
    done = run("verify", "sharp", "--json", "--report", str(tmp_path / "new" / "report.json"))
    assert done.exit_code == status
    assert json.loads(done.stdout)["sound_so_far"] == (status == 0)
    assert (tmp_path / "new" / "report.json").read_text() == done.stdout
    verified(found)
    shown = run("verify", "sharp")
    assert shown.exit_code == status
    assert ("sound so far" if status == 0 else "x = 1\n") in shown.stdout
    assert "[red]" in shown.stdout, "what comes from a bound is no markup"


@pytest.mark.parametrize(
    ("little", "said"),
    [({"rounds": 1}, "1 of 2 rounds of checks"), ({"starts": 199}, "199 of 200 starts of the ascent")],
    ids=["checks", "ascent"],
)
def test_a_search_that_was_too_short_is_no_verdict(little: dict[str, int], said: str, verified: Any) -> None:
    verified(dc.replace(SOUND, **little))
    done = run("verify", "sharp", "--json")
    assert done.exit_code == 3
    report = json.loads(done.stdout)
    assert not report["sound_so_far"]
    assert report["missing"] == said
    verified(dc.replace(SOUND, **little))
    shown = run("verify", "sharp")
    assert shown.exit_code == 3
    assert "not enough searched" in shown.stdout
    assert said in shown.stdout
    assert "sound so far" not in shown.stdout


def test_a_counterexample_without_a_file_that_shows_it_asks_nobody_to_run_one(verified: Any) -> None:
    verified(dc.replace(WRONG, snippet=""))
    shown = run("verify", "sharp")
    assert shown.exit_code == 1
    assert "Run this" not in shown.stdout


def test_verify_passes_on_its_options(verified: Any) -> None:
    verified(SOUND)
    search: Any = session.verify
    run("verify", "sharp", "--seconds", "2.5", "--seed", "7")
    (call,) = search.call_args_list
    assert call.args == (lipbounds.get("sharp"),)
    assert (call.kwargs["seconds"], call.kwargs["seed"]) == (2.5, 7)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ("sharpp", "did you mean"),
        ("no_such_module:x", "check the spelling"),
        ("json:dumpss", "check the spelling"),
        ("json:__name__", "got str"),
        (":", "check the spelling"),
        ("[red]:x", "[red]"),
    ],
)
@pytest.mark.usefixtures("verified")
def test_a_bound_that_is_not_there_is_one_line(bound: str, message: str) -> None:
    assert message in one_line_error("verify", bound)


@pytest.mark.usefixtures("verified")
def test_a_bound_whose_module_breaks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_at_import.py").write_text("1 /")
    monkeypatch.chdir(tmp_path)
    assert "SyntaxError" in one_line_error("verify", "breaks_at_import:x")


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing", "No such command 'nothing'"),
        ("bounds --jso", "--json"),
        ("bounds extra", "unexpected extra argument"),
        ("verify", "Missing argument 'bound'"),
        ("verify sharp --seconds x", "Invalid value for '--se"),
        ("verify sharp --seconds -1", "Invalid value for '--seconds'"),
        ("verify sharp --seed 1.5", "Invalid value for '--se"),
        ("verify sharp --seed -1", "Invalid value for '--seed'"),
        ("verify sharp --report .", "pass another path"),
        ("verify sharp --report", "requires an argument"),
        ("diff a b", "check the path"),
        ("diff a", "Missing argument 'after'"),
        ("diff a b --fail-above -5%", "5% or 0.05"),
        ("diff a b --fail-above nan", "5% or 0.05"),
        ("diff a b --fail-above %", "5% or 0.05"),
        ("train-digits --epochs 0", "Invalid value for '--epochs'"),
        ("train-digits --output .", "pass another path"),
        ("train-digits --seed 99999999999999999999", "Invalid value for '--seed'"),
    ],
)
@pytest.mark.usefixtures("verified")
def test_bad_input_is_one_line_with_the_fix(arguments: str, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in one_line_error(*arguments.split())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LipboundsError("first line\nsecond"), "error: first line second\n"),
        (ModuleNotFoundError("no", name="hypothesis"), "pip install -e '.[verify]'"),
        (ModuleNotFoundError("no", name="transformers"), "pip install -e '.[models]'"),
        (PermissionError(13, "Permission denied", "/some/file"), "/some/file: Permission denied"),
    ],
)
def test_what_a_command_raises_is_one_line(error: Exception, message: str, verified: Any) -> None:
    verified(error)
    assert message in one_line_error("verify", "sharp")


@pytest.mark.parametrize(
    ("asking", "extra"), [("lipbounds.models.oops", "models"), ("lipbounds.testing.oops", "verify")]
)
def test_a_package_of_several_extras_comes_with_that_of_what_asked_for_it(asking: str, extra: str) -> None:
    with pytest.raises(ModuleNotFoundError) as missing:
        exec("raise ModuleNotFoundError('no', name='numpy')", {"__name__": asking})
    assert extra_of(missing.value) == extra


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ModuleNotFoundError("no", name="lipbounds.oops")])
def test_a_bug_keeps_its_traceback(error: Exception, verified: Any) -> None:
    verified(error)
    assert run("verify", "sharp").exception is error


def test_after_ctrl_c_nothing_half_written_is_left(verified: Any, tmp_path: Path) -> None:
    verified(KeyboardInterrupt())
    done = run("verify", "sharp", "--report", str(tmp_path / "report.json"))
    assert (done.exit_code, done.stdout) == (130, "")
    assert "Stopped" in done.stderr
    assert not [*tmp_path.iterdir()]


def test_without_typer_the_way_to_get_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)  # pyright: ignore[reportArgumentType]
    monkeypatch.delitem(sys.modules, "lipbounds.cli.app")
    with pytest.raises(SystemExit, match=r"needs typer.*pip install -e '\.\[cli\]'"):
        cli.main()


# -- compare ----------------------------------------------------------------------------------------------------------


def test_compare_has_an_exit_status_for_ci(tmp_path: Path) -> None:
    before = RESULTS / "tightness.json"
    content = json.loads(before.read_text())
    worse = content["models"]["minilm"]["overall"][1]
    worse["median"] *= 1.1
    after = tmp_path / "after.json"
    after.write_text(json.dumps(content))
    assert run("diff", str(before), str(before)).exit_code == 0
    assert run("diff", str(after), str(before)).exit_code == 0
    done = run("diff", str(before), str(after))
    assert done.exit_code == 1
    assert "1 worse by more than 5%" in done.stdout
    assert run("diff", str(before), str(after), "--fail-above", "11%").exit_code == 0
    found = json.loads(run("diff", str(before), str(after), "--json", "--fail-above", "0.02").stdout)
    assert found["regressed"]
    assert found["fail_above"] == 0.02
    assert [(row["model"], row["method"]) for row in found["worse"]] == [("minilm", worse["bound"])]


# -- bench and train-digits -------------------------------------------------------------------------------------------


def test_bench_outside_of_a_checkout_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lipbounds, "__path__", [str(tmp_path / "site-packages" / "lipbounds")])
    assert "tox -e bench" in one_line_error("bench")


@pytest.mark.parametrize("below", [".", "docs", "bench/workloads/data"])
def test_bench_is_found_from_inside_a_checkout(below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RESULTS.parent / below)
    assert bench_command.checkout() == RESULTS.parent


def test_bench_passes_arguments_and_exit_status_on(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    for folder in ("bench", "lipbounds"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit(1)")
    (tmp_path / "lipbounds" / "registry.py").touch()
    monkeypatch.chdir(tmp_path / "bench")
    assert run("bench", "readme", "--time-limit", "-1", "--", "--help").exit_code == 1
    assert capfd.readouterr().out == "['readme', '--time-limit', '-1', '--help']\n"


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1), (2, 2), (130, 130), (-2, 130), (-9, 1)])
def test_bench_is_waited_for_after_ctrl_c(status: int, expected: int) -> None:
    with mock.patch.object(bench_command.subprocess, "Popen") as popen:
        popen.return_value.__enter__.return_value.wait.side_effect = [KeyboardInterrupt, status]
        assert run("bench", "tightness", "--quick").exit_code == expected
    (command,) = popen.call_args.args
    assert command[1:] == ["-m", "bench", "tightness", "--quick"]


def test_train_digits_writes_weights_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lipbounds.models import train_digits
    from lipbounds.models.digits_vit import DigitsViT, load_digits_vit

    trained = DigitsViT()
    train = mock.Mock(return_value=trained)
    monkeypatch.setattr(train_digits, "train", train)
    path = tmp_path / "weights.safetensors"
    done = run("train-digits", "--epochs", "3", "--seed", "7", "--output", str(path), "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["output"] == str(path)
    assert (train.call_args.kwargs["seed"], train.call_args.kwargs["epochs"]) == (7, 3)
    loaded = load_digits_vit(path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in trained.state_dict().items())


# -- options of commands about a model --------------------------------------------------------------------------------


def parsed(*arguments: str) -> Any:
    """The exit status, the error, and what a command with these options gets."""
    got = []
    other = typer.Typer(cls=OneLineErrors)

    @other.command()
    def command(device: Device = "cpu", dtype: Dtype = "float32") -> None:
        got.append((device, dtype))

    other.command("another")(lambda: None)
    done = CliRunner().invoke(other, ["command", *arguments])
    return done.exit_code, done.stderr, got


def test_device_and_dtype_become_those_of_torch() -> None:
    assert parsed()[2] == [(torch.device("cpu"), torch.float32)]
    assert parsed("--device", "cpu:0", "--dtype", "bfloat16")[2] == [(torch.device("cpu:0"), torch.bfloat16)]


@pytest.mark.parametrize(
    "arguments", ["--device nothing", "--device meta", "--device cpu:x", "--device cuda:99", "--dtype int8"]
)
def test_a_device_or_dtype_that_is_not_there_is_one_line(arguments: str) -> None:
    option, value = arguments.split()
    status, error, got = parsed(option, value)
    assert (status, got) == (2, [])
    assert option in error
    assert f"got '{value}'" in error
    assert error.count("\n") == 1


# -- fuzzing ----------------------------------------------------------------------------------------------------------

OPTIONS = sorted(
    {name for command in COMMANDS for name in run(command, "--help").stdout.split() if name.startswith("--")}
)
WORDS = [*COMMANDS, *OPTIONS, "sharp", "--", "-", "5%", "1", "-1", "0.5", "nan", "inf", str(RESULTS / "certified.json")]


@contextlib.contextmanager
def harmless() -> Iterator[None]:
    """Nothing is searched, trained or written."""
    with (
        mock.patch.object(session, "verify", return_value=SOUND),
        mock.patch("lipbounds.models.train_digits.train_and_save", return_value=0.5),
        mock.patch.object(bench_command, "_run", return_value=0),
        mock.patch("lipbounds.cli.verify.write_atomically"),
        mock.patch("lipbounds.files._beside", return_value=mock.Mock()),
        mock.patch.object(Path, "mkdir"),
        mock.patch.object(sys, "path", [*sys.path]),
    ):
        yield


@settings(max_examples=100, deadline=None)
@given(arguments=st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=8))
def test_no_arguments_make_a_traceback(arguments: list[str]) -> None:
    with harmless():
        done = run(*arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert done.exit_code in {0, 1, 2, 130}
    if done.exit_code == 2 and arguments:
        assert done.stderr.startswith("error: ")


# -- version, verbosity, suggestions ----------------------------------------------------------------------------------


def test_version_is_that_of_the_package() -> None:
    done = run("--version")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"lipbounds {lipbounds.__version__}, torch 2.")


def test_quiet_and_verbose_exclude_each_other() -> None:
    assert "exclude each other" in one_line_error("--quiet", "--verbose", "bounds")


def test_a_misspelt_bundled_model_is_suggested() -> None:
    assert "did you mean the bundled model 'minilm'" in one_line_error("report", "minilmm")


def test_without_a_terminal_a_line_is_printed_when_a_minute_has_passed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from lipbounds.cli import console

    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(console, "remarks", Console(stderr=True, force_terminal=False))
    with console.progress() as bar:
        bar.update(bar.add_task("work", total=1.0), completed=0.5)
    assert capsys.readouterr().err == "work: 50 %\n"


def test_no_page_or_message_sends_to_a_package_index_that_has_no_release() -> None:
    """Nothing is on the index yet: what is to be installed comes from a copy of the repository."""
    root = Path(__file__).parents[2]
    places = [
        *root.glob("lipbounds/**/*.py"),
        *root.glob("bench/**/*.py"),
        *root.glob("docs/**/*.md"),
        root / "README.md",
    ]
    wrong = re.compile(r"pip install (?:-U )?['\"]?lip" + r"bounds\b")
    assert [path for path in places if wrong.search(path.read_text(encoding="utf-8"))] == []
