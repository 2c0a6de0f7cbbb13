"""Stands in for gcloud: records its calls, keeps one slice of two workers, a bucket, and runs commands on the workers.

A worker is a folder, its HOME; the bucket is one too. $STAND_IN holds them, the calls, and what is to happen:
`refuse` names commands that fail, `states` are what a queued slice goes through, `preempt` takes the slice away.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(os.environ["STAND_IN"])
QUEUE, NODE, WORKERS = HERE / "queue", HERE / "node", (HERE / "worker_0", HERE / "worker_1")


def main(words):
    # Not when a worker uploads its log: it would end itself before it has ended the slice.
    if words[0] == "compute" and (HERE / "preempt").exists():
        preempt()
    with (HERE / "calls").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))
    names = [word for word in words if not word.startswith("--")]
    command = " ".join(names[2:4] if names[0] == "compute" else names[:2])
    refused = HERE / "refuse"
    if refused.exists() and command in refused.read_text().splitlines():
        fail(f"PERMISSION_DENIED: you may not {command}")
    COMMANDS[command](names, flags)


def queue(names, flags):
    set_up_workers()
    QUEUE.write_text((HERE / "states").read_text())


def create_node(names, flags):
    set_up_workers()
    NODE.write_text("READY")


def describe_queue(names, flags):
    if not QUEUE.exists():
        fail("NOT_FOUND: Resource was not found")
    state, *later = QUEUE.read_text().split()
    QUEUE.write_text(" ".join(later or [state]))
    if state == "ACTIVE" and not NODE.exists():
        NODE.write_text("READY")
    print(state)


def describe_node(names, flags):
    print(NODE.read_text() if NODE.exists() else fail("NOT_FOUND: Resource was not found"))


def delete(names, flags):
    for path in (QUEUE, NODE):
        path.unlink(missing_ok=True)
    remove_workers()


def ssh(names, flags):
    if not (NODE.exists() and NODE.read_text() == "READY"):
        fail("the TPU is not ready", 255)
    chosen = range(len(WORKERS)) if flags["worker"] == "all" else [int(flags["worker"])]
    sys.exit(max(on_worker(number, flags["command"]) for number in chosen))


def on_worker(number, command):
    home = WORKERS[number]
    environment = {
        **{"HOME": str(home), "TPU_WORKER_ID": str(number), "STAND_IN": str(HERE)},
        "PATH": f"{HERE / 'bin'}:/usr/local/bin:/usr/bin:/bin",
    }
    return subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode


def copy(names, flags):
    source, target = map(local, names[2:])
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy(source, partial)
    partial.rename(target)  # an object in a bucket is whole or not there


def sync(names, flags):
    shutil.copytree(local(names[2]), names[3], dirs_exist_ok=True)


def cat(names, flags):
    sys.stdout.flush()
    sys.stdout.buffer.write(local(names[2]).read_bytes())


def list_folder(names, flags):
    for child in sorted(local(names[2]).iterdir()):
        print(f"{names[2]}{child.name}/")


def local(path):
    return HERE / "bucket" / path.removeprefix("gs://") if path.startswith("gs://") else Path(path)


def set_up_workers():
    for home in WORKERS:
        home.mkdir()


def remove_workers():
    for home in WORKERS:
        for pid in home.glob("mask2dit_jobs/*/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


def preempt():
    (HERE / "preempt").unlink()
    remove_workers()
    QUEUE.write_text("SUSPENDED")
    NODE.write_text("PREEMPTED")


def fail(message, code=1):
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(code)


COMMANDS = {
    "queued-resources create": queue,
    "queued-resources describe": describe_queue,
    "queued-resources delete": delete,
    "tpu-vm create": create_node,
    "tpu-vm describe": describe_node,
    "tpu-vm delete": delete,
    "tpu-vm ssh": ssh,
    "storage cp": copy,
    "storage rsync": sync,
    "storage cat": cat,
    "storage ls": list_folder,
}

main(sys.argv[1:])
