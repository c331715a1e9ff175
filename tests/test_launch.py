"""The launchers of launch/, without their sites.

What they would submit is parsed by the schema or parser of the program that would read it. What would run at the site is run
here, with stand-ins for srun, gcloud and the like that record their arguments and give prepared answers.
"""

import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from unittest import mock

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from voxcpm2_jax.cli import main
from voxcpm2_jax.cli.configs import load_config

ROOT = pathlib.Path(__file__).parents[1]
# Words that need quoting at every level that they pass through.
TRAIN = [
    "--config=configs/backbone.py:2b", "--config.batch.rows=3072", "--data=/mnt/voxcpm2/shards",
    '--workdir=/mnt/voxcpm2/a "run" $(HOME) $HOME \\',
    "--config.samples.texts=(\"it's\",)", "--config.num_steps=7",
]  # fmt: skip
NEEDED = {
    "gke": {"TOPOLOGY": "4xv6e:16x16", "IMAGE": "registry.invalid/a/b:1", "CLAIM": "work"},
    "slurm": {"NODES": "4"},
    "tpu_vm": {"TOPOLOGY": "2xv5e:16x16", "ZONE": "a", "IMAGE": "registry.invalid/a/b:1", "SHARE": "10.0.0.2:/share"},
    "skypilot": {"ACCELERATORS": "tpu-v6e-8", "BUCKET": "gs://b"},
}
STAND_IN = """#!{python}
import json, os, pathlib, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([name, *sys.argv[1:], *([sys.stdin.read()] if name in ("sbatch", "kubectl") else [])]) + "\\n")
replies = pathlib.Path(os.environ["CALLS"] + "." + name)
code, output = 0, ""
if replies.exists() and (left := json.loads(replies.read_text())):
    code, output = left.pop(0)
    replies.write_text(json.dumps(left))
print(output, end="")
sys.exit(code)
"""


class Site:
    """A machine to launch from: an empty environment, `voxcpm2-jax`, and stand-ins for the programs that launchers call."""

    def __init__(self, directory):
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.calls_file = directory / "calls"
        self._program("voxcpm2-jax", f'#!/bin/sh\nexec {sys.executable} -m voxcpm2_jax "$@"\n')
        for name in ("sleep", "srun", "scontrol", "squeue", "sbatch", "kubectl", "xpk", "gcloud", "sky"):
            self._program(name, STAND_IN.format(python=sys.executable))
        self.env = {
            "PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(directory), "PYTHONPATH": str(ROOT), "CALLS": str(self.calls_file),
        }  # fmt: skip

    def _program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def answer(self, name, *replies):
        """Prepares what the stand-in `name` gives call by call: (exit code, output)."""
        pathlib.Path(f"{self.calls_file}.{name}").write_text(json.dumps(replies))

    def run(self, *words, **env):
        self.calls_file.write_text("")
        return subprocess.run(
            [str(w) for w in words], env=self.env | env, cwd=ROOT, capture_output=True, text=True, timeout=60
        )  # fmt: skip

    def launch(self, site, *options, train=TRAIN, **env):
        return self.run(f"launch/{site}.sh", *options, "--", *train, **(NEEDED[site] | env))

    def dry_run(self, site, *options, **env):
        """What would be submitted; `env` may also hold `train`."""
        done = self.launch(site, "--dry-run", *options, **env)
        assert done.returncode == 0 and done.stderr == "" and self.calls == []
        return done.stdout

    @property
    def calls(self):
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def calls_of(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def options(words):
    """--name=value, and --name alone, as a dict; no other words."""
    assert all(word.startswith("--") for word in words)
    return {name: value for name, _, value in (word[2:].partition("=") for word in words)}


def is_ours(command):
    """Checks that these words are the requested training, and that our command line reads them."""
    assert command == ["voxcpm2-jax", "train", *TRAIN]
    args, overrides = main.parse(command[1:])
    assert load_config(args.config, overrides)["num_steps"] == 7
    return args.workdir == '/mnt/voxcpm2/a "run" $(HOME) $HOME \\'


# ---- GKE -------------------------------------------------------------------------------------------------------------


def jobset(text):
    """The manifest; JobSet's own schema must read all of it."""
    manifest = yaml.safe_load(text)
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    (jobs,) = manifest["spec"]["replicatedJobs"]
    pod = jobs["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return manifest, jobs, jobs["template"]["spec"], pod, container


def test_gke_trains(site):
    manifest, _, _, pod, container = jobset(site.dry_run("gke", SPOT="1", QUEUE="pods"))
    # Kubernetes: $$(WORD) is $(WORD), where $(WORD) alone would be a variable.
    assert is_ours(["voxcpm2-jax", *(word.replace("$$(", "$(") for word in container["args"])])
    assert not any(re.search(r"(?<!\$)\$\(", word) for word in container["args"])
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "pods"}
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert container["image"] == "registry.invalid/a/b:1"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "work"}
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]


