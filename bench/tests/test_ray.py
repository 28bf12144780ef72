"""A real Ray cluster of two nodes: the same records as a serial run, whatever dies on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import evaluators
from bench.machine import ROOT
from bench.store import RecordStore, read
from bench.tasks import tightness
from bench.tests import on_workers
from bench.tests.samples import tiny_model
from lipbounds import registry
from lipbounds.cluster import ClusterError, Lost, connect


pytest.importorskip("ray")
NAMES = ("exact", "lanczos", "lanczos_certificate", "yudin2025.biased", "yudin2025.theorem3")
EVALUATIONS = 6 * len(NAMES)
PATIENCE = 240.0  # seconds: Ray starts processes, which takes long where others run
DRIVER = """
import sys
from pathlib import Path
from bench import evaluators
from bench.tests import on_workers, test_ray
evaluators.answer = on_workers.answer_slowly
test_ray.take_few(lambda name, value: setattr(test_ray.registry, name, value))
test_ray.run(Path(sys.argv[1]), sys.argv[2])
"""

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves files and sockets to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def cluster(watched: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes of this machine with a core each; one cluster at a time, whichever process of pytest needs it."""
    from filelock import FileLock
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch, FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv(on_workers.WATCHED, str(watched))
        patch.delenv("RAY_ADDRESS", raising=False)
        nodes = Cluster(initialize_head=True, head_node_args=node)
        nodes.add_node(**node | {"num_gpus": 1})  # of which torch sees nothing: only what Ray gives out is looked at
        try:
            yield nodes
        finally:
            nodes.shutdown()


def take_few(put: Callable[[str, Any], None]) -> None:
    """As if nothing else were registered, which saves most of the time."""
    chosen = [registry.get(name) for name in NAMES]
    put("select", lambda **_: chosen)
    put("refuted", list)


@pytest.fixture
def _few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    take_few(lambda name, value: monkeypatch.setattr(registry, name, value))


def run(path: Path, address: str | None = None, **options: Any) -> tightness.Outcome:
    with RecordStore(path) as store:
        if address is None:
            return tightness.run(store, [tiny_model()], **options)
        with connect(address) as found:
            return tightness.run(store, [tiny_model()], cluster=found, **options)


def answers(path: Path) -> dict[str, tuple[Any, ...]]:
    """All but the time taken and the environment, which differ between runs."""
    return {
        key: (each.question, each.tokens, each.kind, each.value, each.status, each.error, each.terms, each.details)
        for key, each in read(path).records.items()
    }


def written(path: Path) -> Counter[str]:
    """How often each key stands in the file."""
    lines = map(json.loads, path.read_text().splitlines())
    return Counter(line["key"] for line in lines if "key" in line)


@pytest.fixture
def serial(tmp_path: Path, _few_methods: None) -> tuple[list[str], dict[str, tuple[Any, ...]]]:
    """Keys and answers of a run without Ray."""
    path = tmp_path / "serial" / "tightness.jsonl"
    return run(path).keys, answers(path)


def wait_until(reached: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not reached() and time.monotonic() < end:
        time.sleep(0.05)
    return reached()


def test_a_node_killed_in_the_middle_costs_no_record_and_doubles_none(
    tmp_path: Path, cluster: Any, watched: Path, serial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, expected = serial
    doomed = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
    (watched / on_workers.DOOMED).write_text(doomed.node_id)

    def on_doomed() -> list[str]:
        return [key for key, node in on_workers.begun(watched) if node == doomed.node_id]

    def kill() -> None:
        if wait_until(lambda: len(on_doomed()) > on_workers.BEFORE):  # the last of them is under way, and does not end
            cluster.remove_node(doomed, allow_graceful=False)

    monkeypatch.setattr(evaluators, "answer", on_workers.answer_watched)
    killer = threading.Thread(target=kill)
    killer.start()
    path = tmp_path / "cluster" / "tightness.jsonl"
    outcome = run(path, cluster.address)
    killer.join()
    tries = on_workers.begun(watched)
    assert len(on_doomed()) == on_workers.BEFORE + 1
    (again,) = [key for key, count in Counter(key for key, _ in tries).items() if count > 1]
    assert {node for key, node in tries if key == again} == {doomed.node_id, cluster.head_node.node_id}
    assert answers(path) == expected
    assert outcome.keys == keys
    assert written(path) == Counter(dict.fromkeys(keys, 1))
    assert (outcome.evaluated, outcome.reused) == (EVALUATIONS, 0)


def test_a_killed_driver_goes_on_where_it_was(tmp_path: Path, cluster: Any, serial: Any) -> None:
    keys, expected = serial
    path = tmp_path / "cluster" / "tightness.jsonl"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(path), cluster.address], cwd=ROOT)
    try:
        assert wait_until(lambda: path.exists() and len(read(path).records) >= 3 or driver.poll() is not None)
    finally:
        driver.kill()
    assert driver.wait() == -signal.SIGKILL
    before = len(read(path).records)
    assert 3 <= before < EVALUATIONS
    outcome = run(path, cluster.address)
    assert (outcome.evaluated, outcome.reused) == (EVALUATIONS - before, before)
    assert answers(path) == expected
    assert outcome.keys == keys
    assert written(path) == Counter(dict.fromkeys(keys, 1))


def test_a_job_that_kills_its_worker_each_time_is_lost_and_the_others_come_back(cluster: Any) -> None:
    with connect(cluster.address) as found:
        found.submit("dies", on_workers.killed)
        found.submit("lives", on_workers.where_it_runs)
        results = dict(found.finished() for _ in range(2))
    assert isinstance(results["dies"], Lost)
    assert "died" in results["dies"].reason
    assert results["lives"] == {"main thread": True, "threads": 1}
