"""Compiles the ready configs for every slice and writes the table of docs/tpu.md.

    python benchmarks/tpu_slices.py --figures=DIR [--only=sft.py:5b]

Each program is compiled in its own process and takes up to 2 minutes and 4 GB. Programs whose figures are in DIR are
not compiled again, and rows without figures in DIR stay unchanged. Pretraining and SFT are the same program (p is
data), so only SFT is compiled. A story is sampled by one host, so one slice of each kind of chip stands for the others.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1]))  # configs is not part of the package

from configs.slices import SLICES

FIGURES = flags.DEFINE_string("figures", None, "Folder for one JSON file per program.", required=True)
ONLY = flags.DEFINE_string("only", "", "Compile only programs whose name contains this.")
TABLE = flags.DEFINE_string("table", "docs/tpu.md", "Page whose table is rewritten.")

OF_EACH_KIND = tuple({name.partition("-")[0]: name for name in reversed(SLICES)}.values())
PROGRAMS = tuple(
    f"{stage}.py:{size},{name}"
    for stage, names in (("sft", SLICES), ("sample", OF_EACH_KIND[::-1]))
    for size in ("2b", "5b")
    for name in names
)
BEGIN, END = "<!-- table: benchmarks/tpu_slices.py -->", "<!-- end of table -->"
HEAD = (
    "| config | chips | mesh d x f x c x t | batch | HBM GiB per chip | free | matrix work | attention work "
    "| collectives, exposed | roofline | MFU at most | compiled in |\n" + "|---" * 12 + "|"
)


def figures_of(program: str, folder: Path) -> Path:
    """Return the path of a program's figures, compiling the program if they are missing."""
    path = folder / f"{program.replace('.py:', '_').replace(',', '_')}.json"
    if not path.exists() and ONLY.value in program:
        print(program, flush=True)
        command = ["-m", "mask2dit_jax.train_compile", f"--config=configs/{program}"]
        topology = program.partition(",")[2]
        subprocess.run([sys.executable, *command, f"--topology={topology}", f"--json={path}"], check=False)
    return path


def row(program: str, found: dict) -> str:
    """Format a program's row of the table."""
    mesh = " x ".join(str(size) for size in found["mesh"].values())
    start = f"| `{program}` | {math.prod(found['mesh'].values())} | {mesh} | {found['batch']} "
    memory = f"| {found['hbm_peak_gib']:.1f} of {found['hbm_limit_gib']:.1f} | {found['hbm_headroom_gib']:.1f} "
    if found["roofline_seconds"] is None:
        return start + memory + "| - " * 5 + f"| {found['compile_seconds']:.0f} s |"
    matmul = found["matmul_flops_executed"] / found["matmul_flops_ideal"]
    attention = found["attention_flops_executed"] / found["attention_flops_ideal"]
    exposed = found["exposed_collective_seconds"] / found["roofline_seconds"]
    return (
        f"{start}{memory}| {matmul:.2f} x ideal | {attention:.2f} x ideal "
        f"| {found['collective_seconds']:.2f} s, {exposed:.0%} | {found['roofline_seconds']:.2f} s "
        f"| {found['mfu_ceiling']:.0%} | {found['compile_seconds']:.0f} s |"
    )


def main(_):
    """Compile what is missing and rewrite the table."""
    folder, page = Path(FIGURES.value), Path(TABLE.value)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {program: figures_of(program, folder) for program in PROGRAMS}
    before, _, rest = page.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    rows |= {program: row(program, json.loads(path.read_text())) for program, path in paths.items() if path.exists()}
    ordered = [rows[program] for program in PROGRAMS if program in rows]
    page.write_text("\n".join([before + BEGIN, "", HEAD, *ordered, "", END]) + after)


if __name__ == "__main__":
    app.run(main)