@pytest.mark.parametrize(
    ("topology", "slices", "hosts", "per_host", "accelerator", "shape"),
    [
        ("v5e:16x16", 1, 64, 4, "tpu-v5-lite-podslice", "16x16"),
        ("v5p:8x8x8", 1, 128, 4, "tpu-v5p-slice", "8x8x8"),
        ("4xv6e:8x8", 4, 16, 4, "tpu-v6e-slice", "8x8"),
        ("v6e:1x1", 1, 1, 1, "tpu-v6e-slice", "1x1"),
    ],
)
def test_gke_has_a_pod_for_each_host(site, topology, slices, hosts, per_host, accelerator, shape):
    manifest, jobs, job, pod, container = jobset(site.dry_run("gke", TOPOLOGY=topology))
    assert jobs["replicas"] == slices and job["parallelism"] == job["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": per_host}
    kind, topology = (pod["nodeSelector"][f"cloud.google.com/gke-tpu-{name}"] for name in ("accelerator", "topology"))
    assert (kind, topology) == (accelerator, shape) and len(pod["nodeSelector"]) == 2
    assert manifest["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


@pytest.mark.parametrize(
    ("failure", "action"),
    [
        (2, "FailJobSet"), (75, "RestartJobSetAndIgnoreMaxRestarts"), (1, "RestartJobSet"), (134, "RestartJobSet"),
        ("DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"), ("SomethingElse", "RestartJobSet"),
    ],
)  # fmt: skip
def test_gke_restarts_what_may_be_restarted(site, failure, action):
    manifest, _, job, pod, container = jobset(site.dry_run("gke", MAX_FAILURES="5"))
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5 and pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0

    # As the two controllers go about it: the job's first rule that fits ends its message, which the set's rules read.
    def fits(rule):
        codes = rule.get("onExitCodes", {"values": []})
        assert codes.get("containerName", container["name"]) == container["name"] and codes.get("operator", "In") == "In"
        return failure in codes["values"] or {"type": failure, "status": "True"} in rule.get("onPodConditions", [])

    index = next((i for i, rule in enumerate(job["podFailurePolicy"]["rules"]) if fits(rule)), None)
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    if index is not None:
        assert job["podFailurePolicy"]["rules"][index]["action"] == "FailJob"
        reason, message = "PodFailurePolicy", f"Container train for pod a/b failed matching FailJob rule at index {index}"
    rules = (
        rule["action"]
        for rule in policy["rules"]
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in rule["onJobFailureMessagePatterns"])
    )
    assert next(rules, "RestartJobSet") == action


def test_gke_submits_what_the_dry_run_shows(site):
    shown = site.dry_run("gke")
    assert site.launch("gke").returncode == 0
    assert site.calls == [["kubectl", "create", "--filename=-", shown]]


def test_xpk(site):
    shown = site.dry_run("gke", "--xpk", CLUSTER="c")
    assert site.launch("gke", "--xpk", CLUSTER="c").returncode == 0
    (call,) = site.calls
    assert shlex.split(shown) == call and call[:3] == ["xpk", "workload", "create"]
    said = options(call[3:])
    assert is_ours(shlex.split(said.pop("command")))
    assert said == {
        "cluster": "c", "workload": "voxcpm2", "tpu-type": "v6e-256", "num-slices": "4", "storage": "work",
        "docker-image": "registry.invalid/a/b:1", "max-restarts": "10", "restart-on-exit-codes": "1,75",
        "termination-grace-period-seconds": "600",
    }  # fmt: skip


