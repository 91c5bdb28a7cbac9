"""Downloads against a local server that knows ranges, breaks connections and has checksums."""

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dmpo_dist.cli import main
from dmpo_dist.data.sources.download import AMAZON, MOVIELENS, download, find_download
from dmpo_dist.errors import UserError


class Server(ThreadingHTTPServer):
    """``files`` by path; each request in ``breaks`` ends after that many bytes; ``asked`` logs (path, Range)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.breaks: list[int] = []
        self.asked: list[tuple[str, str | None]] = []
        self.ranges = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append((self.path, asked))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        same = self.headers.get("If-Range") in (None, tag)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges and same else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        is_data = not self.path.endswith(".md5")
        end = start + self.server.breaks.pop(0) if is_data and self.server.breaks else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def archive(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as out:
        out.writestr(f"{name}/ratings.csv", "userId,movieId,rating,timestamp\n1,2,3,4\n" * 500)
        out.writestr(f"{name}/movies.csv", "movieId,title,genres\n2,Two,\n")
    return content.getvalue()


def serve(server: Server, name: str) -> bytes:
    content = archive(name)
    server.files = {
        f"/{name}.zip": content,
        f"/{name}.zip.md5": f"MD5 ({name}.zip) = {hashlib.md5(content).hexdigest()}\n".encode(),
    }
    return content


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_continued(server: Server, tmp_path: Path, ranges: bool) -> None:
    content = serve(server, "ml-1m")
    server.breaks, server.ranges = [100, 50], ranges
    said: list[str] = []
    download(find_download("ml-1m", None, server.address), tmp_path, accept_terms=True, echo=said.append)
    assert (tmp_path / "ml-1m.zip").read_bytes() == content
    assert (tmp_path / "ml-1m" / "movies.csv").read_text().startswith("movieId")
    assert "agrees with the published MD5" in said[1]
    asked = [how for path, how in server.asked if path == "/ml-1m.zip"]
    assert asked == [None, "bytes=100-", "bytes=150-" if ranges else "bytes=50-"]
    download(find_download("ml-1m", None, server.address), tmp_path, accept_terms=True, echo=said.append)
    assert len(server.asked) == 4, "a finished file is not fetched again"


def test_the_command_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    content = serve(server, "ml-100k")
    wanted = find_download("ml-100k", None, server.address)
    server.breaks = [20] * 5
    with pytest.raises(UserError, match=r"ml-100k\.zip: .*run the command again, it goes on where it stopped"):
        download(wanted, tmp_path, accept_terms=True, echo=lambda line: None)
    assert (tmp_path / "ml-100k.zip.part").stat().st_size == 100
    (tmp_path / "ml-100k.zip.part").write_bytes(content)  # all there, killed before the rename
    download(wanted, tmp_path, accept_terms=True, echo=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ml-100k", "ml-100k.zip"]


def test_a_file_that_changed_meanwhile_is_fetched_whole(server: Server, tmp_path: Path) -> None:
    """Where its publisher gives no checksum, only its version tells halves of two files from one."""
    wanted = find_download("amazon-2023", "Video_Games", server.address)
    paths = [address.removeprefix(server.address) for address in wanted.files.values()]
    server.files = dict.fromkeys(paths, b"old" * 100)
    server.breaks = [20] * 5
    with pytest.raises(UserError, match="goes on where it stopped"):
        download(wanted, tmp_path, accept_terms=True, echo=lambda line: None)
    server.files = dict.fromkeys(paths, b"new" * 100)
    server.breaks = []
    download(wanted, tmp_path, accept_terms=True, echo=lambda line: None)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new" * 100] * 2


def test_a_wrong_file_is_refused(server: Server, tmp_path: Path) -> None:
    serve(server, "ml-20m")
    server.files["/ml-20m.zip"] += b"!"
    with pytest.raises(UserError, match=r"has MD5 \w+, published is \w+; removed"):
        download(find_download("ml-20m", None, server.address), tmp_path, accept_terms=True, echo=lambda line: None)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"there is no such file; write --category as its publisher does"):
        download(find_download("ml-25m", None, server.address), tmp_path, accept_terms=True, echo=lambda line: None)


def test_terms_come_first(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files = {f"/{path.format('Video_Games')}": b"{}" for path in AMAZON["amazon-2023"]}
    command = ["dmpo", "data", "download", "amazon-2023", f"{tmp_path}/games", "--mirror", server.address]
    for more, status, message in [
        ([], 2, "needs --category"),
        (["--category", "Video_Games"], 2, "pass --accept-terms"),
        (["--category", "Video_Games", "--accept-terms"], 0, ""),
    ]:
        assert not server.asked
        monkeypatch.setattr("sys.argv", [*command, *more])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == status
        said = capsys.readouterr()
        assert message in said.err
        assert ("published for research" in said.out) == (len(more) > 0)
    assert sorted(path.name for path in (tmp_path / "games").iterdir()) == [
        "Video_Games.jsonl.gz",
        "meta_Video_Games.jsonl.gz",
    ]


def test_official_addresses() -> None:
    for name in MOVIELENS:
        assert find_download(name, None, None).files == {
            f"{name}.zip": f"https://files.grouplens.org/datasets/movielens/{name}.zip"
        }
    assert list(find_download("amazon-2018", "Movies_and_TV", None).files) == [
        "Movies_and_TV.json.gz",
        "meta_Movies_and_TV.json.gz",
    ]
    with pytest.raises(UserError, match=r"ml-2m: unknown dataset; known are ml-100k"):
        find_download("ml-2m", None, None)
