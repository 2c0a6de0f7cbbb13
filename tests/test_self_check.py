"""The self check: two processes that meet on this machine, and its judgement of reports that no machine here makes."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mask2dit_jax import self_check
from mask2dit_jax.errors import UserError
from mask2dit_jax.self_check import Report, judge

ROOT = Path(__file__).parents[1]
CHECKS = ["devices", "versions", "bucket", "psum", "memory", "disk"]


def run_two(*flags: tuple[str, ...], paths: tuple[str, str] = ("", "")) -> list[tuple[int, str, str]]:
    """Two workers of two devices each, with flags of their own: exit code, stdout, stderr."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    workers = []
    for number, (own, path) in enumerate(zip(flags, paths, strict=True)):
        environment = {
            **os.environ,
            **{"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2", "PROCESS_ID": str(number), "PYTHONPATH": path},
            **{"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        }
        command = [sys.executable, "-m", "mask2dit_jax.self_check", "--min_memory_gib=0.1", "--min_disk_gib=0.1", *own]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        workers.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
    outputs = [worker.communicate(timeout=1200) for worker in workers]
    return [(worker.returncode, *output) for worker, output in zip(workers, outputs, strict=True)]


def lines_of(stdout: str) -> dict[str, str]:
    """By check; what the CPU's collectives print of themselves is left out."""
    lines = [line for line in stdout.splitlines() if line.startswith(("ok", "FAILED"))]
    return {line.split()[1]: line for line in lines}


def test_two_workers_that_are_fine(tmp_path):
    (code_0, stdout_0, _), (code_1, stdout_1, _) = run_two(*[(f"--bucket={tmp_path}", "--mesh=1x2x2x1")] * 2)
    lines = lines_of(stdout_0)
    assert (code_0, code_1) == (0, 0)
    assert list(lines) == CHECKS
    assert all(line.startswith("ok ") for line in lines.values())
    assert "4 x cpu: 2 on each of 2 workers" in lines["devices"]
    assert lines_of(stdout_1) == {}
    assert list(tmp_path.iterdir()) == []


def test_one_of_two_differs_and_cannot_write(tmp_path):
    """Both end with the same code, and the one that is fine says what ails the other."""
    packages = tmp_path / "flax-0.0.1.dist-info"
    packages.mkdir()
    (packages / "METADATA").write_text("Metadata-Version: 2.1\nName: flax\nVersion: 0.0.1\n")
    (bucket := tmp_path / "bucket").mkdir()
    (code_0, stdout, stderr_0), (code_1, _, stderr_1) = run_two(
        (f"--bucket={bucket}",), (f"--bucket={bucket / 'missing'}",), paths=("", str(tmp_path))
    )
    lines = lines_of(stdout)
    assert (code_0, code_1) == (1, 1)
    assert [name for name, line in lines.items() if line.startswith("FAILED")] == ["versions", "bucket"]
    assert "but 0.0.1 on worker 1 (" in lines["versions"]
    assert lines["versions"].endswith("install the same versions on all workers (launch/install.sh)")
    assert "FileNotFoundError" in lines["bucket"]
    assert "(on worker 1)" in lines["bucket"]
    for stderr in (stderr_0, stderr_1):
        assert stderr.splitlines()[-1] == "error: self check failed: versions, bucket; worker 0 prints the reason"
        assert "Traceback" not in stderr


FINE = Report(
    host="w0",
    platform="tpu",
    device_kind="TPU v5 lite",
    num_devices=4,
    has_tpu=True,
    versions={"jax": "0.10.2", "commit": "a"},
    bucket="",
    total="",
    memory_gib=100.0,
    disk_gib=50.0,
)


def failures(*changes: dict) -> dict[str, str]:
    """What is judged of workers that are fine but for these changes."""
    reports = [dataclasses.replace(FINE, host=f"w{number}", **change) for number, change in enumerate(changes)]
    return {result.name: str(result) for result in judge(reports, "gs://b", 8.0, 10.0) if result.remedy}


def test_nothing_wrong():
    assert failures({}, {}, {}) == {}


@pytest.mark.parametrize(
    ("change", "name", "line"),
    [
        ({"num_devices": 3}, "devices", "3 x TPU v5 lite on worker 1, 4 x TPU v5 lite elsewhere"),
        ({"platform": "cpu", "device_kind": "cpu"}, "devices", "JAX does not use the TPU of worker 1"),
        (
            {"versions": {"jax": "0.9", "commit": "b"}},
            "versions",
            "jax 0.10.2, but 0.9 on worker 1 (w1); commit a, but b",
        ),
        ({"bucket": "OSError: no"}, "bucket", "OSError: no (on worker 1)"),
        ({"total": "ArithmeticError: wrong"}, "psum", "ArithmeticError: wrong (on worker 1)"),
        ({"memory_gib": 7.96}, "memory", "8.0 GiB on worker 1, 8 needed"),
        ({"disk_gib": 2.0}, "disk", "2.0 GiB on worker 1, 10 needed"),
    ],
)
def test_the_worker_that_is_wrong_is_named(change, name, line):
    found = failures({}, change, {})
    assert list(found) == [name]
    assert found[name].startswith(f"FAILED {name:10}{line}")


def test_many_workers_are_not_all_listed():
    found = failures(*[{}] * 20, *[{"versions": {"jax": "0.9", "commit": "a"}, "bucket": "no"}] * 12)
    assert "0.9 on worker 23 (w23) and 8 more" in found["versions"]
    assert "(on workers 20, 21, 22, 23, 24, 25, 26, 27, ...)" in found["bucket"]


@pytest.mark.parametrize("mesh", ["2x2", "0x1x1x4", "1,2,2,1", "axbxcxd"])
def test_bad_mesh(mesh):
    with pytest.raises(UserError, match="is not four sizes"):
        self_check.parse_mesh(mesh)


def test_a_mesh_of_other_devices():
    with pytest.raises(ValueError, match="a mesh of 1x3x2x1 has 6 places"):
        self_check.sum_over_mesh((1, 3, 2, 1))