CLUSTER = """#!/bin/sh
# Stands in for kubectl in a cluster that has three of four slices.
cd {state}
echo "$1" >> asked
case "$1" in
  create) grep -o 'replicas: [0-9]*' > replicas; cat replicas >> asked ;;
  get) if grep -q 4 replicas; then echo "voxcpm2 3 "; elif [ -e seen ]; then echo "voxcpm2 3 Completed"
       else touch seen; echo "voxcpm2 3 "; fi ;;
esac
"""


def test_gke_submits_fewer_slices_after_a_while(site, tmp_path):
    site._program("kubectl", CLUSTER.format(state=tmp_path))
    done = site.launch("gke", MIN_SLICES="3", WAIT_SEC="1")
    assert done.returncode == 0 and done.stderr == "3 slices ready for 1 s; submitting 3 of 4 slices\n"
    calls = [line for line in (tmp_path / "asked").read_text().splitlines() if line != "get"]
    assert calls == ["create", "replicas: 4", "delete", "create", "replicas: 3"]
    site._program("kubectl", '#!/bin/sh\n[ "$1" = get ] || cat > /dev/null\n')
    assert "the JobSet voxcpm2 is gone" in mistake(site.launch("gke", MIN_SLICES="3"))
    assert "--planned=4x256" in jobset(site.dry_run("gke", MIN_SLICES="3"))[-1]["args"]


# ---- Slurm -----------------------------------------------------------------------------------------------------------


def test_slurm_submits_what_the_dry_run_shows(site):
    shown = site.dry_run("slurm", GRACE_SEC="120")
    assert site.launch("slurm", GRACE_SEC="120").returncode == 0
    assert site.calls == [["sbatch", shown]]
    asked = options([line.removeprefix("#SBATCH ") for line in shown.splitlines() if line.startswith("#SBATCH ")])
    assert asked == {
        "job-name": "voxcpm2", "output": "voxcpm2-%j.log", "open-mode": "append", "nodes": "4", "gpus-per-node": "8",
        "ntasks-per-node": "8", "exclusive": "", "mem": "0", "requeue": "", "signal": "TERM@120",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "state", "is_requeued"),
    [
        ([0], "RUNNING", False), ([2], "RUNNING", False), ([75], "RUNNING", True), ([75], "COMPLETING", False),
        ([1, 137, 0], "RUNNING", False), ([1, 75], "RUNNING", True), ([1, 1, 1], "RUNNING", False),
    ],
)  # fmt: skip
def test_slurm_job(site, tmp_path, codes, state, is_requeued):
    """Runs the batch script; the last of `codes` is what it ends with."""
    job = tmp_path / "job.sh"
    job.write_text(site.dry_run("slurm", MAX_FAILURES="2"))
    site.answer("srun", *[(code, "") for code in codes])
    site.answer("squeue", (0, f"{state}\n"))
    done = site.run("bash", job, SLURM_JOB_ID="12")
    assert done.returncode == codes[-1]
    runs = site.calls_of("srun")
    assert len(runs) == len(codes)
    for words in runs:
        assert options(words[:3]) == {"kill-on-bad-exit": "0", "wait": "180", "cpu-bind": "none"} and is_ours(words[3:])
    assert site.calls_of("scontrol") == ([["requeue", "12"]] if is_requeued else [])


def test_slurm_job_outlives_the_signal(site, tmp_path):
    """The signal may also reach the batch script, which has to wait until the processes have saved."""
    job = tmp_path / "job.sh"
    job.write_text(site.dry_run("slurm"))
    site._program("srun", f"#!/bin/sh\ntouch {tmp_path}/started\n/bin/sleep 1\nexit 75\n")
    site.answer("squeue", (0, "RUNNING\n"))
    process = subprocess.Popen(["bash", str(job)], env=site.env | {"SLURM_JOB_ID": "12"}, cwd=tmp_path)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75 and site.calls_of("scontrol") == [["requeue", "12"]]


