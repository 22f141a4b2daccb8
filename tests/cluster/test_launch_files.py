"""What starts tpserve elsewhere: SLURM's script with a stub of srun, manifests against schemas, the unit, the container."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.conftest import of_place
from tests.server import BIN, free_port

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
MANIFEST = LAUNCH / "kubernetes" / "tpserve.yaml"
SRUN = r"""#!/usr/bin/env bash
# Every node is this machine.
echo "srun $*" >> "$STUBS/calls"
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2> /dev/null; do wait "$task" || code=$?; done
done
exit "$code"
"""
CONTAINER = r"""#!/usr/bin/env bash
[[ $* != *" tpserve secret "* || ! -e ${!#} ]] || exit 2  # `tpserve secret` writes no file anew
printf "%s\n" "$@" >> "$STUBS/apptainer.${SLURM_PROCID:-}"
"""
PASS_ON = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$STUBS/{name}.arguments"\n'


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A directory of commands that this machine lacks."""
    write(tmp_path / "srun", SRUN)
    write(tmp_path / "scontrol", "#!/bin/sh\necho 127.0.0.1\necho 127.0.0.1\n")
    write(tmp_path / "docker", PASS_ON.format(name="docker"))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def environ(stubs: Path, place: Path, **more: str) -> dict[str, str]:
    path = f"{stubs}:{BIN}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "STUBS": str(stubs), "TMPDIR": str(place), "USER": "ada", "OMP_NUM_THREADS": "1", **more}


# SLURM


def test_a_slurm_job_serves_and_drains(stubs: Path, place: Path) -> None:
    job = free_port() % 9000  # the ports come of it
    variables = {
        "SLURM_JOB_ID": str(job), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_HOST": "login",
        "NPROC": "1",
    }  # fmt: skip
    script = [str(LAUNCH / "slurm" / "tpserve.sbatch"), "--device", "cpu", "-pp", "2"]
    log = place / "job.log"
    with log.open("w") as file:
        batch = subprocess.Popen(
            script,
            cwd=place,
            env=environ(stubs, place, **variables),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline_s = time.monotonic() + 90
    while "tpserve ready" not in log.read_text():
        assert batch.poll() is None and time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.1)
    assert [path.name for path in place.glob("*.secret")] == [f"tpserve-{job}.secret"]
    os.kill(batch.pid, signal.SIGTERM)  # as `--signal=B:TERM` does: to the batch shell alone
    batch.wait(60)
    text = log.read_text()
    assert f"ssh -N -L 8000:127.0.0.1:{20000 + job} -J ada@login ada@127.0.0.1" in text
    assert "2 CPU ranks on 2 nodes, TP 1 x PP 2" in text and f"http://127.0.0.1:{20000 + job}" in text
    assert "keys of this run travel" not in text
    assert not list(place.glob("*.secret")) and not of_place(place)
    assert "--ntasks-per-node=1" in (stubs / "calls").read_text()


@pytest.mark.parametrize("components", [1, 2])
def test_what_a_slurm_job_starts(stubs: Path, place: Path, components: int) -> None:
    """In a container, over all components of a heterogeneous job, after the job was queued again: each node its own torchrun."""
    write(stubs / "scontrol", '#!/bin/sh\necho "$3"-a\necho "$3"-b\n')
    write(stubs / "srun", SRUN.replace("node < SLURM_NNODES", f"node < {2 * components}"))
    write(stubs / "apptainer", CONTAINER)
    (place / "tpserve-7.secret").touch()
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "x0",
        "HOME": str(place),
        "CONTAINER": "my image",
    }
    if components > 1:
        variables |= {"SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "x0", "SLURM_JOB_NODELIST_HET_GROUP_1": "x1"}
    script = [str(LAUNCH / "slurm" / "tpserve.sbatch"), "/my models/m", "-tp", "2"]
    subprocess.run(script, cwd=place, env=environ(stubs, place, **variables), check=True, capture_output=True)
    calls = (stubs / "calls").read_text()
    assert ("--het-group=0-1" in calls) == (components > 1)
    for node in range(2 * components):
        words = (stubs / f"apptainer.{node}").read_text().splitlines()
        assert words[words.index("--bind") + 1] == f"{place}/.cache/huggingface:/cache,{place}"
        launch = words[words.index("my image") + 1 :]
        flags = (
            f"--nnodes {2 * components} --node_rank {node} --nproc_per_node 1 --master_addr x0-a --master_port 10007 -m tpserve"
        )
        assert launch[: 1 + len(flags.split())] == ["torchrun", *flags.split()]
        assert launch[launch.index("tpserve") + 1 :][:3] == ["/my models/m", "-tp", "2"]
    shutil.rmtree(place / ".cache")


def test_the_slurm_script_says_how_it_is_used(stubs: Path, place: Path) -> None:
    script = str(LAUNCH / "slurm" / "tpserve.sbatch")
    for arguments, told in (([], "Serve one model over the nodes"), (["/models/llama"], "this is no SLURM job: run `sbatch")):
        done = subprocess.run([script, *arguments], env=environ(stubs, place), capture_output=True, text=True, check=False)
        assert done.returncode == 2 and told in done.stderr


def test_srun_without_torchrun_is_told_the_right_line(stubs: Path, place: Path) -> None:
    command = [str(BIN / "python"), "-m", "tpserve", "/models/llama", "-tp", "8"]
    done = subprocess.run(command, env=environ(stubs, place, SLURM_PROCID="3"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run `sbatch launch/slurm/tpserve.sbatch /models/llama -tp 8`" in done.stderr
    assert "--node_rank $SLURM_NODEID" in done.stderr


# Kubernetes

LEADER_WORKER_SET: dict[str, Any] = {
    # Of leaderworkerset.x-k8s.io/v1 what is used here; the templates are checked as pods.
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"},
        "kind": {"const": "LeaderWorkerSet"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["leaderWorkerTemplate"],
            "properties": {
                "replicas": {"type": "integer", "minimum": 0},
                "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
                "networkConfig": {"properties": {"subdomainPolicy": {"enum": ["Shared", "UniquePerReplica"]}}},
                "leaderWorkerTemplate": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["workerTemplate"],
                    "properties": {
                        "size": {"type": "integer", "minimum": 1},
                        "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
                        "leaderTemplate": {"type": "object"},
                        "workerTemplate": {"type": "object"},
                    },
                },
            },
        },
    },
}


def pods() -> dict[str, dict[str, Any]]:
    template = list(yaml.safe_load_all(MANIFEST.read_text()))[2]["spec"]["leaderWorkerTemplate"]
    return {
        name: {"apiVersion": "v1", "kind": "Pod", **json.loads(json.dumps(template[f"{name}Template"]))}
        for name in ("leader", "worker")
    }


def test_the_manifests_keep_to_their_schemas() -> None:
    claim, service, group = yaml.safe_load_all(MANIFEST.read_text())
    for resource in (claim, service, *pods().values()):
        kubernetes_validate.validate(resource, "1.33", strict=True)
    jsonschema.validate(group, LEADER_WORKER_SET)


def test_the_pods_are_what_they_must_be() -> None:
    _, service, group = yaml.safe_load_all(MANIFEST.read_text())
    template = group["spec"]["leaderWorkerTemplate"]
    assert template["restartPolicy"] == "None", "a worker's death leaves the leader alone"
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    for name, pod in pods().items():
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert spec["securityContext"]["runAsNonRoot"] and container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes["dshm"]["emptyDir"]["medium"] == "Memory" and "persistentVolumeClaim" in volumes["cache"]
        drain_s = next(int(word.partition("=")[2]) for word in container["args"] if word.startswith("--drain-timeout="))
        sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"] if name == "leader" else 0
        assert sleep_s + drain_s + 10 <= spec["terminationGracePeriodSeconds"]
        values = {variable["name"]: variable.get("valueFrom") for variable in container["env"]}
        assert values["TPSERVE_API_KEY"]["secretKeyRef"] and values["HF_TOKEN"]["secretKeyRef"]
        assert [probe in container for probe in ("startupProbe", "readinessProbe", "livenessProbe")] == [name == "leader"] * 3


def test_the_pods_command_lines_are_ours(stubs: Path, place: Path) -> None:
    """With LeaderWorkerSet's variables put in, the arguments get as far as the model, which is not there."""
    for index, pod in enumerate(pods().values()):
        (container,) = pod["spec"]["containers"]
        values = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": str(index), "LWS_LEADER_ADDRESS": "127.0.0.1"}
        arguments = list(container["args"])
        for name, value in values.items():
            arguments = [word.replace(f"$({name})", value) for word in arguments]
        assert not [word for word in arguments if "$(" in word]
        secret = place / f"{index}.secret"
        subprocess.run([BIN / "tpserve", "secret", secret], check=True, capture_output=True)
        arguments = [word.replace("/secrets/cluster.secret", str(secret)) for word in arguments]
        done = subprocess.run(
            [BIN / "tpserve", "serve", "/no/such/model", *arguments[1:]],
            env=environ(stubs, place), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and "/no/such/model" in done.stderr, done.stderr
        secret.unlink()


# systemd, Docker


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_sound(tmp_path: Path) -> None:
    text = (LAUNCH / "systemd" / "tpserve.service").read_text()
    unit = tmp_path / "tpserve.service"
    unit.write_text(text.replace("/opt/tpserve/bin/tpserve", str(BIN / "tpserve")))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "tpserve.service" in line]) == (0, [])
    assert "RestartPreventExitStatus=2" in text and "KillMode=mixed" in text
    assert "Restart=always" in text, "a drain elsewhere ends this node with 0, and it must be there for the next start"


def test_a_container_a_node(stubs: Path, place: Path, tmp_path: Path) -> None:
    script = str(LAUNCH / "docker" / "node.sh")
    cache = tmp_path / "cache"
    options = ["-e", "HF_TOKEN", "-e", "NAME=two  words", "-v", "/my models:/models:ro", "--infiniband"]
    line = ["img", "10.0.0.1", "1", str(cache), *options, "--", "ORG/NAME", "--chat-template", "{{ a }} 'b'", "-tp", "8"]
    subprocess.run([script, *line], env=environ(stubs, place, TPSERVE_API_KEY="k"), check=True)
    arguments = (stubs / "docker.arguments").read_text().splitlines()
    at = arguments.index("img")
    after = line[line.index("--") + 1 :]
    assert arguments[at + 1 :] == [*after, "--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1"]
    for flag, value in zip(options[:6:2], options[1:6:2], strict=True):
        assert arguments[arguments.index(value) - 1] in (flag, {"-v": "--volume"}.get(flag))
    assert "TPSERVE_API_KEY" in arguments and "TPSERVE_ADMIN_API_KEY" not in arguments
    options = " ".join(arguments[:at])
    for part in (
        "--network host",
        "--gpus all",
        "--ipc host",
        f"--volume {cache}:/cache",
        "-e HF_TOKEN",
        "--device /dev/infiniband",
    ):
        assert part in options
    for wrong, told in ((["img"], "One node of a server"), ([*line[:4], "--privileged"], "unknown option --privileged")):
        done = subprocess.run([script, *wrong], env=environ(stubs, place), capture_output=True, text=True, check=False)
        assert done.returncode == 2 and told in done.stderr


def test_the_image_takes_what_there_is() -> None:
    root = LAUNCH.parent
    words = (LAUNCH / "docker" / "Dockerfile").read_text().splitlines()
    copied = [word for line in words if line.startswith("COPY") and "--from" not in line for word in line.split()[1:-1]]
    assert copied and all((root / name).exists() for name in copied)
    assert words[-1] == 'ENTRYPOINT ["tpserve", "serve"]' and "USER tpserve" in words
