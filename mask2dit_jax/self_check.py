"""Checks every worker before a job: devices, versions, the bucket, a sum over the mesh, memory and disk.

    python -m mask2dit_jax.self_check --bucket=gs://my-bucket/runs --mesh=1x16x4x1

Run it on all workers at once (launch/run.sh self_check ...). Worker 0 prints one line per check. All workers exit with
the same code.
"""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tensorstore
from absl import flags
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mask2dit_jax.errors import UserError, run_main
from mask2dit_jax.io.paths import is_remote
from mask2dit_jax.parallel import distributed
from mask2dit_jax.parallel.mesh import AXES

_BUCKET = flags.DEFINE_string("bucket", None, "Where the job will write: gs://BUCKET/FOLDER, or a local folder.")
_MESH = flags.DEFINE_string(
    "mesh", "", "Sizes of data x fsdp x context x tensor, e.g. 1x16x4x1. If empty, all devices lie along data."
)
_MEMORY = flags.DEFINE_float("min_memory_gib", 8, "Host memory in GiB that must be available on each worker.")
_DISK = flags.DEFINE_float("min_disk_gib", 10, "Disk space in GiB that must be free in each worker's current folder.")
_TIMEOUT = flags.DEFINE_integer("timeout_s", 600, "Seconds after which a check that hangs (on a lost chip) is aborted.")
flags.mark_flags_as_required(["bucket"])

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "mask2dit_jax")
ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Report:
    """The state of one worker, as it sees itself.

    Attributes:
        host: Host name.
        platform: JAX's platform of the local devices, such as "tpu".
        device_kind: JAX's name of the local devices, such as "TPU v5 lite".
        num_devices: Number of local devices.
        has_tpu: Whether the host has TPU device files, in use or not.
        versions: Package -> version; also the commit and a digest of the sources.
        bucket: Why the bucket cannot be used; empty if it can.
        total: Why the sum over the mesh failed; empty if it is right.
        memory_gib: Available host memory.
        disk_gib: Free disk space in the current folder.
    """

    host: str
    platform: str
    device_kind: str
    num_devices: int
    has_tpu: bool
    versions: dict[str, str]
    bucket: str
    total: str
    memory_gib: float
    disk_gib: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one check over all workers. Only a failed check has a remedy."""

    name: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        """Format the result as the line that worker 0 prints."""
        line = f"{'FAILED' if self.remedy else 'ok':7}{self.name:10}{self.found}"
        return f"{line}; {self.remedy}" if self.remedy else line


def main(argv):
    """Run all checks on this worker, exchange the reports and print the results.

    Raises:
        UserError: A check failed, or the workers cannot exchange data.
    """
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]}; flags have the form --name=value")
    shape = parse_mesh(_MESH.value)
    distributed.initialize()
    hangs = f"no answer within {_TIMEOUT.value} s, so a worker, a chip or the bucket hangs; recreate the slice"
    try:
        with distributed.exit_after(_TIMEOUT.value, hangs):
            reports = gather(look_around(_BUCKET.value, shape))
    except RuntimeError as error:
        raise UserError(f"the workers cannot exchange data ({_one_line(error)}); recreate the slice") from error
    results = judge(reports, _BUCKET.value, _MEMORY.value, _DISK.value)
    if jax.process_index() == 0:
        print(*results, sep="\n", flush=True)
    failed = [result.name for result in results if result.remedy]
    if failed:
        raise UserError(f"self check failed: {', '.join(failed)}; worker 0 prints the reason")


def parse_mesh(text: str) -> tuple[int, ...]:
    """Parse "1x16x4x1" to (1, 16, 4, 1), and the empty string to ().

    Raises:
        UserError: `text` is not four positive sizes.
    """
    if not text:
        return ()
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text):
        raise UserError(f"--mesh={text} is not four sizes ({' x '.join(AXES)}) like 1x16x4x1")
    return tuple(int(size) for size in text.split("x"))


# Checks that each worker makes for itself


def look_around(bucket: str, shape: tuple[int, ...]) -> Report:
    """Report the state of this worker.

    Args:
        bucket: Folder that the job will write to, local or gs://.
        shape: Sizes of the mesh axes; all devices lie along the first axis if empty.
    """
    devices = jax.local_devices()
    return Report(
        host=socket.gethostname(),
        platform=devices[0].platform,
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        has_tpu=any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*")),
        versions=versions(),
        bucket=_why_not(lambda: write_and_read(epath.Path(bucket))),
        total=_why_not(lambda: sum_over_mesh(shape or (jax.device_count(), 1, 1, 1))),
        memory_gib=available_memory() / 2**30,
        disk_gib=shutil.disk_usage(Path.cwd()).free / 2**30,
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages, the commit and a digest of the sources."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return {**found, "commit": _commit(), "sources": _digest_of_sources()}


def _commit() -> str:
    """Return the commit of the checkout, or the one that launch/install.sh or the Dockerfile has recorded."""
    if (ROOT / "COMMIT").is_file():
        return (ROOT / "COMMIT").read_text().strip()
    try:
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def _digest_of_sources() -> str:
    """Return a digest of the source files, because the commit does not reveal a file edited on one worker."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("mask2dit_jax/**/*.py"), *ROOT.glob("configs/**/*.py")]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def write_and_read(folder: epath.Path) -> None:
    """Write a file to `folder`, read it back and delete it.

    A local folder must exist already, so that a mistyped name does not create one.

    Raises:
        Exception: Whatever keeps this worker from using the folder.
    """
    content = uuid.uuid4().hex
    probe = folder / f".self_check_{content}"
    probe.write_text(content)
    try:
        if probe.read_text() != content:
            raise OSError("the content read differs from the content written")
    finally:
        probe.unlink()
    if is_remote(folder):
        _write_and_read_as_checkpoints_do(f"{probe}_array/", content)


