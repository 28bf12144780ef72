"""Jobs on a Ray cluster: handed out while there is room, tried again where a worker dies, collected as they finish.

Ray is imported when a cluster is asked for: a single machine needs none. A job is a function of an installed package
and its arguments; the driver, which hands jobs out, is the only process that keeps what comes back.
"""

from __future__ import annotations

import dataclasses as dc
import functools
import hashlib
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lipbounds.errors import LipboundsError, install_advice


RETRIES = 3  # of a job whose worker or node died; after that the job is lost, and the others go on
QUEUED = 2  # jobs handed out for each that can run at a time: the next one is there when one ends
PATIENCE = 60.0  # seconds without a result after which it is asked whether jobs can run at all
HERE = Path(__file__).parent


class ClusterError(LipboundsError):
    """There is no cluster that could run the jobs, or its code is not that of the driver."""


@dc.dataclass(frozen=True)
class Lost:
    """In place of a result: the worker died at each of the tries.

    Args:
        reason: what Ray says of it.
    """

    reason: str


class Cluster:
    """Jobs of one kind on a connected cluster; made by `connect`.

    Args:
        ray: the module.
        gpus_per_job: GPUs that each job asks for.
    """

    def __init__(self, ray: Any, gpus_per_job: float) -> None:
        self._ray = ray
        self.gpus_per_job = gpus_per_job
        self._wanted = {"CPU": 1.0, **({"GPU": gpus_per_job} if gpus_per_job else {})}
        self._run = ray.remote(num_cpus=1, num_gpus=gpus_per_job, max_retries=RETRIES)(_run)
        self._jobs: dict[Any, Any] = {}
        self.check()

    def share(self, content: Any) -> Any:
        """What stands for the content among the arguments of many jobs, so that a node is sent it once.

        Args:
            content: anything that can be pickled.
        """
        return self._ray.put(content)

    def submit(self, job: Any, function: Callable[..., Any], *arguments: Any) -> None:
        """Hand out one job.

        Args:
            job: what `finished` returns with the result; it stays here.
            function: of a module that workers can import.
            *arguments: pickled, or what `share` returned.
        """
        package = function.__module__.partition(".")[0]
        self._jobs[self._run.remote(function, package, code_of(package), *arguments)] = job

    @property
    def device(self) -> str:
        """Where jobs compute: on the GPU they asked for, or on the CPU."""
        return "cuda" if self.gpus_per_job else "cpu"

    @property
    def room(self) -> bool:
        """Whether a job handed out now would be begun soon."""
        resources = self._ray.cluster_resources()
        at_a_time = min(int(resources.get(name, 0.0) / count) for name, count in self._wanted.items())
        return len(self._jobs) < max(1, QUEUED * at_a_time)

    @property
    def busy(self) -> bool:
        """Whether jobs are handed out that have not come back."""
        return bool(self._jobs)

    def finished(self) -> tuple[Any, Any]:
        """Wait for one job; returns it with its result, or with `Lost`.

        Raises:
            ClusterError: no node is left that could run the jobs.
        """
        while not (done := self._ray.wait([*self._jobs], timeout=PATIENCE)[0]):
            self.check()
        job = self._jobs.pop(done[0])
        errors = self._ray.exceptions
        try:
            return job, self._ray.get(done[0])
        except errors.RayTaskError as error:  # the function raised: a bug, or what the user has to know
            if isinstance(error.cause, LipboundsError):
                raise error.cause from error
            raise
        except errors.RayError as error:
            return job, Lost(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")

    def check(self) -> None:
        """Ray waits for ever for what no node has: say so instead.

        Raises:
            ClusterError: no node has what one job asks for.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0.0) >= count for name, count in self._wanted.items()) for node in nodes):
            return
        most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in self._wanted}
        wanted, there = (
            ", ".join(f"{count:g} {name}" for name, count in each.items()) for each in (self._wanted, most)
        )
        raise ClusterError(
            f"a job must fit on one node of the Ray cluster, got jobs of {wanted} and nodes with at most {there}; "
            "lower --gpus-per-job, or add such a node (one may be on its way: wait for it) and run the command again."
        )


@contextmanager
def connect(address: str | None = None, *, gpus_per_job: float = 0.0, cores: int | None = None) -> Iterator[Cluster]:
    """A cluster until the end of the `with` block; what this started ends there, too.

    Args:
        address: `host:port` of the head of a cluster; "auto" for the one that RAY_ADDRESS or `ray start` on this
            machine names; "local" for a new one of this machine; None for "auto" if there is one, or else "local".
        gpus_per_job: GPUs that each job asks for: a share below 1, or a whole number.
        cores: how many jobs a new cluster of this machine runs at a time; one a core if None.

    Raises:
        ClusterError: Ray is missing, there is no cluster at the address, or none of its nodes can run a job.
    """
    if address not in (None, "local", "auto") and ":" not in address:
        raise ClusterError(
            f"the address of a Ray cluster must be host:port, auto or local, got {address!r}; without an address, "
            "write --ray as the last argument."
        )
    if not 0 <= gpus_per_job < float("inf") or (gpus_per_job > 1 and gpus_per_job % 1):
        raise ClusterError(
            f"gpus_per_job must be a share below 1 or a whole number, got {gpus_per_job:g}; Ray gives out no others."
        )
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ClusterError(f"--ray needs Ray, which is not installed; {install_advice('ray')}") from error
    folders = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, folders))}  # the same code, where the nodes share a disk
    try:
        ray.init(
            address=address,
            num_cpus=cores,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": environment},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"a Ray cluster must be running at {address or 'this machine'}, got {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}; start one with `ray start --head`, or leave the address out."
        ) from error
    try:
        yield Cluster(ray, gpus_per_job)
    finally:
        ray.shutdown()


def check_device(name: str) -> None:
    """On a worker: the device must be there.

    Args:
        name: cpu or cuda.

    Raises:
        ClusterError: it is not.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ClusterError(
            f"a job with a GPU needs a torch with CUDA on every node that has one, got torch {torch.__version__} on "
            f"{os.uname().nodename}; install one with CUDA there, or leave --gpus-per-job out."
        )


@functools.cache
def code_of(package: str) -> str:
    """Hash of the Python files of this library and of another package.

    Args:
        package: its name.
    """
    digest = hashlib.sha256()
    for name in sorted({"lipbounds", package}):
        for folder in map(Path, importlib.import_module(name).__path__):
            for path in sorted(folder.rglob("*.py")):
                digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _run(function: Callable[..., Any], package: str, code: str, *arguments: Any) -> Any:
    """On a worker: numbers of other code than the driver's would be filed under its name."""
    if code_of(package) != code:
        raise ClusterError(
            f"all nodes must have the same lipbounds as the driver, got other code in {HERE} on "
            f"{os.uname().nodename}; install the driver's version there."
        )
    return function(*arguments)
