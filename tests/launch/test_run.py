"""launch/install.sh, run.sh and job.sh, through to what the workers do."""

import fcntl
import tarfile

import pytest

from tests.launch.conftest import wait_for

AWKWARD = ("--config=configs/sft.py:tiny", "--config.prompts=('a fox', \"it's $HOME; `ls`\")", "--empty=", "*")


@pytest.fixture
def ready(cloud):
    """A slice with the package on it."""
    cloud.succeed("create.sh", "--now")
    cloud.succeed("install.sh")
    return cloud


def has_ended(cloud):
    """Exit codes are the last thing that reaches the bucket."""
    return lambda: len(cloud.in_bucket("bucket/runs/pod/jobs/*/*.exit")) == 2


def exit_codes(cloud):
    return [path.read_text().strip() for path in cloud.in_bucket("bucket/runs/pod/jobs/*/*.exit")]


def test_install_packs_the_checkout_as_it_is(cloud, checkout):
    config = checkout / "configs/sft.py"
    config.write_text("# not committed\n")
    try:
        cloud.succeed("create.sh", "--now")
        cloud.succeed("install.sh")
    finally:
        config.write_text("")
    for number in (0, 1):
        sources = cloud.folder / f"worker_{number}" / "mask2dit_jax"
        assert (sources / "configs/sft.py").read_text() == "# not committed\n"
        assert (sources / "COMMIT").read_text().endswith("-dirty\n")
        packed = (sources / "PACKED").read_text().strip()
        assert [run["arguments"] for run in cloud.runs(number, "installs")] == [
            ["venv", "--quiet", "--allow-existing", "--python", "3.12", ".venv"],
            f"pip install --quiet --python .venv/bin/python --exclude-newer {packed} --constraint constraints.txt "
            "--editable .[tpu]".split(),
        ]


def test_install_again_takes_what_was_packed_and_removes_what_is_gone(ready):
    worker = ready.folder / "worker_0/mask2dit_jax"
    (worker / "configs/old.py").touch()
    (worker / "data").mkdir()
    ready.succeed("install.sh", "--again")
    assert ready.commands.count("cp") == 1
    assert not (worker / "configs/old.py").exists()
    assert (worker / "data").is_dir()
    with tarfile.open(*ready.in_bucket("bucket/runs/pod/sources.tar.gz")) as archive:
        assert {"COMMIT", "PACKED", "launch/worker/job.sh"} <= set(archive.getnames())


def test_install_brings_weights_to_each_worker(cloud):
    weights = cloud.folder / "bucket/bucket/models/CogVideoX-5b/vae"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    cloud.succeed("create.sh", "--now")
    cloud.succeed("install.sh", WEIGHTS="gs://bucket/models/CogVideoX-5b")
    for number in (0, 1):
        sources = cloud.folder / f"worker_{number}" / "mask2dit_jax"
        assert (sources / "weights/CogVideoX-5b/vae/config.json").read_text() == "{}"


def test_run_reaches_every_worker_word_by_word(ready):
    ready.succeed("run.sh", "train", *AWKWARD, LIBTPU_INIT_ARGS="--xla_one=true --xla_two='3 4'")
    wait_for(has_ended(ready))
    for number in (0, 1):
        check, train = ready.runs(number)
        assert check["arguments"] == ["-m", "mask2dit_jax.self_check", "--bucket=gs://bucket/runs"]
        assert train["arguments"] == ["-m", "mask2dit_jax.train", *AWKWARD]
        assert train["flags"] == "--xla_one=true --xla_two='3 4'"
        assert train["at"] == str(ready.folder / f"worker_{number}" / "mask2dit_jax")
    assert exit_codes(ready) == ["0", "0"]
    assert ready.succeed("job.sh", "status").count("train exit 0") == 2
    assert ready.succeed("job.sh", "logs", "1").splitlines() == ["self_check on worker 1", "train on worker 1"]


def test_a_stage_that_fails_is_started_again(ready):
    ready.will(train="fail fail ok")
    ready.succeed("run.sh", "train")
    wait_for(has_ended(ready))
    assert ready.stages(1) == ["self_check", "train"] * 3
    assert exit_codes(ready) == ["0", "0"]


def test_restarts_come_to_an_end_and_the_code_is_kept(ready):
    ready.will(train="fail")
    ready.succeed("run.sh", "train", RESTARTS="1", CHECK="0")
    wait_for(has_ended(ready))
    assert ready.stages(0) == ["train"] * 2
    assert exit_codes(ready) == ["3", "3"]


def test_a_long_attempt_that_ends_as_the_one_before_is_not_counted_anew(ready):
    ready.will(train="refuse")
    ready.succeed("run.sh", "train", RESTARTS="1", CHECK="0", GOOD_WHILE="1", PASS_ENV="GOOD_WHILE RESTART_DELAY")
    wait_for(has_ended(ready))
    assert ready.stages(0) == ["train"] * 2


def test_no_stage_after_a_self_check_that_fails(ready):
    ready.will(self_check="fail")
    ready.succeed("run.sh", "train", RESTARTS="0")
    wait_for(has_ended(ready))
    assert ready.stages(0) == ["self_check"]
    assert exit_codes(ready) == ["3", "3"]


def test_one_job_at_a_time_and_stop(ready):
    ready.will(train="hang")
    ready.succeed("run.sh", "train")
    wait_for(lambda: "train" in ready.stages(0) and "train" in ready.stages(1))
    assert ready.succeed("job.sh", "status").count(" running") == 2
    wait_for(lambda: len(ready.in_bucket("bucket/runs/pod/jobs/*/*.log")) == 2)  # it is there while the job runs
    second = ready.run("run.sh", "train")
    assert second.returncode == 1
    assert "error: worker 0 runs " in second.stderr
    ready.succeed("job.sh", "stop")
    assert ready.succeed("job.sh", "status").count(" exit 143") == 2
    assert exit_codes(ready) == ["143", "143"]


def test_stop_kills_what_does_not_end(ready):
    ready.will(train="deaf")
    ready.succeed("run.sh", "train")
    wait_for(lambda: len(list(ready.folder.glob("deaf_*"))) == 2)
    locks = [path.open() for path in ready.folder.glob("deaf_*")]
    wait_for(lambda: all(map(is_held, locks)))  # from then on they ignore SIGTERM
    ready.succeed("job.sh", "stop", STOP_WAIT="1")
    assert exit_codes(ready) == ["143", "143"]
    wait_for(lambda: not any(map(is_held, locks)))


def is_held(lock) -> bool:
    """A lock ends with the process that holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(lock, fcntl.LOCK_UN)
    return False