def _write_and_read_as_checkpoints_do(folder: str, content: str) -> None:
    """Write and read through TensorStore, which checkpoints use for arrays and which has credentials of its own."""
    store = tensorstore.KvStore.open(folder).result()
    store.write("array", content).result()
    try:
        if store.read("array").result().value != content.encode():
            raise OSError("TensorStore, which writes checkpoints, reads other content than it wrote")
    finally:
        store.delete_range(tensorstore.KvStore.KeyRange()).result()


def sum_over_mesh(shape: tuple[int, ...]) -> None:
    """Check psum over each axis of the mesh and over all axes; device i contributes i + 1.

    Raises:
        ValueError: The sizes do not multiply to the number of devices.
        ArithmeticError: A device of this worker received a wrong sum.
    """
    devices = jax.devices()
    if math.prod(shape) != len(devices):
        raise ValueError(f"a mesh of {'x'.join(map(str, shape))} has {math.prod(shape)} places")
    mesh = Mesh(np.asarray(devices).reshape(shape), AXES)
    numbers = np.arange(1, len(devices) + 1, dtype=np.int32).reshape(shape)
    placed = jax.make_array_from_callback(shape, NamedSharding(mesh, PartitionSpec(*AXES)), lambda i: numbers[i])
    for axes in (*((axis,) for axis, size in zip(AXES, shape, strict=True) if size > 1), AXES):
        expected = numbers.sum(axis=tuple(AXES.index(axis) for axis in axes), keepdims=True)
        for shard in _psum(placed, mesh, axes).addressable_shards:
            if not np.array_equal(shard.data, expected[shard.index]):
                raise ArithmeticError(f"{shard.device} received a wrong sum over {' x '.join(axes)}")


def _psum(x: jax.Array, mesh: Mesh, axes: tuple[str, ...]) -> jax.Array:
    rest = PartitionSpec(*(None if axis in axes else axis for axis in AXES))
    summed = jax.shard_map(
        lambda block: jax.lax.psum(block, axes), mesh=mesh, in_specs=PartitionSpec(*AXES), out_specs=rest
    )
    return jax.jit(summed)(x)


def available_memory() -> int:
    """Return the memory in bytes that a new process could get.

    This is the kernel's MemAvailable, which includes reclaimable caches, or the physical memory where there is none.
    """
    try:
        kib = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(kib) * 1024


