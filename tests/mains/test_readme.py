"""The README's lines of Python run as they stand, and make the frames that `sample` makes."""

import json
import os
import re
import subprocess
import sys

import numpy as np

from tests.mains.conftest import settings
from tests.mains.process import ROOT
from tests.mains.test_sample import frames
from tests.xla_flags import XLA_FLAGS

# Runs the block, and keeps the frames that it gives to `write_video`.
HARNESS = """
import json
import numpy as np
from mask2dit_jax.media import video_writer

made, write = {}, video_writer.write_video

def write_and_keep(path, frames, fps):
    made[path] = np.stack(list(frames))
    write(path, made[path], fps)

video_writer.write_video = write_and_keep
names = {"__name__": "__main__"}
exec(compile(open("block.py").read(), "README.md", "exec"), names)
np.savez("made.npz", **made)
json.dump([scene.prompt for scene in names["story"].scenes], open("prompts.json", "w"))
"""


def block() -> str:
    """Returns the Python code under the heading "From Python"."""
    (section,) = re.findall(r"^#+ From Python\n(.*?)(?=^#)", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def test_the_block_of_the_readme_makes_what_sample_makes(commands, pretrain_workdir, tmp_path):
    code = block()
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 10
    (tmp_path / "workdir").mkdir()
    (tmp_path / "workdir" / "sft").symlink_to(pretrain_workdir)
    (tmp_path / "block.py").write_text(code)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": XLA_FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(commands.compiled),
    }
    subprocess.run([sys.executable, "-c", HARNESS], cwd=tmp_path, env=environment, check=True)
    prompts = tuple(json.loads((tmp_path / "prompts.json").read_text()))
    output = tmp_path / "sampled"
    fields = settings(checkpoint=pretrain_workdir, prompts=prompts)
    commands.succeed("sample", "--config=configs/sample.py:tiny", f"--output={output}", *fields)
    with np.load(tmp_path / "made.npz") as made:
        assert list(made) == [f"scene_{number:02d}.mp4" for number in range(1, len(prompts) + 1)]
        for name, ours in made.items():
            with np.load(output / "latents" / name.replace(".mp4", ".npz")) as stored:
                kept = np.linspace(0, len(ours) - 1, len(stored["frames"])).round().astype(int)
                np.testing.assert_array_equal(ours[kept], stored["frames"])
            written = frames(tmp_path / name).astype(int)
            assert written.shape == ours.shape
            assert np.abs(written - frames(output / name)).mean() < 1  # x264 may code the same frames in another way
