"""Command lines that a slip of the hand makes: one line that names it and says what to do, exit code 1."""

import os
import subprocess
import sys

import pytest

from tests.mains.conftest import PROMPTS, SMALL, settings

TRAIN, SAMPLE = "configs/pretrain.py:tiny", "configs/sample.py:tiny"


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--config.nope=1", ["--config.nope=1", "no field 'nope'"]),
        ("--config.optimizer.nope=1", ["--config.optimizer.nope=1", "no field 'nope'"]),
        ("--config.optimzer.eps=1", ["--config.optimzer.eps=1", "did you mean 'optimizer'"]),
        ("--config.num_steps.nope=1", ["--config.num_steps.nope=1", "no field"]),
        ("--config.num_steps=abc", ["--config.num_steps=abc", "type"]),
        ("--config.num_steps=1.5", ["--config.num_steps=1.5", "type"]),
        ("--config.optimizer.eps=small", ["--config.optimizer.eps=small", "type"]),
        ("--config.data.max_skipped_share=all", ["--config.data.max_skipped_share=all", "type"]),
        ("--config.data.max_skipped_share=5.0", ["max_skipped_share=5.0", "between 0 and 1"]),
        ("--confg=configs/sft.py:tiny", ["'confg'", "config"]),
        ("--config.num_steps=0", ["num_steps=0", "at least 1"]),
        ("--config.checkpoint_every=0", ["checkpoint_every=0", "at least 1"]),
        ("--config.log_every=0", ["log_every=0", "at least 1"]),
        ("--config.keep_checkpoints=0", ["keep_checkpoints=0", "at least 1"]),
        ("--config.data.clip_variants=0", ["data.clip_variants=0", "at least 1"]),
        ("--config.num_scenes=0", ["num_scenes=0", "at least 1"]),
        ("--config.model.num_layers=0", ["model.num_layers=0", "at least 1"]),
        ("--config.model.head_dim=24", ["head_dim=24", "multiple of 16"]),
        ("--config.optimizer.decay_steps=50", ["decay_steps=50", "warmup_steps=50"]),
        ("--config.data.min_stride=3", ["min_stride=3", "max_stride=2"]),
        ("--config.condition_probability=1.5", ["condition_probability=1.5", "between 0 and 1"]),
        ("--config.seed=-1", ["seed=-1", "between 0"]),
        ("--config.mask=v6", ["mask 'v6'", "v1, v2, v3, v4, v5"]),
        ("--config.attention=flash", ["attention 'flash'", "dense, grouped"]),
        ("--config.remat=some", ["remat 'some'", "none, full, attention, dots"]),
        ("--config.condition=dirty", ["condition 'dirty'", "clean, noised"]),
        ("--config.data.kind=videos", ["data.kind 'videos'", "csv, json"]),
        ("--config.compute_dtype=float16", ["'float16'", "range is too small", "float32, bfloat16"]),
        ("--config.param_dtype=float16", ["'float16'", "float32, bfloat16"]),
        ("--config.height=41", ["height=41", "no multiple of"]),
        ("--config.width=0", ["width=0", "no multiple of"]),
        ("--config.num_frames=8", ["num_frames=8", "4k + 1", "nearest is 9"]),
        ("--config.global_batch_size=0", ["global_batch_size", "at least 1"]),
        ("--config.data.path=", ["--config.data.path", "csv"]),
        ("--config.data.path=nowhere.csv", ["nowhere.csv", "give the path"]),
        ("--config.pretrained=", ["--config.pretrained=DIR"]),
        ("--config.pretrained=nowhere", ["nowhere does not exist", "give the directory"]),
        ("--config.init_from=nowhere", ["nowhere", "give a training workdir"]),
        ("junk", ["junk", "--config.field=value"]),
    ],
)
def test_train_refuses_what_it_cannot_run(commands, dataset, tmp_path, flag, told):
    line = commands.fail("train", *commands.train_flags("pretrain", tmp_path / "run", dataset.csv, flag))
    assert all(words in line for words in told), line


def test_a_run_beyond_its_cosine_writes_nothing(commands, dataset, tmp_path):
    fields = settings(num_steps=201, optimizer__decay_steps=200)
    line = commands.fail("train", *commands.train_flags("pretrain", tmp_path / "run", dataset.csv, *fields))
    assert "num_steps=201 is beyond optimizer.decay_steps=200, from where the learning rate is 0" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("main", ["train", "sample", "port_weights", "build_data", "evaluate"])
def test_a_process_of_its_own_ends_as_the_shared_one_does(commands, main):
    assert commands.fail_alone(main) == commands.fail(main)


