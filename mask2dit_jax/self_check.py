"""Checks every worker before a job: devices, versions, the bucket, a sum over the mesh, memory and disk.

    python -m mask2dit_jax.self_check --bucket=gs://my-bucket/runs --mesh=1x16x4x1

Run it on all workers at once (launch/run.sh self_check ...). Worker 0 prints a line for each check; all workers end
with the same exit code.
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
_MESH = flags.DEFINE_string("mesh", "", "Sizes of data x fsdp x context x tensor, e.g. 1x16x4x1; all devices if empty.")
_MEMORY = flags.DEFINE_float("min_memory_gib", 8, "Host memory that must be available on each worker.")
_DISK = flags.DEFINE_float("min_disk_gib", 10, "Disk that must be free on each worker, in the folder it runs in.")
_TIMEOUT = flags.DEFINE_integer("timeout_s", 600, "A check that hangs (a chip or a worker that is gone) ends here.")
flags.mark_flags_as_required(["bucket"])

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "mask2dit_jax")
ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Report:
    """What one worker says of itself. `bucket` and `total` hold what went wrong, or nothing."""

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
    name: str
    found: str
    remedy: str = ""  # only a failed check has one

    def __str__(self) -> str:
        line = f"{'FAILED' if self.remedy else 'ok':7}{self.name:10}{self.found}"
        return f"{line}; {self.remedy}" if self.remedy else line


def main(argv):
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]}? settings are given as --name=value")
    shape = parse_mesh(_MESH.value)
    distributed.initialize()
    hangs = f"no answer within {_TIMEOUT.value} s: a worker, a chip or the bucket hangs; recreate the slice"
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
        raise UserError(f"self check failed: {', '.join(failed)}; worker 0 says why")


def parse_mesh(text: str) -> tuple[int, ...]:
    """ "1x16x4x1" -> (1, 16, 4, 1); () for all devices along one axis."""
    if not text:
        return ()
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text):
        raise UserError(f"--mesh={text} is not four sizes ({' x '.join(AXES)}) like 1x16x4x1")
    return tuple(int(size) for size in text.split("x"))


# Each worker for itself


def look_around(bucket: str, shape: tuple[int, ...]) -> Report:
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
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return {**found, "commit": _commit(), "sources": _digest_of_sources()}


def _commit() -> str:
    """Of the checkout, or of what launch/install.sh or the Dockerfile copied here."""
    if (ROOT / "COMMIT").is_file():
        return (ROOT / "COMMIT").read_text().strip()
    try:
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def _digest_of_sources() -> str:
    """A commit does not show that somebody has edited a file on one of the workers."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("mask2dit_jax/**/*.py"), *ROOT.glob("configs/**/*.py")]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def write_and_read(folder: epath.Path) -> None:
    """Raises what keeps this worker from it; a local folder must exist, so that a mistyped one is not made."""
    content = uuid.uuid4().hex
    probe = folder / f".self_check_{content}"
    probe.write_text(content)
    try:
        if probe.read_text() != content:
            raise OSError("what was written is not what is read")
    finally:
        probe.unlink()
    if is_remote(folder):
        _write_and_read_as_checkpoints_do(f"{probe}_array/", content)


def _write_and_read_as_checkpoints_do(folder: str, content: str) -> None:
    """Their arrays go into a bucket through a library with credentials of its own."""
    store = tensorstore.KvStore.open(folder).result()
    store.write("array", content).result()
    try:
        if store.read("array").result().value != content.encode():
            raise OSError("what a checkpoint's arrays are written with is not what is read")
    finally:
        store.delete_range(tensorstore.KvStore.KeyRange()).result()


def sum_over_mesh(shape: tuple[int, ...]) -> None:
    """Device number i gives i + 1 to a sum over each axis of the mesh, and over all of them.

    Raises:
        ValueError: the mesh is not one of these devices.
        ArithmeticError: a sum that arrived here is wrong.
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
                raise ArithmeticError(f"over {' x '.join(axes)}, {shard.device} has a wrong sum")


def _psum(x: jax.Array, mesh: Mesh, axes: tuple[str, ...]) -> jax.Array:
    rest = PartitionSpec(*(None if axis in axes else axis for axis in AXES))
    summed = jax.shard_map(
        lambda block: jax.lax.psum(block, axes), mesh=mesh, in_specs=PartitionSpec(*AXES), out_specs=rest
    )
    return jax.jit(summed)(x)


def available_memory() -> int:
    """Bytes; what the kernel would give to a new process, caches included, where it says so."""
    try:
        kib = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(kib) * 1024


def _why_not(action: Callable[[], None]) -> str:
    """What keeps `action` from succeeding. Whatever it is (credentials, network, a package), it is the answer."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {_one_line(error)}"
    return ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# All workers together


def gather(report: Report) -> list[Report]:
    """The reports of all workers, on each of them."""
    return [Report(**fields) for fields in distributed.gather_json(dataclasses.asdict(report))]


def judge(reports: list[Report], bucket: str, min_memory_gib: float, min_disk_gib: float) -> list[Result]:
    return [
        judge_devices(reports),
        judge_versions(reports),
        _judge_errors(
            "bucket",
            [report.bucket for report in reports],
            f"{bucket} is readable and writable",
            "make it, give the workers' service account access to it, or choose another",
        ),
        _judge_errors(
            "psum",
            [report.total for report in reports],
            "right over each axis and over all devices",
            f"the sizes of --mesh must multiply to {sum(report.num_devices for report in reports)}; "
            "if they do, recreate the slice",
        ),
        _judge_least("memory", [report.memory_gib for report in reports], min_memory_gib, "end what else runs there"),
        _judge_least("disk", [report.disk_gib for report in reports], min_disk_gib, "delete what nobody needs there"),
    ]


def judge_devices(reports: list[Report]) -> Result:
    idle = [number for number, report in enumerate(reports) if report.has_tpu and report.platform != "tpu"]
    if idle:
        return Result(
            "devices",
            f"no TPU in use on {_workers(idle)}, which has one",
            "install the package as '.[tpu]' and unset JAX_PLATFORMS",
        )
    kinds = [f"{report.num_devices} x {report.device_kind}" for report in reports]
    usual, others = _split(kinds)
    if others:
        odd = f"{kinds[others[0]]} on {_workers(others)}, {usual} elsewhere"
        return Result("devices", odd, "end what else holds chips there, or recreate the slice")
    total, kind = sum(report.num_devices for report in reports), reports[0].device_kind
    return Result("devices", f"{total} x {kind}: {reports[0].num_devices} on each of {len(reports)} workers")


def judge_versions(reports: list[Report]) -> Result:
    differing = []
    for name in reports[0].versions:
        found = [report.versions[name] for report in reports]
        usual, others = _split(found)
        if others:
            odd = ", ".join(f"{found[i]} on {_workers([i])} ({reports[i].host})" for i in others[:4])
            more = f" and {len(others) - 4} more" if len(others) > 4 else ""
            differing.append(f"{name} {usual}, but {odd}{more}")
    if differing:
        return Result("versions", "; ".join(differing), "install the same on all workers (launch/install.sh)")
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
    """What most workers have (worker 0 in a tie), and the numbers of those that have something else."""
    usual = max(values, key=values.count)
    return usual, [number for number, value in enumerate(values) if value != usual]


def _workers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"worker{'s' * (len(numbers) > 1)} {shown}{', ...' * (len(numbers) > 8)}"


if __name__ == "__main__":
    run_main(main)
