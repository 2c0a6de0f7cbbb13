"""Compiling for TPUs that are not there: the figures are whole, and the training of the paper fits its slice."""

import json

import pytest

FIGURES = {
    *("hbm_peak_gib", "hbm_limit_gib", "matmul_flops_executed", "matmul_flops_ideal", "attention_flops_executed"),
    *("attention_flops_ideal", "collective_bytes", "collective_seconds", "exposed_collective_seconds"),
    *("roofline_seconds", "mfu_ceiling", "compile_seconds"),
}


def compiled(commands, tmp_path, *flags) -> tuple[dict, str]:
    out = tmp_path / "figures.json"
    finished = commands.succeed("train_compile", f"--json={out}", *flags)
    return json.loads(out.read_text()), finished.stdout


def test_a_training_job(commands, tmp_path):
    """Eight chips: two shards of samples and, as what is left over, two of tokens for each of two of heads."""
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    found, table = compiled(
        commands, tmp_path, "--config=configs/sft.py:tiny", "--topology=v5e:2x4", "--encoders", *mesh
    )
    assert found.keys() >= FIGURES
    assert all(found[name] is not None for name in FIGURES)
    assert [program["name"] for program in found["programs"]] == ["train step", "text encode", "vae encode"]
    assert found["num_chips"] == 8
    assert found["fits"]
    assert not found["warnings"]
    assert 1 <= found["matmul_flops_executed"] / found["matmul_flops_ideal"] < 3  # small sizes are padded much
    held = sum(program["hbm_arguments_gib"] for program in found["programs"])
    assert held < found["job"]["hbm_peak_gib"] < found["hbm_limit_gib"]
    assert "all of these in one job" in table
    assert "train step" in table


def test_sampling(commands, tmp_path):
    """Its checkpoint need not be there yet for a model whose sizes are known; a tiny one's are in its checkpoint."""
    flags = ("--config=configs/sample.py:tiny", "--topology=v5p-8")
    line = commands.fail("train_compile", *flags, "--config.checkpoint=nowhere")
    assert "there is no transformer in nowhere" in line


def test_an_unknown_topology(commands):
    line = commands.fail("train_compile", "--config=configs/sft.py:tiny", "--topology=v9:2x2")
    assert "unknown topology 'v9:2x2'" in line


@pytest.mark.slow
def test_the_papers_training_on_64_small_chips(commands, tmp_path):
    """5B, three scenes of 49 frames at 480 x 720, batch 8, fp32 master and Adam on v5e: 2 GiB a chip to spare."""
    found, _ = compiled(commands, tmp_path, "--config=configs/sft.py:5b", "--topology=v5e-64")
    assert found["hbm_headroom_gib"] >= 2
    assert not found["warnings"]
    assert found["matmul_flops_executed"] < 1.4 * found["matmul_flops_ideal"]  # a third for rematerialisation
    # Of 6 products a pair the kernels take 9: they compute the logits in each pass. Blocks add at most 5 percent.
    assert found["attention_occupancy"] <= 1.05
    surplus = found["attention_flops_executed"] / found["attention_flops_ideal"]
    assert surplus == pytest.approx(found["attention_occupancy"] * 9 / 6, rel=1e-3)
    assert found["exposed_collective_seconds"] < 0.15 * found["roofline_seconds"]
