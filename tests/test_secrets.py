"""No secret is written: refused in settings, by name and by shape, and blotted out in texts of other origin."""

import os
import stat
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpo_dist.artifacts.base import read_config
from dmpo_dist.cli import main
from dmpo_dist.cluster import privacy
from dmpo_dist.config import load_config
from dmpo_dist.errors import UserError
from dmpo_dist.secrets import BLOT, named_like_a_secret, redact

SECRET = "hunter2hunter2"
TEXTS = [
    f"http://user:{SECRET}@mlflow.example:5000/x",
    f"postgresql://u:p@{SECRET}@host/db",
    f"https://host/store?sig={SECRET}&x=1",
    f"Authorization: Bearer {SECRET}",
    f"export WANDB_API_KEY={SECRET}",
    f'export GITHUB_PAT="{SECRET}"',
    f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
]
TOKENS = ["hf_" + "a" * 34, "ghp_" + "A" * 36, "AKIA" + "A1" * 8, "sk-" + "a1" * 12, "xoxb-" + "1" * 20]
PLAIN = [
    "http://mlflow:5000", "sqlite:///runs/mlflow.db", "git@github.com:a/b.git", "runs/sk-learn-against-dmpo-2024",
    "Mission: Impossible", "s3://bucket/key=value/file", "NCCL_SOCKET_IFNAME=eth0", "export HF_TOKEN=$(cat ~/token)",
    "a" * 40,
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_secret_is_blotted_out_by_its_shape(text):
    assert SECRET not in redact(text)
    assert BLOT in redact(text)


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_are_known_by_their_beginnings(token):
    assert redact(f"x {token} y") == f"x {BLOT} y"


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_stay(text):
    assert redact(text) == text


@given(st.text())
def test_redacting_twice_is_redacting_once(text):
    assert redact(redact(text)) == redact(text)


def test_names_of_secrets():
    for name in ("HF_TOKEN", "WANDB_KEY", "GITHUB_PAT", "AWS_SECRET_ACCESS_KEY", "DB_PASS", "mysqlPwd", "API-KEY"):
        assert named_like_a_secret(name), name
    for name in ("PWD", "MAX_TOKENS", "TOKENIZERS_PARALLELISM", "PATH", "NCCL_DEBUG", "TOKEN_BUDGET", "KEYBOARD"):
        assert not named_like_a_secret(name), name


@pytest.mark.parametrize("name", ["WANDB_KEY", "GITHUB_PAT", "HF_TOKEN"])
def test_a_job_takes_no_secret_in_its_environment(name):
    with pytest.raises(UserError, match=f"{name} looks like a secret"):
        load_config([], [f"submit.env.{name}=x"])


@pytest.mark.parametrize("key", ["tracking.mlflow.tracking_uri", "cluster.storage_path", "submit.env.URL"])
def test_a_configuration_takes_no_password_and_the_error_does_not_repeat_it(key):
    with pytest.raises(UserError, match=f"{key}.*holds a password") as error:
        load_config([], [f"{key}=http://user:{SECRET}@host"])
    assert SECRET not in str(error.value)


def test_the_configuration_of_an_older_run_is_shown_without_its_password(tmp_path):
    (tmp_path / "config.yaml").write_text(f"tracking: {{mlflow: {{tracking_uri: 'http://u:{SECRET}@h'}}}}\n")
    assert read_config(tmp_path / "config.yaml") == {"tracking": {"mlflow": {"tracking_uri": f"http://{BLOT}@h"}}}


def test_no_message_of_the_command_line_holds_a_secret(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["dmpo", "data", "check", f"http://user:{SECRET}@host/data"])
    with pytest.raises(SystemExit):
        main()
    shown = "".join(capfd.readouterr())
    assert "host/data" in shown
    assert SECRET not in shown


def test_a_token_that_everybody_can_read_becomes_private(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / privacy.TOKEN_FILE
    privacy.protect_token()
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    token.write_text("x")
    os.chmod(token, 0o644)
    privacy.protect_token()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_the_log_of_a_run_holds_no_secret_and_stays_readable(tmp_path):
    """A secret between quotation marks, which JSON escapes, and a key without its end, which would take the rest."""
    from dmpo_dist.artifacts.log import NoteRecord, read_log
    from dmpo_dist.records.sinks import JsonLines

    texts = [*TEXTS, *(f'the server said "{text}", twice' for text in TEXTS), f"-----BEGIN PRIVATE KEY-----\n{SECRET}"]
    sink = JsonLines(tmp_path / "metrics.jsonl", append=False)
    for text in texts:
        sink.write(NoteRecord(kind="note", text=text))
    sink.close({}, True)
    assert SECRET not in (tmp_path / "metrics.jsonl").read_text()
    log = read_log(tmp_path / "metrics.jsonl")
    assert not log.damaged
    assert [record.text for record in log.records] == [redact(text) for text in texts]
