"""`dmpo export --push-to-hub` by Hugging Face's own client, against a stand-in for the hub on this machine."""

import base64
import hashlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dmpo_dist.cli import main
from dmpo_dist.commands.push import check_hub, push
from dmpo_dist.config import TemplateConfig
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, write_stamp

TOKEN = "hf_" + "a" * 34


class Hub(BaseHTTPRequestHandler):
    """Git LFS for weights and a commit for the rest, as the hub's HTTP interface has them."""

    def do_GET(self):
        if "/resolve/" in self.path:
            self.do_HEAD()
            self.wfile.write(self.server.files.get(self.path, b""))
        else:
            self.answer({"name": "me", "type": "user", "auth": {}})

    def do_HEAD(self):
        content = self.server.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(content or b"")))
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server, path = self.server, self.path
        if path.endswith("/repos/create"):
            server.created.append(json.loads(body))
            self.answer({"url": f"{server.address}/me/ranker"})
        elif "/preupload/" in path:
            files = [entry["path"] for entry in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            answers = [
                {"path": f, "uploadMode": mode[f.endswith(".safetensors")], "shouldIgnore": False} for f in files
            ]
            self.answer({"files": answers})
        elif path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            to = [{**o, "actions": {"upload": {"href": f"{server.address}/put/{o['oid']}"}}} for o in objects]
            self.answer({"transfer": "basic", "objects": to})
        elif "/commit/" in path:
            server.commit = [json.loads(line) for line in body.decode().splitlines()]
            self.answer({"commitUrl": f"{server.address}/me/ranker/commit/1", "commitOid": "1"})
        else:
            wrong = [{"message": text} for text in server.wrong_header]
            self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[self.path.rpartition("/")[2]] = content
        self.answer({})

    def answer(self, content, status=200):
        known = self.path.startswith("/put/") or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        text = json.dumps(content if known else {"error": "who is that?"}).encode()
        self.send_response(status if known else 401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.created, server.large, server.commit, server.files, server.wrong_header = [], {}, [], {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def dmpo(hub, monkeypatch, capsys):
    """The command line in this process, its client of the hub turned to the stand-in."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)

    def run(*words, token=TOKEN, offline=False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(sys, "argv", ["dmpo", "export", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return run


def test_what_arrives_is_what_was_exported(world, tmp_path, hub, dmpo):
    model = shutil.copytree(world.model, tmp_path / "model")
    write_stamp(model, TemplateConfig(), stage="sft")
    out = tmp_path / "out"
    code, shown, errors = dmpo(model, out, "--dtype=float32", "--push-to-hub=me/ranker")
    assert code == 0, errors
    assert f"pushed to {hub.address}/me/ranker" in shown
    [asked] = hub.created
    assert (asked["name"], asked["organization"], asked["visibility"]) == ("ranker", "me", "private")
    arrived = {}
    for line in hub.commit:
        if line["key"] == "file":
            arrived[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        elif line["key"] == "lfsFile":
            content = hub.large[line["value"]["oid"]]
            assert hashlib.sha256(content).hexdigest() == line["value"]["oid"]
            arrived[line["value"]["path"]] = content
    assert arrived == {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert {"README.md", "model.safetensors", "tokenizer.json", "dmpo.json"} <= arrived.keys()

    for token, offline, words in (("hf_wrong", False, "401"), (TOKEN, True, "HF_HUB_OFFLINE is set")):
        code, _, errors = dmpo(model, tmp_path / "other", "--push-to-hub=me/ranker", token=token, offline=offline)
        assert code == 2
        [line] = errors.splitlines()
        assert line.startswith("error: --push-to-hub me/ranker: ")
        assert words in line
        assert "hf_" not in line
    assert not (tmp_path / "other").exists(), "refused before anything was exported"


def test_a_model_card_that_the_hub_does_not_take_is_one_message(world, tmp_path, hub, dmpo):
    model = shutil.copytree(world.model, tmp_path / "model")
    write_stamp(model, TemplateConfig(), stage="sft")
    hub.wrong_header = ['"license" must be one of [apache-2.0, mit]']
    code, _, errors = dmpo(model, tmp_path / "out", "--dtype=float32", "--push-to-hub=me/ranker")
    assert code == 2
    assert "out is written, but --push-to-hub me/ranker: the hub refused it" in errors
    assert 'README.md. - "license" must be one of' in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", ["ranker", "me/film--ranker", "me/ranker.", "me/ranker-", "me/a..b", "me/ranker.git",
                                  "me/" + "x" * 97, "me/a/b", "me/a b", ""])  # fmt: skip
def test_a_name_that_the_hub_would_not_take_is_refused_at_the_start(name):
    with pytest.raises(UserError, match="^--push-to-hub .*: write USER/NAME or ORGANISATION/NAME"):
        check_hub(name)


def test_what_is_refused(world, tmp_path, monkeypatch):
    write_stamp(tmp_path, TemplateConfig(), stage="train")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(world.model)}))
    with pytest.raises(UserError, match="is written, but not pushed: .* which others do not have; export with --merge"):
        push(tmp_path, "me/ranker", public=False)


def test_a_model_on_the_hub_keeps_the_template_it_was_trained_with(world, tmp_path, hub, dmpo, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    model = shutil.copytree(world.model, tmp_path / "model")
    write_stamp(model, TemplateConfig(preamble="Films, in order:\n"), stage="sft", max_length=200)
    assert dmpo(model, tmp_path / "out", "--dtype=float32")[0] == 0
    hub.files["/me/of-films/resolve/main/dmpo.json"] = (tmp_path / "out" / "dmpo.json").read_bytes()
    stamp = find_model("me/of-films").stamp
    assert (stamp.template.preamble, stamp.max_length) == ("Films, in order:\n", 200)
    assert find_model("me/of-others").stamp.template is None, "a model that is not ours"
