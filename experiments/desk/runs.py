"""Training runs: the train main with a config, in a process of its own, as often as it takes and not once more."""

import collections
import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

from mask2dit_jax.errors import UserError
from mask2dit_jax.pretrained import stored_checkpoint

# Two runs side by side, a thread each, finish sooner than one after the other on two threads: the products are small.
# Optimising these programs any further takes XLA longer than it saves.
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
        name: of its workdir under OUTPUT/runs.
        stage: which config: "sft" or "pretrain".
        stories: which stories it is trained on, the name of a json in OUTPUT/world (sft).
        fields: of the config, besides the seed.
        start: the run whose parameters it starts from.
    """

    name: str
    seed: int
    fields: tuple[tuple[str, object], ...] = ()
    stage: str = "sft"
    stories: str = "stories"
    start: "TrainingRun | None" = None

    def workdir(self, output: Path) -> Path:
        return output / "runs" / self.name

    def command(self, output: Path) -> list[str]:
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
    """Trains to the end, from wherever an earlier try stopped; nothing happens where it is done.

    Threads may ask for the same run, as a run's start may be a run of its own: one of them trains it.

    Raises:
        UserError: the run fails; its log is named.
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
        raise UserError(f"run {run.name} failed ({''.join(last)}); see {log}, then start again: it goes on from there")
    (run.workdir(output) / "done").write_text(" ".join(run.command(output)) + "\n")
