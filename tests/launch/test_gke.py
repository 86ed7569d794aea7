"""A JobSet that starts again what is worth it, and whose errors are told."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from stand_ins import World

from launch import gke
from launch.gke import hosts_and_chips
from launch.outcomes import worth_a_restart

JOB = ["--name", "night", "--image", "registry/pythia_jax", "--topology", "v5e:4x4"]


def run(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(gke.main, [command, *map(str, arguments)])


def test_a_submitted_jobset_trains_the_config_on_every_host_of_every_slice(
    world: World, config: Path
) -> None:
    flags = ["--mesh.slices", "2"]
    done = run("submit", *JOB, "--slices", "2", "--spot", "--restarts", "7", config, *flags)
    assert done.exit_code == 0, done.output
    settings, jobset = yaml.safe_load_all(world.read("applied.yaml"))
    assert settings["data"]["config.yaml"] == config.read_text()
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert replicated["replicas"] == 2
    assert job["completions"] == job["parallelism"] == 4, "16 chips, 4 a host"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == [
        "pythia-jax",
        "train",
        "/config/config.yaml",
        "--mesh.slices",
        "2",
        "--pod",
    ]
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["configMap"]["name"] == settings["metadata"]["name"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert world.calls() == [
        ["kubectl", "--namespace=default", "apply", "--filename=logs/night.yaml"]
    ]


@pytest.mark.parametrize("status", [1, 2, 75, 130, 134, 137, 139, 143])
def test_the_cluster_restarts_on_what_every_launcher_restarts_on(
    world: World, config: Path, status: int
) -> None:
    run("submit", *JOB, config)
    _, jobset = yaml.safe_load_all(world.read("applied.yaml"))
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    # Kubernetes: NotIn matches a container that failed with none of the values.
    assert (rule["action"], codes["operator"]) == ("FailJob", "NotIn")
    ends_the_job_for_good = status not in codes["values"]
    assert ends_the_job_for_good is not worth_a_restart(status)
    (policy,) = jobset["spec"]["failurePolicy"]["rules"]
    assert policy == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    # pod failure policies want these two; an aborted Python must not be a container's process 1
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert pod["shareProcessNamespace"] is True
    assert pod["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v5e:1x1", ("tpu-v5-lite-podslice", "1x1", 1, 1)),
        ("v5e:16x16", ("tpu-v5-lite-podslice", "16x16", 64, 4)),
        ("v4:2x2x1", ("tpu-v4-podslice", "2x2x1", 1, 4)),
        ("v5p:4x4x4", ("tpu-v5p-slice", "4x4x4", 16, 4)),
        ("v6e:2x4", ("tpu-v6e-slice", "2x4", 2, 4)),
    ],
)
def test_hosts_and_chips_of_topologies(topology: str, expected: tuple) -> None:
    assert hosts_and_chips(topology) == expected


@pytest.mark.parametrize("topology", ["v5e", "v5e:4", "v3:4x4", "v5e:4xb", "v5e:0x4", "v5p:4x4"])
def test_a_topology_that_is_none_is_refused(world: World, config: Path, topology: str) -> None:
    done = run("submit", *JOB[:4], "--topology", topology, config)
    assert done.exit_code == 1 and (
        "no such TPU slice" in done.output or "want v5e:AxB" in done.output
    )
    assert world.calls() == []


@pytest.mark.parametrize("name", ["Night", "night_1", "1st", "night-", "n" * 41, "a.b", ""])
def test_a_name_that_kubernetes_refuses_is_refused_before(
    world: World, config: Path, name: str
) -> None:
    done = run("submit", "--name", name, *JOB[2:], config)
    assert done.exit_code == 1 and f"Error: --name {name}: want at most 40" in done.output
    assert world.calls() == [] and not Path("logs").exists()


@pytest.mark.parametrize("name", ["n", "night-2", "n" * 40])
def test_other_names_are_taken(world: World, config: Path, name: str) -> None:
    assert run("submit", "--name", name, *JOB[2:], config).exit_code == 0


def jobset(restarts: int, *conditions: str) -> dict:
    told = [{"type": kind, "status": "True"} for kind in conditions]
    return {"status": {"restarts": restarts, "conditions": told}}


def test_watching_tells_of_restarts_until_it_is_done(world: World) -> None:
    world.set("jobset", [jobset(0), jobset(1), jobset(1), jobset(2), jobset(2, "Completed")])
    done = run("watch", "--name", "night", "--poll-seconds", "0.01")
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        *(f"night: started again {n} times so far" for n in range(3)),
        "done",
    ]


def pod(name: str, status: int) -> dict:
    ended = {"state": {"terminated": {"exitCode": status}}}
    return {"metadata": {"name": name}, "status": {"containerStatuses": [ended]}}


def test_an_error_is_told_with_the_last_lines_of_the_pod_that_made_it(world: World) -> None:
    world.set("jobset", [jobset(0), jobset(0, "Failed")])
    world.set("pods", [{"items": [pod("night-0", 137), pod("night-1", 3), pod("night-2", 134)]}])
    done = run("watch", "--name", "night", "--poll-seconds", "0.01")
    assert done.exit_code == 3
    assert "night-1 failed, exit status 3:\n    Traceback\n    RuntimeError: no such" in done.output
    assert "night-0 failed" not in done.output
    assert [call[-2] for call in world.calls() if "logs" in call] == ["night-1"]


def test_too_many_restarts_are_an_error(world: World) -> None:
    world.set("jobset", [jobset(7, "Failed")])
    world.set("pods", [{"items": [pod("night-0", 137)]}])
    done = run("watch", "--name", "night")
    assert done.exit_code == 1 and "as often as it may be" in done.output


def test_logs_and_delete_name_the_jobset(world: World) -> None:
    run("logs", "--name", "night", "--namespace", "research")
    run("delete", "--name", "night", "--namespace", "research")
    logs, delete = world.calls()
    assert logs[:4] == [
        "kubectl",
        "--namespace=research",
        "logs",
        "--selector=jobset.sigs.k8s.io/jobset-name=night",
    ]
    assert delete[2:] == ["delete", "jobset/night", "configmap/night", "--ignore-not-found"]


@pytest.mark.parametrize("command", ["submit", "watch", "logs", "delete"])
def test_dry_run_shows_commands_and_calls_nothing(
    world: World, config: Path, tmp_path: Path, command: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    arguments = [*JOB, config] if command == "submit" else JOB[:2]
    done = run(command, *arguments, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "+ kubectl --namespace=default" in done.output
    assert world.calls() == [] and sorted(tmp_path.rglob("*")) == before
    if command == "submit":
        assert "kind: JobSet" in done.output


def test_a_local_run_folder_is_refused(world: World, config: Path) -> None:
    done = run("submit", *JOB, config, "--checkpoint.directory", "runs/night")
    assert done.exit_code == 1 and "mount storage" in done.output
    assert world.calls() == []