@pytest.mark.parametrize(("rows", "least", "nodes"), [(3072, 2, "2-4"), (3072, 4, "4"), (256, 2, "2,4"), (256, 1, "1,2,4")])
def test_slurm_starts_with_fewer_nodes_if_it_may(site, rows, least, nodes):
    """Three nodes of 8 cannot share 256 rows evenly; Slurm then gets a list."""
    shown = site.dry_run("slurm", MIN_NODES=str(least), train=[*TRAIN, f"--config.batch.rows={rows}"])
    assert f"#SBATCH --nodes={nodes}\n" in shown
    assert ("--planned=4x8" in shown) == (least < 4)


# ---- TPU VMs ---------------------------------------------------------------------------------------------------------


def verbs(site):
    """The calls of gcloud: the verb of queued-resources, or for ssh the docker command."""
    done = []
    for words in site.calls_of("gcloud"):
        assert words[:3] == ["compute", "tpus", "queued-resources"]
        said = options(words[4 if words[3] == "list" else 5 :])
        assert said["zone"] == "a" and (words[3] == "list" or words[4] == "voxcpm2")
        if words[3] == "ssh":
            assert said["node"] == said["worker"]
            done.append(re.search(r"docker (start|wait|logs)", said["command"])[1] + " " + said["node"])
        else:
            done.append(words[3])
    return done


def test_tpu_vm_trains_on_all_hosts(site, tmp_path):
    create, _, start, wait, delete = (shlex.split(line) for line in site.dry_run("tpu_vm").splitlines())
    assert options(create[6:]) == {
        "zone": "a", "accelerator-type": "v5litepod-256", "runtime-version": "v2-alpha-tpuv5-lite", "node-count": "2",
        "node-prefix": "voxcpm2", "spot": "",
    }  # fmt: skip
    assert "--force" in delete and options(wait[6:])["node"] == options(start[6:])["worker"] == "all"


HOST = """#!/bin/sh
# Stands in for sudo and mountpoint: a host that may have a container and a mount; its state is files.
cd {state}
name=$(basename "$0")
echo "$name $*" >> calls
case "$name $1 $2" in
  "sudo docker ps") for word; do case $word in *label=*) label=${{word##*label=}} ;; esac; done
                    if [ -e container ] && grep -qxF "$label" container; then echo 1; fi ;;
  "sudo docker start") [ -e container ] ;;
  "sudo docker stop") [ -e container ] ;;
  "sudo docker rm") rm container ;;
  "sudo docker run") [ ! -e container ] || exit 125
                     for word; do case $word in --label=*) echo "${{word#--label=}}" > container ;; esac; done
                     printf '%s\\0' "$@" > run ;;
  "sudo mount "*) touch mount ;;
  "sudo umount "*) rm mount ;;
  "mountpoint "*) [ -e mount ] ;;
esac
"""


