"""TPU slices on Google Kubernetes Engine: a JobSet, one Job a slice and one Pod a host.

\b
    launch/gke submit --name night --topology v5e:4x4 \\
        --image REGISTRY/pythia_jax configs/pythia-160m.yaml \\
        --checkpoint.directory gs://BUCKET/night

The cluster needs JobSet 0.6 or newer and a TPU node pool of that topology; kubectl's own context
says which cluster. launch/Dockerfile makes the image. The cluster starts training again by itself.
"""

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml

from launch.commands import (
    CONFIG,
    DRY_RUN,
    POLL,
    RESTARTS,
    SETTINGS,
    Commands,
    LaunchError,
    Training,
    check_for_cloud,
    training,
)
from launch.outcomes import DONE, TAIL, WORTH_A_RESTART, in_words, worth_a_restart

ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
"""Values of the node label cloud.google.com/gke-tpu-accelerator.
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus"""
DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
CHIPS_PER_HOST = 4
GRACE_SECONDS = 300
"""Between SIGTERM and SIGKILL: enough to save. A spot machine gives less, whatever is asked."""
NAME_LENGTH = 40
"""Kubernetes allows 63 characters, and JobSet makes Pods' names longer: NAME-slice-0-0-xxxxx."""
OF_JOBSET = "jobset.sigs.k8s.io/jobset-name"


def hosts_and_chips(topology: str) -> tuple[str, str, int, int]:
    """`v5e:4x4` as the generation's label, `4x4`, hosts of a slice, chips of a host."""
    generation, _, shape = topology.partition(":")
    sides = shape.split("x")
    whole = all(side.isdecimal() and int(side) > 0 for side in sides)
    if not whole or len(sides) != DIMENSIONS.get(generation):
        raise LaunchError(
            f"--topology {topology}: want v5e:AxB, v6e:AxB, v4:AxBxC or v5p:AxBxC; "
            "for example v5e:4x4"
        )
    chips = math.prod(map(int, sides))
    per_host = min(chips, CHIPS_PER_HOST)
    return ACCELERATORS[generation], shape, chips // per_host, per_host


def check_name(name: str) -> None:
    """Raises LaunchError for what cannot be the name of a JobSet and of its Service.

    https://kubernetes.io/docs/concepts/overview/working-with-objects/names/#rfc-1035-label-names
    """
    if len(name) > NAME_LENGTH or not re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name):
        raise LaunchError(
            f"--name {name}: want at most {NAME_LENGTH} of a-z, 0-9 and -, "
            "a letter first and no - last"
        )


def manifest(
    name: str, image: str, topology: str, slices: int, spot: bool, restarts: int, wanted: Training
) -> str:
    """The YAML of a ConfigMap that holds CONFIG and of the JobSet that trains it.

    An exit status that no restart would mend fails the JobSet at once. Any other end of any Pod
    ends its Job (backoffLimit 0), and with it all Jobs are made again, since processes of one run
    cannot go on without each other.
    https://jobset.sigs.k8s.io/docs/concepts/ and
    https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy
    """
    accelerator, shape, hosts, chips = hosts_and_chips(topology)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": "train",
        "image": image,
        "command": ["pythia-jax", "train", "/config/config.yaml", *wanted.flags, "--pod"],
        "resources": {"limits": {"google.com/tpu": chips}, "requests": {"google.com/tpu": chips}},
        "volumeMounts": [{"name": "config", "mountPath": "/config"}],
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        # As process 1 of its container, Python could not end by SIGABRT, which is to be told.
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        # libtpu's ports between hosts, and JAX's coordinator, without a list of them.
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": name}}],
    }
    if spot:
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
        ]
    codes = {"containerName": "train", "operator": "NotIn", "values": list(WORTH_A_RESTART)}
    job = {
        "backoffLimit": 0,
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]},
        "template": {"spec": pod},
    }
    rule = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            # One slice a node pool, and the whole of it.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": restarts, "rules": [rule]},
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"config.yaml": wanted.path.read_text(encoding="utf-8")},
    }
    return yaml.safe_dump_all([settings, jobset], sort_keys=False)


