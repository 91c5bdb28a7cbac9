"""The ``serving`` section of the configuration: where ``dmpo serve`` listens, what it accepts, and how it scales."""

from ipaddress import ip_address
from pathlib import Path

from pydantic import Field, model_validator

from dmpo_dist.config.section import Section

TOKEN_VARIABLE = "DMPO_SERVE_TOKEN"
"""Environment variable with the token of ``dmpo serve``, which no configuration may hold."""


class ServingConfig(Section):
    """``dmpo serve``."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address needs a token, from token_file or DMPO_SERVE_TOKEN."""
    port: int = Field(8000, ge=0, lt=65536)
    """Port to listen on; 0 takes a free one and prints it."""
    token_file: Path | None = None
    """File with the token that clients send as "Authorization: Bearer TOKEN"; None takes DMPO_SERVE_TOKEN if set."""
    replicas: int = Field(1, ge=1)
    """Copies of the model, each a Ray actor with cluster.cpus_per_worker and cluster.gpus_per_worker."""
    most_replicas: int | None = Field(None, ge=1)
    """Let Ray Serve add copies up to this number while requests wait; None keeps the number of replicas."""
    requests_per_replica: float = Field(4.0, gt=0)
    """Requests under way on a copy above which Ray Serve adds another one."""
    token_budget: int | None = Field(None, ge=16)
    """Most tokens in a row that requests share; None is 512 on a CPU, where longer rows only delay others, and 8192 on
    a GPU."""
    cache_mib: int = Field(1024, ge=0)
    """Memory of each copy for the keys and values of prompts that have run; 0 runs each prompt again."""
    most_waiting: int = Field(256, ge=1)
    """Requests under way at once; one more is answered with status 503 and Retry-After."""
    timeout_seconds: float = Field(60.0, gt=0)
    """A request without an answer after this time is given up with status 503."""
    most_documents: int = Field(1000, ge=1)
    """Documents of a request to /v1/rerank."""
    most_history: int = Field(1000, ge=1)
    """Titles of a history."""
    most_characters: int = Field(2000, ge=1)
    """Characters of a title."""
    most_body_kib: int = Field(1024, ge=1)
    """Size of a request's body."""
    reload_seconds: float = Field(2.0, gt=0)
    """How often the catalogue's file is looked at for a new version."""
    show_users: bool | None = None
    """Let clients list the users of prepared data and their histories, as the page at / does; None does so on a
    loopback address alone."""

    @property
    def is_local(self) -> bool:
        """Whether nobody but this machine can connect."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="after")
    def _grows(self) -> "ServingConfig":
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(f"most_replicas={self.most_replicas} must be at least replicas={self.replicas}")
        return self