def test_tpu_vm_starts_the_container_again_unless_its_arguments_changed(site, tmp_path):
    """The command for each host is run here: without a container, with it, and with another one of the same name."""
    state = tmp_path / "state"
    state.mkdir()
    for name in ("sudo", "mountpoint"):
        site._program(name, HOST.format(state=state))
    site._program("voxcpm2-jax", "#!/bin/sh\n")

    def start(**env):
        command = options(shlex.split(site.dry_run("tpu_vm", **env).splitlines()[2])[6:])["command"]
        (state / "calls").write_text("")
        done = site.run("bash", "-ec", command)
        assert done.returncode == 0, done.stderr
        calls = [line.removeprefix("sudo ").split() for line in (state / "calls").read_text().splitlines()]
        calls = [" ".join(words[:2]) if words[0] == "docker" else words[0] for words in calls]
        return [call for call in calls if call not in ("docker ps", "mountpoint", "mkdir")]

    assert start() == ["docker stop", "apt-get", "mount", "docker run"]
    words = (state / "run").read_text().split("\0")[:-1]
    image = words.index("registry.invalid/a/b:1")
    assert is_ours(["voxcpm2-jax", *words[image + 1 :]])
    assert {"--detach", "--name=voxcpm2", "--network=host", "--volume=/mnt/voxcpm2:/mnt/voxcpm2"} < set(words[:image])
    assert start() == ["docker start"]
    for change in ({"IMAGE": "registry.invalid/a/b:2"}, {"SHARE": "10.0.0.2:/other"}, {"train": [*TRAIN, "--config.seed=3"]}):
        assert start(**change) == ["docker stop", "docker rm", "umount", "apt-get", "mount", "docker run"]
        assert start(**change) == ["docker start"]


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v5e:4x4", {"accelerator-type": "v5litepod-16", "runtime-version": "v2-alpha-tpuv5-lite", "node-id": "voxcpm2"}),
        ("v5p:8x8x8", {"accelerator-type": "v5p-1024", "runtime-version": "v2-alpha-tpuv5", "node-id": "voxcpm2"}),
        ("3xv6e:8x8", {"accelerator-type": "v6e-64", "runtime-version": "v2-alpha-tpuv6e", "node-count": "3"}),
    ],
)
def test_tpu_vm_asks_for_the_topology(site, topology, expected):
    create = shlex.split(site.dry_run("tpu_vm", TOPOLOGY=topology, CAPACITY="reserved").splitlines()[0])
    assert expected.items() <= options(create[6:]).items() and "--reserved" in create and "--spot" not in create


def test_tpu_vm_restarts(site):
    """Queued, preempted after saving, connection lost, query failed, VMs preempted, and then to the end."""
    ok, lost = (0, ""), (255, "")

    def state(name):
        return (0, f"{name}\n")

    site.answer(
        "gcloud",
        (0, ""), ok, state("WAITING_FOR_RESOURCES"), state("ACTIVE"), ok, (0, "75\nrun: 75\n75\n"),
        state("ACTIVE"), ok, lost, lost, state("ACTIVE"), lost, state("SUSPENDED"), ok,
        (0, ""), ok, state("ACTIVE"), ok, (0, "0\n0\n"), ok,
    )  # fmt: skip
    assert site.launch("tpu_vm").returncode == 0
    assert verbs(site) == [
        "list", "create", "list", "list", "start all", "wait all",
        "list", "start all", "wait all", "list", "list", "start all", "list", "delete",
        "list", "create", "list", "start all", "wait all", "delete",
    ]  # fmt: skip


@pytest.mark.parametrize(("codes", "tries", "ends_with"), [("2\n2\n", 1, 2), ("0\n1\n", 3, 1), ("134\n137\n", 3, 1)])
def test_tpu_vm_gives_up(site, codes, tries, ends_with):
    """After a mistake at once, after a failure with MAX_FAILURES restarts; logs are shown and the resources deleted."""
    one = [(0, "ACTIVE\n"), (0, ""), (0, codes), (0, "")]
    site.answer("gcloud", *one * tries)
    assert site.launch("tpu_vm", MAX_FAILURES="2").returncode == ends_with
    assert verbs(site) == ["list", "start all", "wait all", "logs 0"] * tries + ["delete"]


QUEUE = """#!/bin/sh
# Stands in for gcloud where two slices are never free and one is.
cd {state}
echo "$@" >> asked
case "$4" in
  create) case "$*" in *--node-count=2*) echo WAITING_FOR_RESOURCES > queue ;; *) echo ACTIVE > queue ;; esac ;;
  list) cat queue 2> /dev/null || true ;;
  delete) rm queue ;;
  ssh) case "$*" in *"docker wait"*) echo 0 ;; esac ;;
esac
"""


def test_tpu_vm_requests_fewer_slices_after_a_while(site, tmp_path):
    site._program("gcloud", QUEUE.format(state=tmp_path))
    done = site.launch("tpu_vm", MIN_SLICES="1", WAIT_SEC="1")
    assert done.returncode == 0 and done.stderr == "not active after 1 s; requesting 1 of 2 slices\n"
    calls = [line for line in (tmp_path / "asked").read_text().splitlines() if " list " not in line]
    assert [line.split()[3] for line in calls] == ["create", "delete", "create", "ssh", "ssh", "delete"]
    assert "--node-count=2" in calls[0] and "--node-id=voxcpm2" in calls[2] and "--planned=2x256" in calls[3]