@pytest.mark.slow
def test_a_bucket_without_its_package_names_what_to_install(commands, dataset, tmp_path):
    """In a process of its own, as whatever is installed is hidden from it."""
    (tmp_path / "gcsfs.py").write_text("raise ImportError('not installed')")
    flags = map(str, commands.train_flags("pretrain", "gs://bucket/run", dataset.csv))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    command = [sys.executable, "-m", "mask2dit_jax.train", *flags]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 1
    line = finished.stderr.splitlines()[-1]
    assert line == 'error: a path in gs:// needs a package that is not installed; pip install -e ".[gcs]"'


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--config.prompts=()", ["a story: --story=FILE, or --config.prompts"]),
        (f"--config.prompts={('word',) * 200}", ["200 scenes", "max_scenes=100", "--config.max_scenes=200"]),
        ("--config.seeds=(0, -1)", ["seed=-1", "between 0"]),
        ("--config.anchor=True", ["anchor needs num_scenes of at least 3"]),
        ("--story=nowhere.yaml", ["nowhere.yaml: cannot be read", "give a story file"]),
        ("--config.prompts=(1, 2, 3)", ["prompts holds 1", "quote"]),
        ("--config.prompts=a one, 'two", ["--config.prompts", "quotes"]),
        ("--config.num_scenes=1", ["num_scenes must be at least 2"]),
        (f"--config.given={('a.mp4',) * 4}", ["4 prompts for 4 given clips", "new scene"]),
        ("--config.given=('one.mp4', 'two.mp4')", ["one.mp4: no such file"]),
        ("--config.sampler.kind=euler", ["'euler'", "ddim, dpm"]),
        ("--config.sampler.num_steps=1001", ["between 1 and 1000", "1001"]),
        ("--config.guidance=much", ["guidance 'much'", "static, dynamic, dynamic_sound"]),
        ("--config.decode_chunking=none", ["decode_chunking 'none'", "mask2dit, diffusers"]),
        ("--config.fps=0", ["fps=0", "at least 1"]),
        ("--config.mask=v6", ["mask 'v6'", "v1, v2, v3, v4, v5"]),
        ("--config.compute_dtype=float16", ["'float16'", "float32, bfloat16"]),
        ("--config.height=41", ["height=41", "no multiple of"]),
        ("--config.checkpoint=nowhere", ["nowhere", "give a training workdir"]),
        ("--config.checkpoint=", ["tiny", "no transformer weights"]),
        ("junk", ["junk", "--config.field=value"]),
    ],
)
def test_sample_refuses_what_it_cannot_make(commands, pretrain_workdir, tmp_path, flag, told):
    fields = settings(checkpoint=pretrain_workdir)
    fields += settings(num_scenes=2) if "anchor" in flag else ()
    if "prompts" not in flag:  # given twice, a tuple is the sum of both
        fields += settings(prompts=PROMPTS)
    line = commands.fail("sample", f"--config={SAMPLE}", f"--output={tmp_path / 'out'}", *SMALL, *fields, flag)
    assert all(words in line for words in told), line


