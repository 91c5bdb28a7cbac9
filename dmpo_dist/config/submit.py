"""The ``submit`` section of the configuration: what a cluster must give and be told."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dmpo_dist.config.section import Section
from dmpo_dist.secrets import named_like_a_secret

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/@+,=-]*$")]
"""A name that is safe in a script or manifest without quotes."""
LONGEST_NAME = 47
"""Characters that KubeRay leaves a job's name."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=LONGEST_NAME)]
"""A Kubernetes name."""
Line = Annotated[str, Field(pattern=r"^[^\n\r]*$")]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(Mi|Gi|Ti)$")]


def _slurm_seconds(time: str) -> int:
    """Seconds of a limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not days:
        parts = [0, *parts] if len(parts) < 3 else parts
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds


class SlurmConfig(Section):
    """``dmpo submit --to slurm``."""

    launcher: Literal["ray", "torchrun"] = "ray"
    """ray starts a Ray cluster over the nodes; torchrun starts the ranks without Ray (and replaces no dead worker)."""
    partition: Word | None = None
    """Partition; None is the site's default."""
    account: Word | None = None
    """Account the time is charged to."""
    qos: Word | None = None
    """Quality of service."""
    time: str = Field("24:00:00", pattern=r"^(\d+-)?\d+(:\d+){0,2}$")
    """Time limit, as in sbatch --time: 90 (minutes), 12:00:00 or 1-12:00:00."""
    exclusive: bool = True
    """Take whole nodes, with all of their memory."""
    requeue: bool = True
    """Go back to the queue when preempted and when the time limit is near, and on from the latest checkpoint."""
    grace_seconds: int = Field(120, ge=10)
    """How long before the time limit the run is stopped and requeued."""
    options: list[Line] = Field(default_factory=list)
    """Further #SBATCH lines, such as --constraint=a100."""
    setup: list[Line] = Field(default_factory=list)
    """Shell lines that make dmpo available on the nodes, such as "source /shared/venv/bin/activate"."""

    @field_validator("options")
    @classmethod
    def _are_options(cls, value: list[str]) -> list[str]:
        for option in value:
            if not option.startswith("-"):
                raise ValueError(f"each option starts with a dash, as in --constraint=a100; {option!r} does not")
        return value

    @field_validator("time", mode="before")
    @classmethod
    def _minutes_are_a_text_too(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @model_validator(mode="after")
    def _comes_to_train(self) -> "SlurmConfig":
        if self.requeue and 0 < _slurm_seconds(self.time) <= self.grace_seconds:  # 0 is no limit
            raise ValueError(
                f"time={self.time} is not longer than grace_seconds={self.grace_seconds}, by which the run is stopped "
                "before its end to go back to the queue, so it would never train; ask for more time, lower "
                "submit.slurm.grace_seconds, or set submit.slurm.requeue=false"
            )
        return self


class RayJobsConfig(Section):
    """``dmpo submit --to ray``: a running cluster's Jobs API."""

    address: str | None = Field(None, pattern=r"^https?://[^\s]+$")
    """The head's dashboard, such as http://head:8265; None takes RAY_API_SERVER_ADDRESS."""
    token_file: Path | None = None
    """File with the cluster's token; None leaves it to Ray (RAY_AUTH_TOKEN or ~/.ray/auth_token)."""
    working_dir: Path | None = None
    """Folder whose copy the driver and the workers run in; None uploads the run's configuration alone."""
    excludes: list[str] = Field(
        default_factory=lambda: [".*", "__pycache__", "runs", "build", "dist", "*.egg-info", "*.safetensors", "*.arrow"]
    )
    """Names and patterns left out of the upload, at any depth."""
    max_upload_mib: float = Field(100.0, gt=0)
    """Refuse a larger working directory."""
    check_versions: bool = True
    """Refuse a cluster whose Ray is of another version than the submitter's."""


class KubernetesConfig(Section):
    """``dmpo submit --to kubernetes``: a RayJob of the KubeRay operator."""

    namespace: Name = "default"
    """Namespace that the job is made in."""
    context: Word | None = None
    """kubectl context; None is the current one."""
    image: Word | None = None
    """Image with dmpo_dist and Ray (docker/Dockerfile); required."""
    image_pull_secret: Name | None = None
    """Name of the secret that pulls the image."""
    volume_claim: Name | None = None
    """Name of a ReadWriteMany claim for data and checkpoints; required."""
    mount_path: str = Field("/checkpoints", pattern=r"^/[A-Za-z0-9_./-]+$")
    """Where the claim is mounted; output_dir must lie below."""
    secret: Name | None = None
    """Name of a secret whose keys become environment variables (HF_TOKEN, AWS_SECRET_ACCESS_KEY, ...)."""
    gpu_resource: Word = "nvidia.com/gpu"
    """Name of the resource that stands for a GPU."""
    memory_per_node: Quantity = "64Gi"
    """Memory of each worker pod, shared memory included."""
    shared_memory: Quantity = "16Gi"
    """Size of /dev/shm: Ray's object store and NCCL inside a node."""
    head_cpus: int = Field(4, ge=1)
    """CPUs of the head node."""
    head_memory: Quantity = "16Gi"
    """CPUs and memory of the head pod, which runs the driver and no rank."""
    run_as_user: int = Field(1000, ge=1)
    """User and group of the containers; the image's user."""
    node_selector: dict[Word, Word] = Field(default_factory=dict)
    """Labels of the nodes that workers may run on."""
    service_account: Name = "default"
    """Service account that the pods run as."""
    retries: int = Field(2, ge=0)
    """How often a failed job starts again on a new cluster, from the latest checkpoint."""
    deadline_seconds: int | None = Field(None, ge=60)
    """The job is stopped after this time."""
    keep_seconds: int = Field(600, ge=0)
    """How long the pods stay after the end, for a look at their logs."""
    autoscaling: bool = False
    """Nodes are added on demand: do not compare the request with the nodes there are."""


class SubmitConfig(Section):
    """``dmpo submit``: the resources to ask for, and settings of each kind of cluster."""

    folder: Path | None = None
    """Folder for what is rendered; None is output_dir/submit, with --render-only ./submit."""
    name: Name | None = None
    """Name of the job; None makes it from output_dir."""
    nodes: int = Field(1, ge=1)
    """Nodes (Kubernetes: worker pods); a Ray cluster that is there already has its own."""
    cpus_per_node: int = Field(8, ge=1)
    """CPUs asked for on each node."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs asked for on each node."""
    env: dict[str, Line] = Field(default_factory=dict)
    """Environment of all processes, such as NCCL_SOCKET_IFNAME. It is written to files, so it must hold no secrets."""
    ready_seconds: int = Field(600, ge=1)
    """How long the driver waits for the nodes before it says what is missing."""
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    ray: RayJobsConfig = Field(default_factory=RayJobsConfig)
    kubernetes: KubernetesConfig = Field(default_factory=KubernetesConfig)

    @field_validator("env")
    @classmethod
    def _plain_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} cannot be the name of an environment variable")
            if named_like_a_secret(name):
                raise ValueError(
                    f"{name} looks like a secret and would be written into a file; on Slurm export it before dmpo "
                    "submit, on Kubernetes name its secret in submit.kubernetes.secret, on Ray set it where the nodes "
                    "start"
                )
        return value