# ---- SkyPilot --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codes", "runs"), [([0], 1), ([2], 1), ([75], 1), ([1, 0], 2), ([1, 137, 1], 3)])
def test_skypilot(site, tmp_path, codes, runs):
    task = yaml.safe_load(site.dry_run("skypilot", MAX_FAILURES="2"))
    setup, run = task.pop("setup"), task.pop("run")
    assert task == {
        "name": "voxcpm2", "workdir": str(ROOT),
        "resources": {
            "accelerators": "tpu-v6e-8", "use_spot": True,
            "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
        },
        # MOUNT refuses to append to a file, which metrics.jsonl needs.
        "file_mounts": {"/mnt/voxcpm2": {"source": "gs://b", "mode": "MOUNT_CACHED"}},
    }  # fmt: skip
    assert "'.[tpu]'" in setup and "'.[cuda]'" in site.dry_run("skypilot", ACCELERATORS="H100:8")
    installed = tmp_path / "voxcpm2" / "bin"
    installed.mkdir(parents=True)
    shutil.copy(site.bin / "sky", installed / "voxcpm2-jax")
    site.answer("voxcpm2-jax", *[(code, "") for code in codes])
    # SkyPilot appends commands that wait until everything is uploaded, and takes the exit code of the whole.
    done = site.run("bash", "-c", run + "\necho uploaded")
    assert done.returncode == codes[-1] and done.stdout == "uploaded\n"
    assert len(site.calls_of("voxcpm2-jax")) == runs
    assert all(is_ours(["voxcpm2-jax", *words]) for words in site.calls_of("voxcpm2-jax"))


def test_skypilot_submits_what_the_dry_run_shows(site):
    site._program("sky", f'#!/bin/sh\nfor file; do :; done\n{shutil.which("cat")} "$file"\n')
    done = site.launch("skypilot")
    assert done.returncode == 0 and done.stdout == site.dry_run("skypilot")


# ---- mistakes --------------------------------------------------------------------------------------------------------


def mistake(done):
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(("name", "variable"), [(name, v) for name, needed in NEEDED.items() for v in needed])
def test_missing_variables_are_refused(site, name, variable):
    for options in ((), ("--dry-run",)):
        assert f"{variable} is not set; expected " in mistake(site.launch(name, *options, **{variable: ""}))
        assert site.calls == []


def test_mistakes_are_found_before_anything_is_queued(site):
    assert "unexpected argument 'fast' before --" in mistake(site.launch("slurm", "fast"))
    assert "no training arguments" in mistake(site.launch("slurm", train=[]))
    assert "unrecognized arguments: --steps=3" in mistake(site.launch("slurm", train=[*TRAIN, "--steps=3"]))
    assert "optim.learning_rate" in mistake(site.launch("slurm", train=[*TRAIN, "--config.optim.learning_rate=-1"]))
    assert "300 parts" in mistake(site.launch("slurm", NODES="60", GPUS="5"))
    for name, needed in (("gke", "1024 parts"), ("tpu_vm", "512 parts"), ("skypilot", "8 parts")):
        assert needed in mistake(site.launch(name, train=[*TRAIN, "--config.batch.rows=4"]))
    assert "line break" in mistake(site.launch("slurm", train=[*TRAIN, "--data=a\nb"]))
    assert "NAME is 'a_b'; expected" in mistake(site.launch("slurm", NAME="a_b"))
    assert "MAX_FAILURES is 'many'; expected a whole number" in mistake(site.launch("slurm", MAX_FAILURES="many"))
    assert "GPUS is '-1'; expected a whole number of 1 or more" in mistake(site.launch("slurm", GPUS="-1"))
    assert "CHIPS_PER_HOST is '0'; expected a whole number of 1 or more" in mistake(site.launch("gke", CHIPS_PER_HOST="0"))
    assert site.calls == []
    (site.bin / "voxcpm2-jax").unlink()
    assert "voxcpm2-jax is not installed here" in mistake(site.launch("slurm"))


