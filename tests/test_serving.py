"""The interface over real sockets: scores of `dmpo rank` whoever asks beside, bad input, catalogues that change."""

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pandas as pd
import pytest

from dmpo_dist.config import RunConfig
from dmpo_dist.data.requests import RankingRequest, read_catalogue
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.ranking import Ranker
from dmpo_dist.modeling.ranking_model import RankingModel

pytest.importorskip("fastapi_offline", reason="extra [serve]")

from dmpo_dist.serving.app import make_app
from dmpo_dist.serving.backend import LocalBackend
from dmpo_dist.serving.listen import address_of, make_server, open_socket, read_token
from dmpo_dist.serving.order import Served
from dmpo_dist.serving.service import RankingService

TOKEN = "0123456789abcdef-the-token"


@contextmanager
def serving(world, catalogue=None, token=None, **settings):
    """A server on a free port: its address, and the service behind it."""
    sections = {"model": {"max_length": 256}, "serving": {"port": 0, "reload_seconds": 0.05}}
    for key, value in settings.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    config = RunConfig.model_validate(sections)
    service = RankingService(Served(str(world.model), config, catalogue or world.folder / "data"))
    with open_socket(config.serving) as listening:
        server = make_server(make_app(LocalBackend(service), config.serving, token))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield address_of(listening), service
        finally:
            server.should_exit = True
            thread.join()
            service.close()


@pytest.fixture(scope="module")
def server(world):
    with serving(world) as (address, _):
        yield address


def post(address, path, **body):
    return httpx.post(f"{address}{path}", json=body, timeout=60)


