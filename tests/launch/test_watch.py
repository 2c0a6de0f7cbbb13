"""launch/watch.sh: from no slice to the end of the run, through preemption."""

import threading

from tests.launch.conftest import wait_for

RUN = ("watch.sh", "train", "--workdir=gs://bucket/runs/my run")
TRAIN = ["-m", "mask2dit_jax.train", "--workdir=gs://bucket/runs/my run"]


def essential(cloud):
    """What was done, without looking at the job and without what the workers upload."""
    done = []
    for call in cloud.calls:
        command = next((word for word in call if word.startswith("--command=")), "")
        if "worker/install.sh" in command:
            done.append("install")
        elif " start " in command:
            done.append("start")
        elif call[0] == "storage" and call[-1].endswith("sources.tar.gz") and call[1] == "cp":
            done.append("pack")
        elif call[0] == "compute" and call[3] in ("create", "delete"):
            done.append(call[3])
    return done


def test_preemption_brings_a_new_slice_and_the_same_command(cloud):
    cloud.will(states="WAITING_FOR_RESOURCES ACTIVE", train="preempt ok")
    finished = cloud.run(*RUN, SPOT="1")
    assert finished.returncode == 0, finished.stderr
    assert essential(cloud) == ["create", "pack", "install", "start", "delete", "create", "install", "start"]
    assert all("--spot" in call for call in cloud.calls if "create" in call)
    assert "pod is SUSPENDED; deleting it" in finished.stderr
    for number in (0, 1):
        assert [run["arguments"] for run in cloud.runs(number) if run["arguments"] == TRAIN] == [TRAIN] * 2
    assert len(cloud.in_bucket("bucket/runs/pod/jobs/*/worker_0.log")) >= 1


def test_a_node_that_is_preempted_under_an_active_queue_is_made_anew(cloud):
    cloud.succeed("create.sh")
    cloud.will(node="PREEMPTED")
    assert cloud.run(*RUN).returncode == 0
    assert essential(cloud) == ["create", "delete", "create", "pack", "install", "start"]


def test_a_job_that_fails_ends_the_watch_and_keeps_the_slice(cloud):
    cloud.will(train="fail")
    line = cloud.fail(*RUN, RESTARTS="1")
    assert line.startswith("error: the job failed; launch/job.sh logs WORKER shows why")
    assert essential(cloud) == ["create", "pack", "install", "start"]
    assert cloud.stages(0).count("train") == 2


def test_a_mistyped_stage_costs_no_slice(cloud):
    assert cloud.fail("watch.sh", "trian") == (
        "error: there is no stage trian; a stage is a file mask2dit_jax/STAGE.py, such as train or self_check"
    )
    assert cloud.commands == []


def test_a_first_request_that_is_refused_ends_the_watch(cloud):
    cloud.will(refuse="queued-resources create")
    assert cloud.fail(*RUN) == "error: slice pod was refused; see the message of gcloud above"
    assert cloud.commands == ["create"]


def test_a_job_that_cannot_be_started_ends_the_watch(cloud):
    cloud.will(refuse="storage cp")
    assert cloud.fail(*RUN).startswith("error: the job cannot be started on pod")
    assert essential(cloud) == ["create", "pack", "pack", "pack"]


def test_started_again_it_watches_the_job_that_runs(cloud):
    cloud.succeed("create.sh")
    cloud.succeed("install.sh")
    cloud.will(train="hang ok")
    cloud.succeed("run.sh", "train", RUN[2])
    wait_for(lambda: "train" in cloud.stages(0) and "train" in cloud.stages(1))
    before = len(essential(cloud))
    finished = _watch_and_preempt(cloud)
    assert finished.returncode == 0, finished.stderr
    assert "a job is running already; watching it" in finished.stderr
    assert essential(cloud)[before:] == ["delete", "create", "install", "start"]


def _watch_and_preempt(cloud):
    """The slice goes once the watch has looked at the job."""

    def looked():
        return any("status" in word for call in cloud.calls for word in call)

    thread = threading.Thread(target=lambda: (wait_for(looked), (cloud.folder / "preempt").touch()))
    thread.start()
    finished = cloud.run(*RUN)
    thread.join()
    return finished


def test_workers_that_restart_lose_the_job_not_the_slice(cloud):
    """A host that restarts forgets its processes, but the slice stays."""
    cloud.will(train="hang ok")
    cloud.succeed("create.sh")
    cloud.succeed("install.sh")
    cloud.succeed("run.sh", "train", RUN[2])
    wait_for(lambda: "train" in cloud.stages(0) and "train" in cloud.stages(1))
    for pid in cloud.folder.glob("worker_1/mask2dit_jobs/*/pid"):
        pid.write_text("4194303\n")  # of no process
    before = len(essential(cloud))
    assert cloud.run(*RUN).returncode == 0
    assert essential(cloud)[before:] == ["pack", "install", "start"]