@pytest.mark.parametrize("name", NEEDED)
def test_every_site_checks_and_explains(site, name):
    assert "unknown option --fast" in mistake(site.launch(name, "--fast"))
    assert "got '3b'" in mistake(site.launch(name, train=["--config=configs/backbone.py:3b", "--workdir=x"]))
    assert site.calls == []
    help = site.run(f"launch/{name}.sh", "--help")
    assert help.returncode == 0 and f"launch/{name}.sh [--dry-run] -- " in help.stdout and "MAX_FAILURES" in help.stdout


@pytest.mark.parametrize("topology", ["v6e", "v6e:16", "v9:2x2", "0xv6e:2x2", "v6e:2x0", "v5e:2x2x2x2", "4v6e:2x2"])
@pytest.mark.parametrize("name", ["gke", "tpu_vm"])
def test_wrong_topologies_are_refused(site, name, topology):
    assert f"TOPOLOGY is '{topology}'; expected" in mistake(site.launch(name, TOPOLOGY=topology))


def test_wrong_variables_are_refused(site):
    assert "expected a multiple of CHIPS_PER_HOST=4" in mistake(site.launch("gke", TOPOLOGY="v6e:2x3"))
    assert "CAPACITY is 'cheap'" in mistake(site.launch("tpu_vm", CAPACITY="cheap"))
    assert "SPOT is 'maybe'" in mistake(site.launch("skypilot", SPOT="maybe"))
    assert "CLUSTER is not set" in mistake(site.launch("gke", "--xpk"))
    assert "MIN_SLICES does not go with --xpk" in mistake(site.launch("gke", "--xpk", CLUSTER="c", MIN_SLICES="2"))
    assert "MIN_SLICES is '5'; expected at most the 4 slices" in mistake(site.launch("gke", MIN_SLICES="5"))
    assert "MIN_NODES is '5'; expected at most NODES=4" in mistake(site.launch("slurm", MIN_NODES="5"))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_scripts_pass_shellcheck():
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([shellcheck, "--external-sources", "--severity=warning", *scripts], capture_output=True, text=True)
    assert len(scripts) >= 7 and done.returncode == 0, done.stdout


def extras():
    with mock.patch("setuptools.setup"):
        return set(runpy.run_path(str(ROOT / "setup.py"))["EXTRAS"])


def test_dockerfile(tmp_path):
    steps = [(step["instruction"], step["value"]) for step in DockerfileParser(str(ROOT / "launch" / "Dockerfile")).structure]
    steps = [step for step in steps if step[0] != "COMMENT"]
    names = [name for name, _ in steps]
    assert names[0] == "FROM" and names.count("ENTRYPOINT") == 1
    last = dict(steps)
    assert json.loads(last["ENTRYPOINT"]) == ["voxcpm2-jax"] and json.loads(last["CMD"]) == ["--help"]
    assert int(last["USER"]) > 0 and names.index("USER") < names.index("ENTRYPOINT")

    # The default of EXTRA, and the values that the launchers name, are extras of setup.py.
    named = {re.fullmatch("EXTRA=(.*)", last["ARG"])[1]}
    for path in (ROOT / "launch").iterdir():
        named |= set(re.findall(r"EXTRA=(\w+)", path.read_text())) if path.is_file() else set()
    assert named == {"tpu", "cuda"} and named <= extras()

    # The files copied before the installation are enough to install from, and all copied files exist.
    install = next(i for i, (name, value) in enumerate(steps) if name == "RUN" and "pip install" in value)
    assert '".[${EXTRA}]"' in steps[install][1]
    for i, (name, value) in enumerate(steps):
        if name != "COPY":
            continue
        *sources, target = value.split()
        for source in sources:
            assert (ROOT / source).exists()
            if i < install:
                (tmp_path / target).mkdir(exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / target)
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
