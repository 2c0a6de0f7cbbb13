"""Compiling for TPUs that are not there: the figures are whole, at small size and at full size."""

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


@pytest.mark.slow
def test_a_training_job_is_reported_whole(commands, tmp_path):
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


def test_sampling_a_tiny_model_needs_its_checkpoint(commands, tmp_path):
    """Its checkpoint need not be there yet for a model whose sizes are known; a tiny one's are in its checkpoint."""
    flags = ("--config=configs/sample.py:tiny", "--topology=v5p-8")
    line = commands.fail_alone("train_compile", *flags, "--config.checkpoint=nowhere")
    assert "there is no transformer in nowhere" in line


def test_an_unknown_topology_is_named(commands):
    line = commands.fail_alone("train_compile", "--config=configs/sft.py:tiny", "--topology=v9:2x2")
    assert "unknown topology 'v9:2x2'" in line


@pytest.mark.slow
def test_sampling_at_full_size_fits_and_wastes_little(commands, tmp_path):
    """5B, three scenes of 49 frames at 480 x 720, guided, on one host; benchmarks/tpu_slices.py compiles training."""
    found, _ = compiled(commands, tmp_path, "--config=configs/sample.py:5b", "--topology=v5p-8")
    assert found["hbm_headroom_gib"] > 80
    assert not found["warnings"]
    assert 1 <= found["matmul_flops_executed"] / found["matmul_flops_ideal"] < 1.05
    assert found["attention_occupancy"] <= 1.05  # blocks that hold a forbidden or a padding pair are computed whole
    surplus = found["attention_flops_executed"] / found["attention_flops_ideal"]
    assert surplus == pytest.approx(found["attention_occupancy"], rel=1e-3)
    assert found["exposed_collective_seconds"] < 0.15 * found["roofline_seconds"]
