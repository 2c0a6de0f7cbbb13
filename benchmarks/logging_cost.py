"""Measures the cost of logging every step, by timing the same steps with log windows of one step and of all steps.

    JAX_PLATFORMS=cpu python benchmarks/logging_cost.py --steps=40 --rounds=5

Both settings take turns, so that other load on the machine affects both. The step is that of `configs/sft.py:tiny` on
one device. Its batch is already on the device, and TensorBoard files are written as `train` writes them.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1]))  # configs is not part of the package

from configs import sft
from mask2dit_jax.parallel.mesh import make_mesh
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.training import setup
from mask2dit_jax.training.events import EventFile
from mask2dit_jax.training.metrics import MetricsLog
from mask2dit_jax.training.optimizer import learning_rate

STEPS = flags.DEFINE_integer("steps", 40, "Number of steps timed together.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Number of timed rounds of each setting.")


def main(_):
    """Time both settings and print the milliseconds per step."""
    config = sft.get_config("tiny")
    pretrained = Pretrained.open(config.pretrained)
    vae, text = pretrained.vae.config, pretrained.text_encoder.config
    mesh = make_mesh({}, jax.devices()[:1], config.global_batch_size)
    model = setup.model_from_scratch(config, vae, text)
    program = setup.train_program(config, mesh, model, vae, pretrained.schedule)
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        state = program.start(program.random_params())
        batch = {
            name: jax.device_put(rng.standard_normal(x.shape, np.float32), x.sharding)
            for name, x in program.abstract_batch.items()
        }
        seconds = {1: [], STEPS.value: []}
        for number in range(ROUNDS.value + 1):
            for every, found in seconds.items():
                events = EventFile(f"{folder}/{number}_{every}")
                log = MetricsLog(events, every, learning_rate(program.optimizer))
                begun = time.perf_counter()
                for step in range(1, STEPS.value + 1):
                    state, metrics = program.step(state, batch)
                    log.add(step, metrics, program.flops)
                jax.block_until_ready(state)
                if number:  # the first round compiles
                    found.append((time.perf_counter() - begun) / STEPS.value * 1e3)
                log.flush()
                events.close()
    for every, found in seconds.items():
        print(
            f"log_every={every}: {statistics.median(found):.1f} ms per step "
            f"(median of {ROUNDS.value} rounds: {', '.join(f'{ms:.1f}' for ms in found)})"
        )


if __name__ == "__main__":
    app.run(main)
