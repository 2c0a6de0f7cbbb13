"""Stands in, on a worker, for uv (`uv venv` makes a Python) and for that Python, which runs a stage of the package.

$STAND_IN/STAGE holds how each attempt of a stage goes, a word each, the last one for ever: ok, fail, hang,
refuse (fails after a second, with a reason), deaf (hangs, and SIGTERM does not end it) or preempt.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

HERE, HOME = Path(os.environ["STAND_IN"]), Path(os.environ["HOME"])
WORKER = os.environ["TPU_WORKER_ID"]


def uv(arguments):
    record("installs", arguments)
    if arguments[0] == "venv":
        python = Path(".venv/bin/python")
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text((HERE / "bin/stage").read_text())
        python.chmod(0o755)


def stage(arguments):
    name = arguments[1].removeprefix("mask2dit_jax.")
    attempt = record("runs", arguments)
    print(f"{name} on worker {WORKER}", flush=True)
    plan = HERE / name
    words = plan.read_text().split() if plan.exists() else ["ok"]
    word = words[min(attempt[name], len(words)) - 1]
    if word == "preempt" and WORKER == "0":
        wait_for_partner(name, attempt[name])
        (HERE / "preempt").touch()
    if word == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lock = (HERE / f"deaf_{WORKER}").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    if word in ("hang", "deaf", "preempt"):
        while HOME.exists():  # until the slice is deleted, whoever has lost sight of this process
            time.sleep(0.1)
    if word == "refuse":
        time.sleep(1.2)
        print("error: as before", flush=True)
    sys.exit(3 if word in ("fail", "refuse") else 0)


def wait_for_partner(name, attempt):
    """A slice that goes before worker 1 has begun would leave it an attempt behind, and its plan with it."""
    while counts(HERE / "runs_1").get(name, 0) < attempt:
        time.sleep(0.02)


def record(kind, arguments):
    """Returns how often each stage ran on this worker, this time included."""
    path = HERE / f"{kind}_{WORKER}"
    line = {"arguments": arguments, "flags": os.environ.get("LIBTPU_INIT_ARGS"), "at": str(Path.cwd())}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return counts(path)


def counts(path):
    if not path.exists():
        return {}
    stages = [json.loads(line)["arguments"][1].removeprefix("mask2dit_jax.") for line in path.read_text().splitlines()]
    return {name: stages.count(name) for name in stages}


{"uv": uv, "stage": stage}[sys.argv[1]](sys.argv[2:])
