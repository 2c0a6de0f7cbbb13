"""Training runs, each of which is the train main with a config in a process of its own."""

import collections
import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

from mask2dit_jax.errors import UserError
from mask2dit_jax.pretrained import stored_checkpoint

# The matrix products are so small that two runs with one thread each finish sooner than two runs in sequence with two
# threads. At a higher optimisation level, XLA would take longer to compile than the programs would save.
_ENVIRONMENT = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=1",
    "OMP_NUM_THREADS": "1",
}
ROOT = Path(__file__).parents[2]
_LOCKS = collections.defaultdict(threading.Lock)  # by workdir


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """One training run.

    Attributes:
        name: Name of its workdir under OUTPUT/runs.
        seed: Seed of the config.
        fields: Other fields of the config and their values.
        stage: Config to use, "sft" or "pretrain".
        stories: Stories to train on, as the name of a JSON file in OUTPUT/world (sft only).
        start: Run whose parameters it starts from.
    """

    name: str
    seed: int
    fields: tuple[tuple[str, object], ...] = ()
    stage: str = "sft"
    stories: str = "stories"
    start: "TrainingRun | None" = None

    def workdir(self, output: Path) -> Path:
        """Return the workdir."""
        return output / "runs" / self.name

    def command(self, output: Path) -> list[str]:
        """Return the command that trains the run."""
        world = output / "world"
        fields = {
            "seed": self.seed,
            "pretrained": world / "pretrained",
            "data.cache": world / "cache",
            "data.path": world / ("pretrain.csv" if self.stage == "pretrain" else f"{self.stories}.json"),
            **({"init_from": self.start.workdir(output)} if self.start else {}),
            **dict(self.fields),
        }
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        main = [sys.executable, "-m", "mask2dit_jax.train", f"--config={ROOT}/configs/{self.stage}.py:desk"]
        return [*main, f"--workdir={self.workdir(output)}", *flags]


def train(run: TrainingRun, output: Path) -> None:
    """Train a run to its end, resuming an earlier attempt. A finished run is left alone.

    Several threads may request the same run, because it may also be the start of another. One of them trains it, and
    the others wait.

    Raises:
        UserError: The run fails. The message names its log.
    """
    with _LOCKS[run.workdir(output)]:
        if not (run.workdir(output) / "done").exists():
            _train(run, output)


def _train(run: TrainingRun, output: Path) -> None:
    if run.start:
        train(run.start, output)
    log = run.workdir(output) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(output / "compiled"),
        **_ENVIRONMENT,
    }
    with log.open("a") as file:
        code = subprocess.run(run.command(output), stdout=file, stderr=file, env=environment, check=False).returncode
    if code or not stored_checkpoint.has_checkpoint(run.workdir(output)):
        last = log.read_text().strip().splitlines()[-1:]
        raise UserError(f"run {run.name} failed ({''.join(last)}); see {log}, then start again to resume it")
    (run.workdir(output) / "done").write_text(" ".join(run.command(output)) + "\n")
