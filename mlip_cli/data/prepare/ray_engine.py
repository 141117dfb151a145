"""Work in tasks of Ray Core, on a Ray of this machine's own or on a cluster. Imported only where it is asked for.

A task gets one part and returns its small result. The driver alone reads the source, counts and finishes. So the
bytes of the output are those of any other engine, whatever the order in which Ray works.
"""

import logging
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from mlip_cli import __version__
from mlip_cli.data.prepare.workers import worker_died
from mlip_cli.errors import UsageError
from mlip_cli.machine import usable_cores
from mlip_cli.terminal.output import plural, say

Task = TypeVar("Task")
Result = TypeVar("Result")

ADDRESS = "RAY_ADDRESS"
"""The variable that names a cluster to Ray's own commands, and to us; auto is the one that runs on this machine."""
RETRIES = 3
"""Ray starts the task of a killed worker this often again."""
TASKS_A_CPU = 2
"""One at work and one that waits, so that no process waits for the driver."""
CONNECT_S = 10.0
"""Time in which a cluster must answer."""
ENVIRONMENT = {
    "RAY_task_oom_retries": str(RETRIES),  # a task that needs too much memory would be started again without end
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",  # else Ray prints to stdout, which is data, that a worker died
}
"""What Ray reads when it is imported, and its processes when they start."""
TOKEN = "RAY_AUTH_TOKEN"
"""The secret by which processes of a Ray know each other. Without it a Ray of our own writes one to ~/.ray."""
OWN_TOKEN = secrets.token_hex(32)
"""The same as long as this process lives: Ray reads it once."""
SESSIONS = "/tmp"
"""Names of sockets have at most 107 bytes, so they cannot lie in every temporary folder."""


def check_installed() -> None:
    """See that Ray is installed, without the seconds that importing it takes.

    Raises:
        UsageError: it is not.
    """
    if find_spec("ray") is None:
        raise UsageError('--engine ray: ray is not installed; pip install "mlip-cli[ray]"')


def run_parallel(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    num_workers: int | None,
    folder: Path,
    at_once: int = 1,
) -> Iterator[Result]:
    """Yield results of `function` in the order in which they finish. When the driver leaves, the tasks end.

    Args:
        num_workers: processes of a local Ray, by default one for each core; of a cluster, the most tasks at a time.
        folder: where `function` writes, which every node must see under the same name.
        at_once: tasks that share a core, each in a process. If they are several, a cluster too gets no more of them at
            a time than `num_workers`, or this machine's cores, have in hand: they divide a limit among them.

    Raises:
        UsageError: there is no such cluster, or a node does not see `folder`.
        RunError: a worker was killed again and again. Errors of `function` are raised here too.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if ADDRESS not in os.environ:
        os.environ.setdefault(TOKEN, OWN_TOKEN)
    import ray

    with _started(num_workers) as most:
        _check_nodes(folder)
        remote = ray.remote(_run).options(max_retries=RETRIES, num_cpus=1 / at_once)
        references = (remote.remote(function, os.getcwd(), task) for task in tasks)
        if at_once > 1:
            most = (num_workers or usable_cores()) * at_once
        waiting = list(islice(references, most))
        while waiting:
            [done], waiting = ray.wait(waiting, num_returns=1)
            result = _result(done)
            waiting += islice(references, 1)
            yield result


def _run(function: Callable[[Task], Result], folder: str, task: Task) -> Result:
    """Body of a task: `function` in the driver's folder, since a source may be named by relative paths."""
    os.chdir(folder)
    return function(task)


def _result(reference: Any) -> Any:
    """What a task returned.

    Raises:
        RunError: its worker was killed again and again. Errors of the task are raised as they were there.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        words = str(error)  # the traceback there
        error.cause.add_note(f"in a worker process:\n{words}")
        raise error.cause from None
    except ray.exceptions.RayError:
        raise worker_died(f"{1 + RETRIES} times in the same part") from None


@contextmanager
def _started(num_workers: int | None) -> Iterator[int]:
    """A Ray of our own, or the cluster that RAY_ADDRESS names. Yields the most tasks to hand over at a time.

    Raises:
        UsageError: there is no such cluster.
        RunError: Ray does not start.
    """
    import ray

    address = os.environ.get(ADDRESS)
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray puts its own in its place, and takes that away with itself
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with tempfile.TemporaryDirectory(prefix="mlip-", dir=SESSIONS, ignore_cleanup_errors=True) as sessions:
        try:
            if address:
                _check_reachable(address)
                ray.init(address=address, **quiet)
            else:
                cpus = num_workers or usable_cores()
                ray.init("local", num_cpus=cpus, include_dashboard=False, _temp_dir=sessions, **quiet)
            signal.signal(signal.SIGTERM, on_sigterm)
            cpus = int(ray.cluster_resources().get("CPU", 1))
            where = f"{plural(len(_nodes()), 'node')} of {address}" if address else "a Ray of this command alone"
            say(f"ray: {plural(cpus, 'process', 'processes')} on {where}")
            yield num_workers if address and num_workers else TASKS_A_CPU * cpus
        except ConnectionError as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UsageError(f"{ADDRESS} {address}: {reason}; start the cluster, or unset {ADDRESS}") from None
        finally:
            ray.shutdown()
            signal.signal(signal.SIGTERM, on_sigterm)


def _check_reachable(address: str) -> None:
    """See that something listens there: Ray itself tries for minutes.

    Raises:
        UsageError: it does not, or it is the address of Ray's client, whose tasks need not see the driver's disk.
        ConnectionError: nothing answers there.
    """
    if address.startswith("ray://"):
        raise UsageError(f"{ADDRESS} {address}: run the command on a node of the cluster, with {ADDRESS}=auto")
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            raise ConnectionError(error.strerror or "no answer") from error


def _nodes() -> list[dict[str, Any]]:
    """The nodes that take tasks."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def _check_nodes(folder: Path) -> None:
    """See that each node finds a file that this process writes to `folder`.

    Raises:
        UsageError: one does not, or it has another version of this package.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = folder.absolute() / f".probe-{uuid4().hex}.tmp"
    probe.touch()
    try:
        for node in _nodes():
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look = ray.remote(_why_not).options(num_cpus=0, scheduling_strategy=there)
            try:
                problem = ray.get(look.remote(os.getcwd(), str(probe), __version__))
            except ray.exceptions.RayError as error:
                problem = f"cannot run mlip-cli ({str(error).strip().splitlines()[-1]}); install {__version__} there"
            if problem:
                raise UsageError(f"node {node['NodeManagerHostname']} ({node['NodeName']}): {problem}")
    finally:
        probe.unlink(missing_ok=True)


def _why_not(folder: str, probe: str, version: str) -> str | None:
    """Body of a task: why this node cannot work for a driver in `folder` that has written `probe`; None: it can."""
    cure = "name a folder on a disk that all nodes share"
    if version != __version__:
        return f"has mlip-cli {__version__}, this machine {version}; install the same one on all"
    if not os.path.isdir(folder):
        return f"has no folder {folder}, where this command runs; start it in one that all nodes share"
    if not os.path.exists(probe):
        return f"does not see what this machine writes to {os.path.dirname(probe)}; {cure}"
    return None
