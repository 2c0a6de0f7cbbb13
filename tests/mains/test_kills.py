"""Whatever ends a run, at whatever moment, the run that is started again ends as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.mains.killing import Job, kill_again_and_again, steps
from tests.mains.process import ROOT
from tests.mains.test_train import assert_same, read, scalars
from tests.xla_flags import XLA_FLAGS

STEPS = 10

pytestmark = pytest.mark.slow


def flags(commands, dataset, workdir, **fields):
    same = {"checkpoint_every": 1, "ema_decay": 0.9, "optimizer__decay_steps": 10_000}  # whatever num_steps is
    fields = {"num_steps": STEPS, **same, **fields}
    return commands.train_flags("pretrain", workdir, dataset.csv, **fields)


@pytest.fixture(scope="module")
def references(commands, dataset, pretrain_workdir, tmp_path_factory) -> dict:
    """Workdirs of runs that nothing disturbs, in one process and in two, with all their checkpoints."""
    folder, workdirs = tmp_path_factory.mktemp("references"), {}
    for count in (1, 2):
        workdirs[count] = folder / str(count)
        given = flags(commands, dataset, workdirs[count], keep_checkpoints=STEPS)
        for finished in Job(folder / "printed" / str(count), count, given).finish():
            assert finished.code == 0, finished.stderr
    return workdirs


def beginning(reference, workdir, *kept: int):
    """A copy of a run as it was when it had these checkpoints."""
    for step in kept:
        shutil.copytree(reference / "checkpoints" / str(step), workdir / "checkpoints" / str(step))
    return workdir


def test_two_processes_take_the_steps_of_one(references):
    """To rounding: sums over a mesh have another order."""
    ours, alone = (read(references[count], 2)["params"] for count in (2, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, alone)
    assert len(list(references[2].glob("events*"))) == 1


@pytest.mark.parametrize(
    ("count", "kills", "sent"), [(1, 3, signal.SIGKILL), (2, 1, signal.SIGKILL), (1, 3, signal.SIGINT)]
)
def test_a_run_that_is_killed_ends_as_if_it_were_not(count, kills, sent, commands, dataset, references, tmp_path):
    """`python -m tests.mains.killing` does it 20 times."""
    killed = tmp_path / "killed"

    def start():
        return Job(tmp_path / "printed", count, flags(commands, dataset, killed))

    met = kill_again_and_again(start, killed, kills, random.Random(0), sent)
    assert not [line for line in met if line.startswith("ended")], met
    assert_same(read(killed, STEPS), read(references[count], STEPS))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_saves_the_same_step_in_all_processes(count, sent, commands, dataset, references, tmp_path):
    """One process is told; all of them save the same step, and the job counts as not done."""
    workdir = tmp_path / "run"
    unending = flags(commands, dataset, workdir, num_steps=10_000, checkpoint_every=10_000)
    job = Job(tmp_path / "printed", count, unending)
    job.wait_until(lambda: any(workdir.glob("events*")) and scalars(workdir).get("loss"))
    job.kill(sent, only=count - 1)
    printed = job.finish()
    (last,) = steps(workdir)
    for finished in printed:
        assert finished.code == 128 + sent, finished.stderr
        assert f"{sent.name}: saving step {last}, then stopping" in finished.stderr
    undisturbed = references[count]
    if last > STEPS:  # the job was faster than this process could tell it
        undisturbed = beginning(undisturbed, tmp_path / "undisturbed", STEPS)
        given = flags(commands, dataset, undisturbed, num_steps=last)
        assert [finished.code for finished in Job(tmp_path / "again", count, given).finish()] == [0] * count
    assert_same(read(workdir, last), read(undisturbed, last))


def cut(folder):
    for file in (folder / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_record(folder):
    (folder / "record" / "metadata").unlink()


def test_damaged_checkpoints_are_set_aside_and_made_again(commands, dataset, references, tmp_path):
    """The newest two are damaged, each in its way; the third is used, and the steps of the others are saved again."""
    workdir = beginning(references[1], tmp_path / "damaged", STEPS - 2, STEPS - 1, STEPS)
    folder = workdir / "checkpoints"
    cut(folder / str(STEPS - 1))
    without_record(folder / str(STEPS))
    log = commands.succeed("train", *flags(commands, dataset, workdir, keep_checkpoints=3)).stderr
    for step, reason in ((STEPS, "no JSON"), (STEPS - 1, "")):
        line = next(line for line in log.splitlines() if f"checkpoint {folder / str(step)} is damaged" in line)
        assert reason in line
        assert f"set aside as damaged-{step}, and the one before is used" in line
    assert steps(workdir) == [STEPS - 2, STEPS - 1, STEPS]
    assert_same(read(workdir, STEPS), read(references[1], STEPS))
    assert {path.name for path in folder.glob("damaged-*")} == {f"damaged-{STEPS}", f"damaged-{STEPS - 1}"}


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(commands, dataset, references, tmp_path):
    """A run that has been somewhere never starts over in silence, however often it is started."""
    workdir = beginning(references[1], tmp_path / "run", 1)
    cut(workdir / "checkpoints" / "1")
    for _ in range(2):
        finished = commands("train", *flags(commands, dataset, workdir))
        line = finished.stderr.splitlines()[-1]
        assert finished.code == 1
        assert "Traceback" not in finished.stderr
        assert line.startswith("error: no checkpoint in"), line
        assert "set aside as damaged-STEP; delete these to start this run over" in line


def test_a_full_disk_is_named_and_the_run_goes_on_later(commands, dataset, references, tmp_path):
    """A disk of its own with room for the first checkpoint and not for a second.

    Where a mount namespace is refused, a limit on the size of a file stands for it.
    """
    disk, printed = tmp_path / "disk", tmp_path / "printed"
    disk.mkdir()
    beginning(references[1], tmp_path / "begun", 1)
    flags_of_three = " ".join(f"'{flag}'" for flag in flags(commands, dataset, disk / "run", num_steps=3))
    train = f"{sys.executable} -m mask2dit_jax.train {flags_of_three}"
    script = f"""
        limit=true
        mount -t tmpfs -o size=3m tmpfs {disk} 2> /dev/null || limit="ulimit -f 150"
        cp -r {tmp_path}/begun {disk}/run || exit 78
        if [ "$limit" = true ]; then
            head -c $(($(df --output=avail -B1 {disk} | tail -1) - 300000)) /dev/zero > {disk}/full
        fi
        ($limit && {train} 2> {printed}); code=$?
        rm -f {disk}/full
        {train} 2> {printed}.again || exit 79
        exit $code
    """
    command = ["bash", "-c", script]
    if subprocess.run(["unshare", "--mount", "--map-root-user", "true"], check=False).returncode == 0:
        command = ["unshare", "--mount", "--map-root-user", *command]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(commands.compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": XLA_FLAGS,
    }
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 1
    *before, line = printed.read_text().splitlines()
    assert line.startswith("error: a checkpoint could not be written to"), line
    assert "step 1 is the newest one that was: make room there" in line
    assert not [other for other in before if "Traceback" in other]
    assert "start: resuming step 1" in (tmp_path / "printed.again").read_text()


def test_a_run_goes_on_on_another_mesh(commands, dataset, references, tmp_path):
    """1 x 4 -> 2 x 2 -> one device; then two processes: the losses go on to rounding."""
    workdir, reference = tmp_path / "run", scalars(references[1])["loss"]
    environment = {"XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count=4"}
    for last, mesh in enumerate([{"fsdp": 1, "context": 4}, {"fsdp": 2, "context": 2}], start=1):
        sizes = {f"mesh__{axis}": size for axis, size in mesh.items()}
        finished = commands("train", *flags(commands, dataset, workdir, num_steps=last, **sizes), **environment)
        assert finished.code == 0, finished.stderr
    commands.succeed("port_weights", f"--from={workdir}", f"--to={tmp_path / 'exported'}")  # with one device
    commands.succeed("train", *flags(commands, dataset, workdir, num_steps=3))
    for finished in Job(tmp_path / "printed", 2, flags(commands, dataset, workdir, num_steps=4)).finish():
        assert finished.code == 0, finished.stderr
    found = scalars(workdir)["loss"]
    np.testing.assert_allclose([found[n] for n in range(1, 5)], [reference[n] for n in range(1, 5)], rtol=1e-5)
