"""Environment variables are checked before waiting for any process. tests/test_self_check.py joins processes."""

import os
import subprocess
import sys

import jax
import pytest

from mask2dit_jax import errors
from mask2dit_jax.errors import UserError
from mask2dit_jax.parallel import distributed


@pytest.fixture
def initialized(monkeypatch):
    """Record what JAX is called with, without connecting."""
    for name in (*distributed.VARIABLES, "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(errors, "_leave", sys.exit)  # put back afterwards: this process is not one of several
    names = ("jax_cpu_collectives_implementation", "jax_enable_preemption_service")
    before = {name: getattr(jax.config, name) for name in names}
    yield calls
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def tpu(monkeypatch):
    """Make JAX believe that this host has chips and libtpu."""
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    yield
    jax.config.update("jax_platforms", platforms)


def tell(monkeypatch, address="localhost:1234", count="2", number="1"):
    for name, value in zip(distributed.VARIABLES, (address, count, number), strict=True):
        monkeypatch.setenv(name, value)


def test_a_single_host_waits_for_nobody(initialized):
    distributed.initialize()
    assert initialized == []


def test_variables(initialized, monkeypatch):
    tell(monkeypatch)
    distributed.initialize(timeout_s=5)
    assert initialized == [
        {
            "coordinator_address": "localhost:1234",
            "num_processes": 2,
            "process_id": 1,
            "initialization_timeout": 65,
        }
    ]
    assert jax.config.jax_cpu_collectives_implementation == "gloo"


@pytest.mark.parametrize("is_asked_for", [False, True])
@pytest.mark.usefixtures("initialized")
def test_sigterm_ends_who_does_not_look_for_it(monkeypatch, is_asked_for):
    tell(monkeypatch)
    distributed.initialize(sigterm_is_asked_for=is_asked_for)
    assert jax.config.jax_enable_preemption_service == is_asked_for


@pytest.mark.parametrize("hosts", ["", "10.0.0.1,10.0.0.2"])
@pytest.mark.usefixtures("tpu")
def test_pod_finds_its_workers_itself(initialized, monkeypatch, hosts):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", hosts)
    distributed.initialize()
    assert initialized == [{"initialization_timeout": 360}]


@pytest.mark.usefixtures("tpu")
def test_tpu_host_that_is_alone(initialized, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    distributed.initialize()
    assert initialized == []


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"count": "", "number": ""}, "NUM_PROCESSES and PROCESS_ID must be set too"),
        ({"address": "localhost"}, "COORDINATOR_ADDRESS=localhost is not of the form host:port"),
        ({"number": "2"}, "PROCESS_ID=2 must be a number from 0 to NUM_PROCESSES=2 less one"),
        ({"count": "two"}, "NUM_PROCESSES=two"),
    ],
)
def test_bad_variables(initialized, monkeypatch, told, message):
    tell(monkeypatch, **told)
    with pytest.raises(UserError, match=message):
        distributed.initialize()
    assert initialized == []


def test_alone_it_ends_with_one_line():
    """Run in a process of its own, which ends."""
    program = (
        "from mask2dit_jax.errors import run_main; from mask2dit_jax.parallel.distributed import initialize; "
        "run_main(lambda argv: initialize(timeout_s=2))"
    )
    told = {"COORDINATOR_ADDRESS": "localhost:9", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **told}, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1] == (
        "error: not all processes have met through localhost:9 within 2 s; start all of them"
    )


def test_jax_says_no(initialized, monkeypatch):
    def fail(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: no answer\nfrom a page of C++")

    tell(monkeypatch)
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(
        UserError, match=r"cannot join the others through localhost:1234: DEADLINE_EXCEEDED: no answer$"
    ):
        distributed.initialize()


def test_whatever_fails_on_the_way_out_it_leaves():
    """Run in a process of its own, because with stdout closed flushing raises."""
    program = (
        "import sys; from mask2dit_jax.errors import UserError, leave_at_once, run_main; "
        "leave_at_once(is_first=False); sys.stdout.close(); "
        "run_main(lambda argv: (_ for _ in ()).throw(UserError('this is why')))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1] == "error: this is why"
