"""launch/create.sh and delete.sh, settings, usage lines, dry runs."""

import re
import shlex

import pytest

AT = ["--project=my-project", "--zone=us-west4-a", "--quiet"]
MAY = "--scopes=https://www.googleapis.com/auth/cloud-platform"
QUEUED, NODE = ["compute", "tpus", "queued-resources"], ["compute", "tpus", "tpu-vm"]
QUEUE = [*QUEUED, "create", "pod", "--node-id=pod", "--runtime-version=v2-alpha-tpuv5-lite"]
DESCRIBE_QUEUE = [*QUEUED, "describe", "pod", "--format=value(state.state)", *AT]
DESCRIBE_NODE = [*NODE, "describe", "pod", "--format=value(state)", *AT]


def test_create_queues_and_waits(cloud):
    cloud.will(states="WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    finished = cloud.run("create.sh")
    assert finished.returncode == 0
    assert [line for line in finished.stderr.splitlines() if line.startswith("pod is")] == [
        *("pod is WAITING_FOR_RESOURCES", "pod is PROVISIONING", "pod is READY")
    ]
    assert cloud.calls == [
        [*QUEUE, "--accelerator-type=v5litepod-16", MAY, *AT],
        *[DESCRIBE_QUEUE] * 3,
        DESCRIBE_NODE,
    ]


def test_create_passes_spot_and_flags(cloud):
    cloud.succeed("create.sh", SPOT="1", CREATE_FLAGS="--network=one --internal-ips")
    flags = ["--network=one", "--internal-ips", "--spot", "--accelerator-type=v5litepod-16", MAY]
    assert cloud.calls[0] == [*QUEUE, *flags, *AT]


def test_create_now_asks_for_no_queue(cloud):
    cloud.succeed("create.sh", "--now")
    assert cloud.calls == [
        [*NODE, "create", "pod", "--version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-16", MAY, *AT],
        DESCRIBE_QUEUE,
        DESCRIBE_NODE,
    ]


def test_create_names_what_to_do_when_the_slice_is_lost(cloud):
    cloud.will(states="PROVISIONING FAILED")
    assert cloud.fail("create.sh") == (
        "error: slice pod did not become ready; run launch/delete.sh, then create it again"
    )


def test_create_says_when_it_is_refused(cloud):
    cloud.will(refuse="queued-resources create")
    assert cloud.fail("create.sh") == "error: slice pod was refused; see the message of gcloud above"
    assert cloud.commands == ["create"]


@pytest.mark.parametrize(
    ("how", "deleted"),
    [((), ["queued-resources", "delete", "pod", "--force"]), (("--now",), ["tpu-vm", "delete", "pod"])],
)
def test_delete_deletes_what_was_created(cloud, how, deleted):
    cloud.succeed("create.sh", *how)
    cloud.succeed("delete.sh")
    assert cloud.calls[-1] == ["compute", "tpus", *deleted, *AT]


def test_delete_without_a_slice_calls_nothing(cloud):
    assert "there is no slice pod" in cloud.run("delete.sh").stderr
    assert cloud.commands == []


def test_a_state_that_cannot_be_read_is_no_slice_that_is_gone(cloud):
    cloud.will(refuse="queued-resources describe")
    finished = cloud.run("delete.sh")
    assert finished.returncode == 1
    assert "PERMISSION_DENIED" in finished.stderr
    assert cloud.commands == []


def test_settings_come_from_a_file_and_the_environment_wins(cloud, tmp_path):
    settings = tmp_path / "v5p.env"
    settings.write_text(': "${NAME:=other}"\n: "${ACCELERATOR:=v5p-8}"\n')
    cloud.succeed("create.sh", ENV_FILE=str(settings), ACCELERATOR="")
    assert "--accelerator-type=v5p-8" in cloud.calls[0]
    assert "pod" in cloud.calls[0]


@pytest.mark.parametrize(
    ("script", "arguments"), [("create.sh", ()), ("delete.sh", ()), ("install.sh", ()), ("job.sh", ("stop",))]
)
def test_missing_settings_in_one_line(cloud, script, arguments):
    line = cloud.fail(script, *arguments, PROJECT="", BUCKET="")
    assert line.startswith("error: not set: PROJECT BUCKET; fill in ")
    assert cloud.calls == []


def test_a_bucket_without_gs_is_refused(cloud):
    assert cloud.fail("create.sh", BUCKET="bucket") == "error: BUCKET=bucket does not start with gs://"


@pytest.mark.parametrize(
    "command",
    [
        *("create.sh --later", "delete.sh pod", "install.sh --twice", "run.sh", "watch.sh"),
        *("job.sh", "job.sh start", "job.sh logs two"),
    ],
)
def test_wrong_arguments_print_the_usage(cloud, command):
    script, *arguments = command.split()
    assert cloud.fail(script, *arguments).startswith(f"error: usage: launch/{script}")
    assert cloud.calls == []


def test_a_stage_that_does_not_exist_is_refused(cloud):
    assert cloud.fail("run.sh", "../train").startswith("error: there is no stage ../train")
    assert cloud.fail("run.sh", "trian").startswith("error: there is no stage trian")


def test_dry_run_prints_the_calls_of_a_real_one_and_makes_none(cloud):
    script = ("watch.sh", "train", "--config.prompts=('a fox', \"it's\")")
    lines = cloud.succeed(*script, DRY_RUN="1").splitlines()
    assert cloud.calls == []
    assert all(line.startswith("+ gcloud ") for line in lines)
    cloud.succeed(*script)
    # The workers fetch the sources and leave logs and exit codes.
    ours = [call for call in cloud.calls if call[1] != "cat" and not call[-1].endswith((".log", ".exit"))]
    assert {_essence(shlex.split(line)[2:]) for line in lines} == {_essence(call) for call in ours}


def _essence(call):
    """A call without what differs each time: temporary folders, and the name of a job, made of the time."""
    return tuple(re.sub(r"/tmp\S*/|\d{8}-\d{6}", "", word) for word in call)