@pytest.mark.parametrize(
    ("main", "flags", "told"),
    [
        ("train", [], ["--config must be given"]),
        ("train", ["--workdir=run"], ["--config must be given"]),
        ("train", ["--config=configs/sft.py:7b", "--workdir=run"], ["preset '7b'", ":5b, :2b, :tiny, :desk"]),
        ("train", ["--config=configs/sft.py"], ["--config.pretrained=DIR", "--config.data.path=FILE"]),
        ("train", ["--config=configs/pretrain.py"], ["--config.pretrained=DIR", "--config.data.path=FILE"]),
        ("sample", ["--config=configs/sample.py"], ["--config.pretrained=DIR", "--story=FILE"]),
        ("train", ["--config=configs/nope.py:tiny", "--workdir=run"], ["'configs/nope.py'", "does not exist"]),
        ("train", ["--config", "configs/nope.py", "--workdir=run"], ["'configs/nope.py'", "does not exist"]),
        ("train", ["--config=Makefile", "--workdir=run"], ["'Makefile'", "no Python file"]),
        ("train", ["--config=setup.py", "--workdir=run"], ["config"]),
        ("train", [f"--config={SAMPLE}", "--workdir=run"], ["of kind 'sample'", "one of kind pretrain or sft"]),
        ("train", ["--config.seed=1", f"--config={TRAIN}", "--workdir=run"], ["--config.seed=1", "before"]),
        ("sample", [], ["--config must"]),
        ("sample", [f"--config={TRAIN}", "--output=out"], ["of kind 'pretrain'", "one of kind sample"]),
        ("port_weights", [], ["--from and --to must be given"]),
        ("port_weights", ["--from=nowhere", "--to=new"], ["--from=nowhere does not exist", "give a diffusers"]),
        ("port_weights", ["--from=configs", "--to=tests"], ["--to=tests is there already", "give a new folder"]),
        ("port_weights", ["--from=configs", "--to=setup.py"], ["--to=setup.py is there already"]),
        ("port_weights", ["--from=configs", "--to=setup.py/new"], ["--to=setup.py/new cannot be written"]),
        ("port_weights", ["--from=a", "--to=b", "--dtype=float16"], ["--dtype=float16", "float32|bfloat16"]),
        ("port_weights", ["--from=a", "--to=b", f"--config={TRAIN}"], ["Unknown command line flag 'config'"]),
        ("train", [f"--config={TRAIN}", "--workdir=run", "--config.num_steps", "abc"], ["--config.num_steps", "type"]),
        ("port_weights", ["a", "b", "--from=a", "--to=b"], ["what is a?", "--from=DIR"]),
        ("build_data", [], ["--output must be given"]),
        ("build_data", ["--videos=nowhere.mp4", "--output=new"], ["nowhere.mp4: no such file"]),
        ("build_data", ["--captions=nowhere.json", "--output=new"], ["nowhere.json: cannot be read"]),
        ("build_data", ["--output=setup.py/new"], ["cannot write setup.py/new", "choose a writable output"]),
        ("build_data", ["--check=a.csv"], ["--config must be given with --check"]),
        ("build_data", ["--encode=a.csv", f"--config={TRAIN}"], ["--output must be given"]),
        ("build_data", ["--check_all_frames", "--output=a"], ["--check_all_frames goes with --check"]),
        ("build_data", ["--encode=a.csv", "--check=a.csv"], ["--check and --encode are two steps"]),
        ("build_data", ["--check=a.csv", f"--config={SAMPLE}"], ["of kind 'sample'", "build_data takes"]),
        ("build_data", ["--check=nowhere.csv", f"--config={TRAIN}"], ["nowhere.csv: cannot be read"]),
        ("build_data", ["--encode=nowhere.csv", f"--config={TRAIN}", "--output=new"], ["nowhere.csv: cannot be"]),
        ("evaluate", [], ["--shots and --story must be given"]),
        ("sample", ["--repeat=setup.py", "--output=out"], ["setup.py"]),
        ("sample", ["--repeat=run.json", f"--config={SAMPLE}", "--output=out"], ["leave out --config and --story"]),
        ("sample", ["--repeat=run.json", "--story=a.yaml", "--output=out"], ["leave out --config and --story"]),
        ("sample", ["--repeat=nowhere/run.json", "--output=out"], ["nowhere/run.json"]),
        ("evaluate", ["--story=nowhere", "--shots=nowhere.csv"], ["nowhere/run.json"]),
    ],
)
def test_every_main_says_what_is_missing_or_wrong(commands, main, flags, told):
    line = commands.fail(main, *flags)
    assert all(words in line for words in told), line


def test_a_batch_is_shared_out_over_all_devices(commands, dataset, tmp_path):
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    flags = commands.train_flags("pretrain", tmp_path / "run", dataset.csv, global_batch_size=3, mesh__fsdp=2)
    line = commands.fail_alone("train", *flags, **devices)
    assert "global_batch_size=3 does not divide over mesh.data x mesh.fsdp = 2; use a multiple of 2" in line
    flags = commands.train_flags("pretrain", tmp_path / "run", dataset.csv, mesh__tensor=3)
    assert "does not fit 2 devices; set --config.mesh.AXIS" in commands.fail_alone("train", *flags, **devices)


def test_folders_that_cannot_be_written_are_named(commands, dataset, pretrain_workdir, tmp_path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    line = commands.fail("train", *commands.train_flags("pretrain", below, dataset.csv))
    assert f"{below} cannot be written" in line
    line = commands.fail("train", *commands.train_flags("pretrain", tmp_path / "run", dataset.csv, data__cache=below))
    assert f"{below} cannot be written" in line
    bucket = commands.train_flags("pretrain", tmp_path / "run", dataset.csv, data__cache="gs://bucket/cache")
    assert "data.cache=gs://bucket/cache is no folder on a disk" in commands.fail("train", *bucket)
    given = settings(checkpoint=pretrain_workdir, prompts=PROMPTS)
    line = commands.fail("sample", f"--config={SAMPLE}", f"--output={below}", *SMALL, *given)
    assert f"{below} cannot be written" in line


@pytest.mark.parametrize("main", ["train", "sample", "port_weights", "build_data", "evaluate"])
def test_help_shows_the_flags_and_a_command(commands, main):
    finished = commands(main, "--help")
    assert "--" in finished.stdout
    assert "python -m" in finished.stdout