def _why_not(action: Callable[[], None]) -> str:
    """Run `action` and return its error, or "". Any error counts: credentials, network, a missing package."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {_one_line(error)}"
    return ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# Checks over all workers


def gather(report: Report) -> list[Report]:
    """Return the reports of all workers to each worker, in the order of their numbers."""
    return [Report(**fields) for fields in distributed.gather_json(dataclasses.asdict(report))]


def judge(reports: list[Report], bucket: str, min_memory_gib: float, min_disk_gib: float) -> list[Result]:
    """Return the result of each check, given the reports of all workers."""
    return [
        judge_devices(reports),
        judge_versions(reports),
        _judge_errors(
            "bucket",
            [report.bucket for report in reports],
            f"{bucket} is readable and writable",
            "create it, give the workers' service account access to it, or choose another",
        ),
        _judge_errors(
            "psum",
            [report.total for report in reports],
            "right over each axis and over all devices",
            f"the sizes of --mesh must multiply to {sum(report.num_devices for report in reports)}; "
            "if they do, recreate the slice",
        ),
        _judge_least("memory", [report.memory_gib for report in reports], min_memory_gib, "end other processes there"),
        _judge_least("disk", [report.disk_gib for report in reports], min_disk_gib, "delete unneeded files there"),
    ]


def judge_devices(reports: list[Report]) -> Result:
    """Check that all workers use the same number and kind of devices, and that no TPU is idle."""
    idle = [number for number, report in enumerate(reports) if report.has_tpu and report.platform != "tpu"]
    if idle:
        return Result(
            "devices",
            f"JAX does not use the TPU of {_workers(idle)}",
            "install the package as '.[tpu]' and unset JAX_PLATFORMS",
        )
    kinds = [f"{report.num_devices} x {report.device_kind}" for report in reports]
    usual, others = _split(kinds)
    if others:
        odd = f"{kinds[others[0]]} on {_workers(others)}, {usual} elsewhere"
        return Result("devices", odd, "end other processes that hold chips there, or recreate the slice")
    total, kind = sum(report.num_devices for report in reports), reports[0].device_kind
    return Result("devices", f"{total} x {kind}: {reports[0].num_devices} on each of {len(reports)} workers")


def judge_versions(reports: list[Report]) -> Result:
    """Check that all workers have the same versions and sources."""
    differing = []
    for name in reports[0].versions:
        found = [report.versions[name] for report in reports]
        usual, others = _split(found)
        if others:
            odd = ", ".join(f"{found[i]} on {_workers([i])} ({reports[i].host})" for i in others[:4])
            more = f" and {len(others) - 4} more" if len(others) > 4 else ""
            differing.append(f"{name} {usual}, but {odd}{more}")
    if differing:
        return Result("versions", "; ".join(differing), "install the same versions on all workers (launch/install.sh)")
    return Result("versions", " ".join(f"{name} {version}" for name, version in reports[0].versions.items()))


def _judge_errors(name: str, errors: list[str], fine: str, remedy: str) -> Result:
    failed = [number for number, error in enumerate(errors) if error]
    if failed:
        return Result(name, f"{errors[failed[0]]} (on {_workers(failed)})", remedy)
    return Result(name, fine)


def _judge_least(name: str, gib: list[float], least: float, remedy: str) -> Result:
    found = f"{min(gib):.0f} GiB or more on each worker"
    short = [number for number, value in enumerate(gib) if value < least]
    if short:
        return Result(name, f"{min(gib):.1f} GiB on {_workers(short)}, {least:g} needed", remedy)
    return Result(name, found)


def _split(values: list[str]) -> tuple[str, list[int]]:
    """Return the most common value (worker 0 breaks ties) and the numbers of the workers with another value."""
    usual = max(values, key=values.count)
    return usual, [number for number, value in enumerate(values) if value != usual]


def _workers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"worker{'s' * (len(numbers) > 1)} {shown}{', ...' * (len(numbers) > 8)}"


if __name__ == "__main__":
    run_main(main)