class Cluster:
    """What kubectl is asked about one JobSet."""

    def __init__(self, commands: Commands, name: str, namespace: str) -> None:
        self.commands, self.name, self.namespace = commands, name, namespace

    def kubectl(self, *arguments: str) -> list[str]:
        return ["kubectl", f"--namespace={self.namespace}", *arguments]

    def get(self, *what: str) -> dict[str, Any]:
        """The JSON of something. Raises LaunchError where there is no such thing."""
        done = self.commands.ask(self.kubectl("get", *what, "--output=json"), assumed="{}")
        if done.returncode != 0:
            raise LaunchError(f"kubectl get {' '.join(what)}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def watch(self, poll_seconds: float, sleep: Callable[[float], object] = time.sleep) -> None:
        """Returns when training is done. Raises click's Exit with its status if it failed."""
        told = None
        while True:
            status = self.get("jobset", self.name).get("status", {})
            if self.commands.dry_run:
                return
            ended = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
            restarts = status.get("restarts", 0)
            if restarts != told:
                self.commands.say(f"{self.name}: started again {restarts} times so far")
                told = restarts
            if "Completed" in ended:
                self.commands.say("done")
                return
            if "Failed" in ended:
                self.fail()
            sleep(poll_seconds)

    def fail(self) -> None:
        """Show the last lines of the Pods that failed of themselves, and exit by their status."""
        pods = self.get("pods", f"--selector={OF_JOBSET}={self.name}").get("items", [])
        worst = DONE
        for pod in pods:
            status = exit_status(pod)
            if status == DONE or worth_a_restart(status):
                continue
            worst = worst or status
            name = pod["metadata"]["name"]
            done = self.commands.ask(self.kubectl("logs", name, f"--tail={TAIL}"), assumed="")
            text = "\n".join(f"    {line}" for line in done.stdout.splitlines())
            self.commands.say(f"{name} failed, {in_words(status)}:\n{text}")
        if worst == DONE:
            raise LaunchError(f"{self.name} failed: it was started again as often as it may be")
        raise click.exceptions.Exit(worst)


def exit_status(pod: dict[str, Any]) -> int:
    """Of a Pod's one container; 0 while it runs."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        ended = container.get("state", {}).get("terminated")
        if ended is not None:
            return int(ended["exitCode"])
    return DONE


NAME = click.option("--name", required=True, help="Of the JobSet.")
NAMESPACE = click.option("--namespace", default="default", show_default=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
def main() -> None: ...


@main.command(context_settings=SETTINGS)
@NAME
@NAMESPACE
@click.option("--image", required=True, help="Made by launch/Dockerfile.")
@click.option("--topology", required=True, help="Of a slice, for example v5e:4x4.")
@click.option("--slices", type=click.IntRange(1), default=1, show_default=True)
@click.option("--spot", is_flag=True, help="Cheaper, and may be taken away.")
@RESTARTS
@click.option("--out", type=click.Path(path_type=Path), default="logs", show_default=True)
@DRY_RUN
@CONFIG
@click.pass_context
def submit(
    ctx: click.Context,
    config: Path,
    name: str,
    namespace: str,
    out: Path,
    dry_run: bool,
    slices: int,
    **settings: Any,
) -> None:
    """Write OUT/NAME.yaml for CONFIG, with its dotted flags, and apply it."""
    check_name(name)
    cluster, wanted = Cluster(Commands(dry_run), name, namespace), training(ctx, config)
    check_for_cloud(wanted, settings["topology"], slices, cluster.commands.say)
    file = out / f"{name}.yaml"
    cluster.commands.write(file, manifest(name, slices=slices, wanted=wanted, **settings))
    cluster.commands.run(cluster.kubectl("apply", f"--filename={file}"))


@main.command()
@NAME
@NAMESPACE
@POLL
@DRY_RUN
def watch(name: str, namespace: str, poll_seconds: float, dry_run: bool) -> None:
    """Wait until training is done; if it fails, show the last lines of what failed."""
    Cluster(Commands(dry_run), name, namespace).watch(poll_seconds)


@main.command()
@NAME
@NAMESPACE
@DRY_RUN
def logs(name: str, namespace: str, dry_run: bool) -> None:
    """Print the logs of the Pods there are, each line with its Pod's name."""
    cluster = Cluster(Commands(dry_run), name, namespace)
    select = [f"--selector={OF_JOBSET}={name}", "--prefix", "--tail=-1"]
    # kubectl follows or prints five at a time unless told otherwise.
    cluster.commands.run(cluster.kubectl("logs", *select, "--max-log-requests=1000"))


@main.command()
@NAME
@NAMESPACE
@DRY_RUN
def delete(name: str, namespace: str, dry_run: bool) -> None:
    """End training and delete the JobSet and its ConfigMap; the node pools stay."""
    cluster = Cluster(Commands(dry_run), name, namespace)
    what = [f"jobset/{name}", f"configmap/{name}", "--ignore-not-found"]
    cluster.commands.run(cluster.kubectl("delete", *what))