def requests_of(world, count):
    """Histories of all lengths and candidates, some of them new titles, some twice."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        titles = rng.permutation(world.titles)
        yield titles[: rng.integers(1, 6)].tolist(), [*titles[6 : rng.integers(8, 20)], "A new one", titles[6]]


def test_many_clients_at_once_get_the_scores_of_the_model_alone(world, server):
    model = RankingModel.load(str(world.model), RunConfig().model.model_copy(update={"max_length": 256}))
    asked = list(requests_of(world, 24))

    async def all_at_once():
        async with httpx.AsyncClient(base_url=server, timeout=60) as client:
            rerank = [client.post("/v1/rerank", json={"history": h, "documents": d}) for h, d in asked]
            other = [client.post("/v1/recommend", json={"history": h, "k": 3}) for h, _ in asked[:4]]
            return await asyncio.gather(*rerank, *other)

    for (history, documents), answer in zip(asked, asyncio.run(all_at_once()), strict=False):
        expected = model.score(history, documents)
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
        scores = {result["index"]: result["relevance_score"] for result in results}
        np.testing.assert_allclose([scores[i] for i in range(len(documents))], expected, atol=1e-5)
        assert [r["relevance_score"] for r in results] == sorted(scores.values(), reverse=True)
        assert [r["document"]["text"] for r in results] == [documents[r["index"]] for r in results]
    shown = httpx.get(f"{server}/metrics").text
    assert 'dmpo_requests_total{endpoint="rerank",status="200"} 24.0' in shown
    [shared] = [line for line in shown.splitlines() if line.startswith("dmpo_engine_shared_rows_total")]
    assert float(shared.split()[-1]) > 0


@pytest.mark.parametrize(
    "ranking",
    [
        {"length_normalize": True, "prior_weight": 0.5},
        {"popularity_weight": 0.3},
        {"reference": "base", "prior_weight": 0.25, "exclude_history": False},
    ],
    ids=["prior", "popularity", "reference"],
)
def test_recommendations_are_those_of_dmpo_rank(world, ranking):
    class Adapter:
        model, folder = world.adapter if "reference" in ranking else world.model, world.folder

    catalogue = read_catalogue(world.folder / "data")
    settings = {f"ranking__{name}": value for name, value in ranking.items()}
    with serving(Adapter, **settings) as (address, service):
        ranker = Ranker(str(Adapter.model), service._scorer._config, catalogue, 5)
        for history, _ in requests_of(world, 4):
            expected = ranker(RankingRequest("you", tuple(history), None))
            results = post(address, "/v1/recommend", history=history, k=5).json()["results"]
            assert [result["title"] for result in results] == expected.titles
            np.testing.assert_allclose([result["score"] for result in results], expected.scores, atol=1e-5)
            items = dict(zip(catalogue.titles, catalogue.ids, strict=True))
            assert [result["item"] for result in results] == [items[title] for title in expected.titles]


def test_ids_and_names_of_other_interfaces_and_what_is_excluded(world, server):
    catalogue, [(history, documents)] = read_catalogue(world.folder / "data"), requests_of(world, 1)
    ids = dict(zip(catalogue.titles, catalogue.ids, strict=True))
    plain = post(server, "/v1/rerank", history=history, documents=documents).json()["results"]
    by_id = [ids.get(title, title) for title in documents]
    texts = [{"text": title} for title in by_id]
    query = "\n".join(ids[title] for title in history)
    cohere = post(server, "/v2/rerank", model="rerank-v3", query=query, documents=texts, top_n=3, max_tokens_per_doc=9)
    assert [r["index"] for r in cohere.json()["results"]] == [r["index"] for r in plain[:3]]
    escaped = ["".join(f"&#{ord(letter)};" for letter in title) for title in documents]
    typed = post(server, "/v1/rerank", history=history, documents=escaped).json()["results"]
    assert [(r["index"], r["relevance_score"]) for r in typed] == [(r["index"], r["relevance_score"]) for r in plain]
    assert typed[0]["document"]["text"] == escaped[typed[0]["index"]], "as it was sent"
    best = post(server, "/v1/recommend", history=history, k=40).json()["results"]
    left_out = [best[0]["title"], best[2]["item"]]
    after = post(server, "/v1/recommend", history=history, k=1000, exclude=[*left_out, "Hraet (1995)"]).json()
    assert [r["title"] for r in after["results"]] == [r["title"] for i, r in enumerate(best) if i not in (0, 2)]
    assert after["not_in_catalogue"] == ["Hraet (1995)"]
    nothing = post(server, "/v1/recommend", history=history, exclude=world.titles)
    assert (nothing.status_code, "nothing of the catalogue is left" in nothing.text) == (422, True)


def test_explanations_are_leave_one_out(world, server):
    model = RankingModel.load(str(world.model), RunConfig().model.model_copy(update={"max_length": 256}))
    history, documents = world.titles[:4], world.titles[10:13]
    found = post(server, "/v1/explain", history=history, documents=documents).json()
    assert [item["title"] for item in found["history"]] == history

    def margins(titles):
        scores = model.score(titles, documents)
        return np.array([scores[i] - np.delete(scores, i).mean() for i in range(3)])

    np.testing.assert_allclose(found["margins"], margins(history), atol=1e-5)
    for i, item in enumerate(found["history"]):
        expected = margins(history) - margins(history[:i] + history[i + 1 :])
        np.testing.assert_allclose(item["contributions"], expected, atol=2e-5)

    alone = post(server, "/v1/explain", history=history[:1], documents=documents).json()
    (item,) = alone["history"]
    np.testing.assert_allclose(item["contributions"], margins(history[:1]) - margins([]), atol=2e-5)


def test_how_much_of_a_history_was_cut_off_is_said(world, server):
    history, long = world.titles[:8] * 5, "word " * 30
    seen = [
        post(server, path, history=history, **body).json()["cut_off"]
        for path, body in (("/v1/rerank", {"documents": ["a"]}), ("/v1/rerank", {"documents": ["a", long]}),
                           ("/v1/recommend", {"k": 1}))
    ]  # fmt: skip
    assert 0 < seen[0] < seen[1] < 40
    assert seen[2] > 0
    assert post(server, "/v1/rerank", history=history[:1], documents=["a"]).json()["cut_off"] == 0


BAD = [
    ("/v1/rerank", {"history": ["?"], "documents": ["a"]}, 422, "neither a title nor an item id"),
    ("/v1/rerank", {"history": [], "documents": ["a"]}, 422, "the history is empty"),
    ("/v1/rerank", {"query": " \n ", "documents": ["a"]}, 422, "the history is empty"),
    ("/v1/rerank", {"documents": ["a"]}, 422, "history or as query"),
    ("/v1/rerank", {"history": ["{0}"], "documents": []}, 422, "documents"),
    ("/v1/rerank", {"history": ["{0}"], "documents": ["a", 7]}, 422, "documents.1"),
    ("/v1/rerank", {"history": ["{0}"], "documents": ["a", " "]}, 422, "documents.1"),
    ("/v1/rerank", {"history": ["{0}"], "documents": ["a"] * 10_000}, 422, "10000 are given, more than 1000"),
    ("/v1/rerank", {"history": ["{0}"], "documents": ["a" * 100_000]}, 422, "100000 characters"),
    ("/v1/rerank", {"history": ["{0}"], "documents": ["a" * 1_100_000]}, 413, "serving.most_body_kib"),
    ("/v1/rerank", {"history": ["{0}"], "documents": ["word " * 390]}, 422, "model.max_length=256"),
    ("/v1/rerank", {"history": ["{0}"], "documents": ["a</s>"]}, 422, "special token"),
    ("/v1/recommend", {"history": ["{0}"], "k": 0}, 422, "k: "),
    ("/v1/explain", {"history": ["{0}"], "documents": ["a"]}, 422, "documents"),
    ("/v1/rerank", b"{ no", 422, "the body is not JSON"),
    ("/v1/rerank", b"[1]", 422, "must be a JSON object"),
    ("/v1/rerank", b"", 422, "must be a JSON object"),
    ("/v1/rerank", b'{"history": ["\\ud800"], "documents": ["a"]}', 422, ""),
    ("/v1/rerank", b'{"query": "Heat \\ud83d", "documents": ["a"], "keep_unknown": true}', 422, "query: Input"),
    ("/v1/nothing", {}, 404, "Not Found"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), BAD, ids=range(len(BAD)))
def test_a_mistake_gets_one_message_and_no_traceback(world, server, path, body, status, words):
    content = body if isinstance(body, bytes) else json.dumps(body).replace("{0}", world.titles[0]).encode()
    answer = httpx.post(server + path, content=content, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == status, answer.text[:500]
    message = answer.json()["error"]["message"]
    assert words in message
    assert len(message) < 400
    assert "Traceback" not in answer.text
    history, documents = world.titles[:2], world.titles[3:5]
    assert post(server, "/v1/rerank", history=history, documents=documents).status_code == 200


def test_who_may_ask(world, monkeypatch, tmp_path):
    with serving(world, token=TOKEN) as (address, _):
        body = {"history": world.titles[:1], "documents": world.titles[1:3]}
        assert post(address, "/v1/rerank", **body).status_code == 401
        for sent, status in (("wrong", 401), (TOKEN + "x", 401), (TOKEN, 200)):
            headers = {"Authorization": f"Bearer {sent}"}
            assert httpx.post(f"{address}/v1/rerank", json=body, headers=headers).status_code == status
            assert httpx.get(f"{address}/metrics", headers=headers).status_code == status
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        assert TOKEN not in httpx.get(f"{address}/openapi.json").text
    everywhere = RunConfig.model_validate({"serving": {"host": "0.0.0.0"}}).serving
    monkeypatch.delenv("DMPO_SERVE_TOKEN", raising=False)
    with pytest.raises(UserError, match="lets other machines connect"):
        read_token(everywhere)
    monkeypatch.setenv("DMPO_SERVE_TOKEN", "short")
    with pytest.raises(UserError, match="at least 16"):
        read_token(everywhere)
    monkeypatch.setenv("DMPO_SERVE_TOKEN", TOKEN)
    assert read_token(everywhere) == TOKEN


def test_a_page_elsewhere_cannot_ask_in_a_visitors_name(world, server):
    host = {"Host": "rebound.example"}
    assert httpx.get(f"{server}/v1/users", headers=host).status_code == 400
    body = json.dumps({"history": world.titles[:1], "documents": world.titles[1:3]})
    plain = httpx.post(f"{server}/v1/rerank", content=body, headers={"Content-Type": "text/plain"})
    assert plain.status_code == 422  # a form or a script of another site may send nothing else unasked
    assert "access-control-allow-origin" not in plain.headers


def test_a_catalogue_that_changes_and_one_that_is_broken(world, tmp_path):
    file, titles = tmp_path / "items.csv", world.titles

    def write(text):
        file.with_suffix(".new").write_text(text, encoding="utf-8")
        file.with_suffix(".new").replace(file)

    def health(address, until):
        deadline = time.monotonic() + 30
        while not until(state := httpx.get(f"{address}/health").json()):
            assert time.monotonic() < deadline, state
            time.sleep(0.02)
        return state

    write(pd.DataFrame({"title": titles[:10]}).to_csv(index=False))
    with serving(world, file) as (address, _):
        before = post(address, "/v1/recommend", history=titles[:2], k=20).json()
        assert {r["title"] for r in before["results"]} == set(titles[2:10])
        write(pd.DataFrame({"title": [*titles[:10], "Brand New"]}).to_csv(index=False))
        health(address, lambda state: state["catalogue"]["titles"] == 11)
        after = post(address, "/v1/recommend", history=[*titles[:2], "Brand New"], k=20).json()
        assert after["catalogue"] != before["catalogue"]
        for broken in ("title\n" + "same\n" * 2, "", "name\nA\n"):
            write(broken)
            state = health(address, lambda state: state["catalogue_problem"])
            assert str(file) in state["catalogue_problem"] or "items.csv" in state["catalogue_problem"]
            assert state["catalogue"]["titles"] == 11
            again = post(address, "/v1/recommend", history=[*titles[:2], "Brand New"], k=20).json()
            for now, then in zip(again["results"], after["results"], strict=True):
                assert now == then | {"score": pytest.approx(then["score"], abs=1e-5)}  # its prompt is kept, here
            assert "dmpo_catalogue_broken" in httpx.get(f"{address}/metrics").text
            write(pd.DataFrame({"title": [*titles[:10], "Brand New"]}).to_csv(index=False))
            health(address, lambda state: state["catalogue_problem"] is None)


def test_prompts_show_the_fields_of_the_catalogue_in_use(world, tmp_path):
    """A new file that was refused changed them, under the version of the old one."""
    file = tmp_path / "items.csv"

    def write(**columns):
        table = pd.DataFrame({"title": world.titles[:8], **columns})
        table.to_csv(file.with_suffix(".new"), index=False)
        file.with_suffix(".new").replace(file)

    write(genre="w1", popularity=3)
    settings = {"template__item": "{title} ({genre})\n", "ranking__popularity_weight": 0.5}
    with serving(world, file, **settings) as (address, service):

        def scores():
            found = post(address, "/v1/recommend", history=world.titles[:2], k=8).json()
            return found["catalogue"], {one["title"]: one["score"] for one in found["results"]}

        version, before = scores()
        for columns, problem in (
            ({"genre": "w2"}, "needs --catalogue with a column popularity"),
            ({"genre": "</s>", "popularity": 3}, "contains the special token '</s>'"),
        ):
            write(**columns)
            wait_until(lambda problem=problem: problem in (service._catalogue.problem or ""))
            assert scores() == (version, pytest.approx(before, abs=1e-5))
        write(genre="w2", popularity=3)
        wait_until(lambda: service._catalogue.problem is None)
        changed, after = scores()
        assert changed != version
        assert after != pytest.approx(before, abs=1e-5)


def test_a_client_that_hangs_up_and_one_too_many(world):
    body = json.dumps({"history": world.titles[:3], "documents": world.titles[3:23]}).encode()
    head = (
        f"POST /v1/rerank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    with serving(world, serving__most_waiting=3) as (address, service):
        host, port = address.removeprefix("http://").split(":")
        begun, free, running = threading.Event(), threading.Event(), service.engine._models[0].score_row

        def slow(row):
            begun.set()
            free.wait(60)
            return running(row)

        service.engine._models[0].score_row = slow
        clients = []
        for _ in range(3):
            clients.append(socket.create_connection((host, int(port))))
            clients[-1].sendall(f"{head}\r\n\r\n".encode() + body)
            assert begun.wait(60), "the first is in a row of its own before the others come"
        wait_until(lambda: service.engine.waiting == 3)
        refused = post(address, "/v1/rerank", **json.loads(body))
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        for client in clients[1:]:
            client.close()
        wait_until(lambda: 'status="499"} 2.0' in httpx.get(f"{address}/metrics").text)
        free.set()
        assert clients[0].recv(15) == b"HTTP/1.1 200 OK"
        clients[0].close()
        wait_until(lambda: service.engine.waiting == 0)
        assert service.engine.counts.groups == 1, "those that left were dropped"
        assert post(address, "/v1/rerank", **json.loads(body)).status_code == 200


def wait_until(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_the_server_lacks_is_said(world, tmp_path):
    taken = socket.create_server(("127.0.0.1", 0))
    config = RunConfig.model_validate({"serving": {"port": taken.getsockname()[1]}}).serving
    with taken, pytest.raises(UserError, match="cannot listen there .*choose another port"):
        open_socket(config)
    with pytest.raises(UserError, match="no such file"):
        RankingService(Served(str(world.model), RunConfig(), tmp_path / "none.csv"))
