"""A real Ray cluster of two nodes: the same records as a serial run, whatever dies on the way."""

from __future__ import annotations

import dataclasses as dc
import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from bench.__main__ import MISUSE, main
from bench.engine import evaluators
from bench.engine.evaluate import question
from bench.engine.machine import ROOT
from bench.engine.store import Store
from bench.robustness import task as robustness
from bench.robustness.on_cluster import answered_on
from bench.robustness.profiles import PROFILES
from bench.robustness.settings import SETTINGS, recipe
from bench.robustness.training import Workshop
from bench.tests import on_workers
from bench.tests.samples import records_at, tiny_block, tiny_case, tiny_model
from bench.tightness import task as tightness
from lipbounds import registry
from lipbounds.cluster import Cluster, ClusterError, Lost, connect
from lipbounds.errors import install_advice
from lipbounds.models.digits_data import load_digits_split
from lipbounds.report import measure, to_json
from lipbounds.targets.serialize import detached_copy


pytest.importorskip("ray")
NAMES = ("exact", "lanczos", "lanczos_certificate", "yudin2025.biased", "yudin2025.theorem3")
EVALUATIONS = 6 * len(NAMES)
PATIENCE = 240.0  # seconds: Ray starts processes, which takes long where others run
DRIVER = """
import sys
from pathlib import Path
from bench.engine import evaluators
from bench.tests import on_workers, test_ray
from lipbounds.errors import install_advice
from lipbounds.cluster import connect
evaluators.answer = on_workers.answer_slowly
test_ray.take_few(lambda name, value: setattr(test_ray.registry, name, value))
with connect(sys.argv[2]) as cluster:
    test_ray.run(Path(sys.argv[1]), cluster=cluster)
"""

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves files and sockets to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def nodes(watched: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes of this machine with a core each; one cluster at a time, whichever process of pytest needs it."""
    from filelock import FileLock
    from ray.cluster_utils import Cluster as Nodes

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch, FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv(on_workers.WATCHED, str(watched))
        patch.delenv("RAY_ADDRESS", raising=False)
        # One GPU of which torch sees nothing: only what Ray gives out is looked at.
        found = Nodes(initialize_head=True, head_node_args=node | {"num_gpus": 1})
        found.add_node(**node)
        try:
            yield found
        finally:
            found.shutdown()


@pytest.fixture(scope="module")
def cluster(nodes: Any) -> Iterator[Cluster]:
    """Connected once, for workers stay as long as the connection."""
    with connect(nodes.address) as found:
        yield found


@pytest.fixture
def with_gpus(cluster: Cluster) -> Callable[[float], Cluster]:
    """Jobs of another kind on the same connection."""
    import ray

    return lambda gpus_per_job: Cluster(ray, gpus_per_job)


def take_few(put: Callable[[str, Any], None]) -> None:
    """As if nothing else were registered, which saves most of the time."""
    chosen = [registry.get(name) for name in NAMES]
    put("select", lambda **_: chosen)
    put("refuted", list)


@pytest.fixture
def _few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    take_few(lambda name, value: monkeypatch.setattr(registry, name, value))


def run(path: Path, **options: Any) -> tightness.Outcome:
    with Store(path) as store:
        return tightness.run(store, [tiny_model()], **options)


def answers(path: Path) -> dict[str, tuple[Any, ...]]:
    """All but the time taken and the environment, which differ between runs."""
    return {
        key: (each.question, each.tokens, each.kind, each.value, each.status, each.error, each.terms, each.details)
        for key, each in records_at(path).items()
    }


def written(path: Path) -> Counter[str]:
    """How often each key stands in the file."""
    lines = map(json.loads, path.read_text().splitlines())
    return Counter(line["key"] for line in lines if "key" in line)


@pytest.fixture
def serial(tmp_path: Path, _few_methods: None) -> tuple[list[str], dict[str, tuple[Any, ...]]]:
    """Keys and answers of a run without Ray."""
    path = tmp_path / "serial" / "tightness.jsonl"
    keys = run(path).keys
    assert len(keys) == EVALUATIONS
    return keys, answers(path)


def wait_until(reached: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not reached() and time.monotonic() < end:
        time.sleep(0.05)
    return reached()


def test_a_node_killed_in_the_middle_costs_no_record_and_doubles_none(
    tmp_path: Path, nodes: Any, cluster: Cluster, watched: Path, serial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, expected = serial
    doomed = next(node for node in nodes.list_all_nodes() if node is not nodes.head_node)
    (watched / on_workers.DOOMED).write_text(doomed.node_id)

    def on_doomed() -> list[str]:
        return [key for key, node in on_workers.begun(watched) if node == doomed.node_id]

    def kill() -> None:
        if wait_until(lambda: len(on_doomed()) > on_workers.BEFORE):  # the last of them is under way, and does not end
            nodes.remove_node(doomed, allow_graceful=False)

    monkeypatch.setattr(evaluators, "answer", on_workers.answer_watched)
    killer = threading.Thread(target=kill)
    killer.start()
    path = tmp_path / "cluster" / "tightness.jsonl"
    outcome = run(path, cluster=cluster)
    killer.join()
    tries = on_workers.begun(watched)
    assert len(on_doomed()) == on_workers.BEFORE + 1
    (again,) = [key for key, count in Counter(key for key, _ in tries).items() if count > 1]
    assert {node for key, node in tries if key == again} == {doomed.node_id, nodes.head_node.node_id}
    assert answers(path) == expected
    assert outcome.keys == keys
    assert written(path) == Counter(dict.fromkeys(keys, 1))
    assert (outcome.evaluated, outcome.reused) == (EVALUATIONS, 0)


def test_a_killed_driver_goes_on_where_it_was(tmp_path: Path, nodes: Any, cluster: Cluster, serial: Any) -> None:
    keys, expected = serial
    path = tmp_path / "cluster" / "tightness.jsonl"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(path), nodes.address], cwd=ROOT)
    try:
        assert wait_until(lambda: (path.exists() and len(records_at(path)) >= 3) or driver.poll() is not None)
    finally:
        driver.kill()
    assert driver.wait() == -signal.SIGKILL
    before = len(records_at(path))
    assert 3 <= before < EVALUATIONS
    outcome = run(path, cluster=cluster)
    assert (outcome.evaluated, outcome.reused) == (EVALUATIONS - before, before)
    assert answers(path) == expected
    assert outcome.keys == keys
    assert written(path) == Counter(dict.fromkeys(keys, 1))


def test_evaluations_run_in_the_main_thread_for_their_limits_of_time(cluster: Cluster) -> None:
    cluster.submit("where", on_workers.where_it_runs)
    assert cluster.finished() == ("where", {"main thread": True, "threads": 1})


def test_jobs_get_the_gpus_they_ask_for_and_none_waits_for_one_that_does_not_exist(with_gpus: Any) -> None:
    halves = with_gpus(0.5)
    for name in ("first", "second"):
        halves.submit(name, on_workers.gpus_granted)
    assert dict(halves.finished() for _ in range(2)) == {"first": [0], "second": [0]}
    with pytest.raises(ClusterError, match=r"got jobs of 1 CPU, 2 GPU and nodes with at most 1 CPU, 1 GPU"):
        with_gpus(2)


def test_a_worker_with_other_code_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipbounds.cluster.code_of", lambda package: "of another version")
    cluster.submit("", on_workers.gpus_granted)
    with pytest.raises(ClusterError, match="all nodes must have the same lipbounds"):
        cluster.finished()


def test_the_report_has_the_same_numbers(cluster: Cluster) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.TransformerEncoderLayer(12, 3, 16, dropout=0.0, batch_first=True) for _ in range(2)]
    model, inputs = nn.Sequential(*layers).eval(), torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))
    told: list[float] = []
    options: dict[str, Any] = {"radii": [0.5, 0.1], "bounds": ["yudin2025.biased", "yudin2025_ball.biased"]}
    report = measure(model, inputs, **options, cluster=cluster, progress=lambda what, share: told.append(share))
    assert to_json(report) == to_json(measure(model, inputs, **options))
    assert told == sorted(told)
    assert 0.9 < told[-1] <= 1


@pytest.mark.usefixtures("_one_thread")
def test_models_trained_on_a_cluster_give_the_answers_of_one_process(tmp_path: Path, cluster: Cluster) -> None:
    profile = dc.replace(  # where FGSM fools all
        PROFILES["quick"], settings=("none",), seeds=(0, 1), epochs=1, images=2, eps={"l_inf": (1.0,)}
    )

    def workshop(name: str) -> Workshop:
        return Workshop(Store(tmp_path / name / "robustness.jsonl"), tmp_path / name / ".work", load_digits_split())

    def without_times(run: Workshop) -> dict[str, Any]:
        moving = ("seconds", "environment")
        found = run.store.entries.items()
        return {k: {n: v for n, v in entry.flat.items() if n not in moving} for k, entry in found}

    alone, there = workshop("alone"), workshop("there")
    whole = robustness.run(alone, profile)
    # What is in the records is not made again.
    kept = [entry for entry in alone.store.entries.values() if entry.question["seed"] == 0]
    for entry in kept:
        there.store.adopt(entry, alone.store.environments[entry.environment])
    kept = list(there.store.entries.values())
    places: list[str] = []
    assert robustness.run(there, profile, cluster=cluster, advance=places.append)["settings"] == whole["settings"]
    assert len(places) == robustness.pieces(profile)
    assert all(there.store.entries[entry.key] is entry for entry in kept)
    assert without_times(there) == without_times(alone)
    assert written(there.store.path) == Counter(dict.fromkeys(alone.store.entries, 1))
    assert there.store.made == alone.store.made


def test_a_lost_evaluation_is_a_failed_record_that_is_tried_again(
    tmp_path: Path, cluster: Cluster, with_gpus: Any, serial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, expected = serial
    path = tmp_path / "cluster" / "tightness.jsonl"
    monkeypatch.setattr("lipbounds.cluster.RETRIES", 0)
    monkeypatch.setattr(evaluators, "answer", on_workers.answer_but_exact_dies)
    run(path, cluster=with_gpus(0.0), quick=True)
    (failed,) = [each for each in records_at(path).values() if each.status == "failed"]
    assert (failed.question.bound, failed.question.layer) == ("exact", 0)
    assert "no worker came back with it: WorkerCrashedError" in failed.error
    outcome = run(path)
    assert outcome.evaluated == EVALUATIONS - 2 * len(NAMES) + 1
    assert answers(path) == expected
    assert outcome.keys == keys


# -- without a cluster ---------------------------------------------------------------------------------------------


class OneLost:
    """A cluster that comes back without the first model; the others it makes here."""

    room = True

    def __init__(self) -> None:
        self.jobs: list[tuple[Any, ...]] = []

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def share(self, content: Any) -> Any:
        return content

    def submit(self, *job: Any) -> None:
        self.jobs.append(job)

    def finished(self) -> tuple[Any, Any]:
        way, function, *arguments = self.jobs.pop(0)
        return way, function(*arguments) if way.seed else Lost("WorkerCrashedError: it died")


def test_a_lost_model_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    ways = [recipe(SETTINGS["none"], None, epochs=1, seed=seed) for seed in (0, 1)]
    place = Workshop(Store(tmp_path / "robustness.jsonl"), tmp_path / ".work", load_digits_split())
    done = []
    with pytest.raises(ClusterError, match=r"got none of none, seed 0 \(WorkerCrashedError: it died\); run the same"):
        done.extend(answered_on(cast("Cluster", OneLost()), place, ways, lambda model: None))
    assert [entry.question["seed"] for entry in place.store.entries.values()] == [1]


def test_without_ray_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["tightness", "--ray", "--results", str(tmp_path)], [tiny_model()]) == MISUSE
    assert capsys.readouterr().err == (f"bench: --ray needs Ray, which is not installed; {install_advice('ray')}\n")


REFUSED = {
    "a task taken for an address": (["--ray", "tightness"], "must be host:port, auto or local, got 'tightness'"),
    "half a GPU more": (["tightness", "--ray", "--gpus-per-job", "1.5"], "a share below 1 or a whole number, got 1.5"),
    "a negative GPU": (["tightness", "--ray", "--gpus-per-job", "-1"], "a share below 1 or a whole number, got -1"),
    "GPUs without Ray": (["tightness", "--gpus-per-job", "1"], "--gpus-per-job goes with --ray"),
    "a task that runs here only": (["speed", "--ray"], "the tasks tightness, balls, robustness, all, got speed"),
    "models in processes and on a cluster": (
        ["robustness", "--jobs", "2", "--ray"],
        "--ray and --jobs do not go together",
    ),
    "GPUs for models": (["robustness", "--gpus-per-job", "1", "--ray"], "--gpus-per-job goes with the tasks tightness"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_run_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main([*arguments, "--results", str(tmp_path)], [tiny_model()])
    except SystemExit as left:  # the parser's own
        status = left.code
    assert status == MISUSE
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_torch_cannot_use_is_named() -> None:
    case = tiny_case()
    asked = dc.replace(question("tightness", case, registry.get("exact")), device="cuda")
    with pytest.raises(ClusterError, match="a job with a GPU needs a torch with CUDA"):
        evaluators.answer(case.block, asked, 1.0, None, "")


def test_a_worker_with_another_version_of_a_bound_is_named() -> None:
    case = tiny_case()
    asked = dc.replace(question("tightness", case, registry.get("exact")), bound_version=99)
    with pytest.raises(ClusterError, match=r"got version \d of exact on a worker and 99 at the driver"):
        evaluators.answer(case.block, asked, 1.0, None, "")


def test_a_block_is_sent_without_what_it_was_cut_from() -> None:
    block = tiny_block()
    wide = block.replace(x=torch.zeros(10**6, 4, dtype=torch.float64)[:3].requires_grad_())
    assert wide.logits.isfinite().all()  # caches them on the block
    assert len(pickle.dumps(detached_copy(wide))) < 10_000
    assert torch.equal(pickle.loads(pickle.dumps(detached_copy(block))).logits, block.logits)
