"""A served model: real servers on this machine, asked over HTTP."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification

from tests.images import png
from tests.unit.test_predict import LABELS, MAX_LENGTH, save_model, save_tokenizer, some_texts
from toolkit.cli import main
from toolkit.data.images import ImageProcessor
from toolkit.errors import DataError
from toolkit.networks.image_mlp import ImageMlpConfig, ImageMlpForImageClassification
from toolkit.predict import Classifier, find_model
from toolkit.predict.kinds import Answer
from toolkit.serve.batching import Batcher, Busy

ROOT = Path(__file__).parents[2]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "news <b>"
    save_model(folder / "model")
    (folder / "config.yaml").write_text(f"data: {{max_length: {MAX_LENGTH}, normalise: [nfkc]}}\n", encoding="utf-8")
    return folder


@contextmanager
def served(run: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Its port, and its process, which has ended well afterwards."""
    command = [sys.executable, "-m", "toolkit.cli", "serve", str(run), "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    try:
        while not (found := re.search(r"http://[\d.]+:(\d+)\n", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield int(found[1]), process
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode in (0, 130), said + rest
    assert "Traceback" not in rest, rest


def ask(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = json.dumps(body).encode() if isinstance(body, dict | list) else body
    connection.request(method, path, sent, headers if headers is not None else JSON)
    response = connection.getresponse()
    return response.status, response.read().decode(), response.headers


@pytest.fixture(scope="module")
def port(run: Path) -> Iterator[int]:
    with served(run, "--max-bytes", "5000") as (port, _):
        yield port


def test_the_answers_are_those_of_predict(run: Path, port: int) -> None:
    """Also of many that ask at once, each of whom gets their own."""
    texts = some_texts(60)
    expected = {found.text: found for found in Classifier(find_model(run), device="cpu").predict(texts)}

    def one(at: int) -> None:
        status, said, _ = ask(port, "POST", "/predict", {"inputs": texts[3 * at : 3 * at + 3]})
        assert status == 200, said
        answers = json.loads(said)["answers"]
        assert [answer["text"] for answer in answers] == texts[3 * at : 3 * at + 3]
        for answer in answers:
            found = expected[answer["text"]]
            assert answer["label"] == found.label
            assert answer["scores"] == pytest.approx(found.scores, abs=1e-5)

    before = json.loads(ask(port, "GET", "/health")[1])
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(one, range(20)))
    after = json.loads(ask(port, "GET", "/health")[1])
    assert (after["status"], after["reads"]) == ("ready", "texts")
    assert after["requests"] - before["requests"] == 20
    assert after["inputs"] - before["inputs"] == 60
    assert after["batches"] - before["batches"] < 20, "none of them was answered together with another"


def test_the_form_of_the_run(port: int) -> None:
    status, said, _ = ask(port, "POST", "/predict", {"inputs": ["ｗ１２"]})
    assert (status, json.loads(said)["answers"][0]["text"]) == (200, "w12")


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        ({"inputs": []}, JSON, 400, "no list of inputs"),
        ({"texts": ["w11"]}, JSON, 400, "no list of inputs"),
        ({"inputs": ["w11", 5]}, JSON, 400, "input 2 is no text"),
        ({"inputs": ["w11", " "]}, JSON, 400, "input 2"),
        (b"{", JSON, 400, "is no JSON"),
        (b"\xff\xfe", JSON, 400, "is no JSON"),
        ({"inputs": ["w11"]}, {"Content-Type": "text/plain"}, 415, "must be application/json"),
        ({"inputs": ["w11 " * 2000]}, JSON, 413, "5,000 are taken"),
        ({"inputs": ["w11"]}, {**JSON, "Host": "elsewhere.example"}, 400, "Invalid host"),
    ],
)
def test_what_is_refused(body: Any, headers: dict[str, str], status: int, message: str, port: int) -> None:
    found, said, _ = ask(port, "POST", "/predict", body, headers)
    assert (found, message in said) == (status, True), said
    assert ask(port, "POST", "/predict", {"inputs": ["w11"]})[0] == 200, "and the next is answered"


def test_other_addresses(port: int) -> None:
    assert ask(port, "GET", "/nothing")[0] == 404
    assert ask(port, "GET", "/predict")[0] == 405
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/predict", iter([b'{"inputs": ["w11"]}']), JSON)  # in pieces, of no length
    assert connection.getresponse().status == 411


def test_the_page_is_whole_and_its_own(port: int) -> None:
    status, page, headers = ask(port, "GET", "/")
    assert status == 200
    assert "news &lt;b&gt;" in page
    assert "<b>" not in page
    assert "//" not in page, "nothing from elsewhere"
    assert headers["content-security-policy"].startswith("default-src 'self'")


def test_files_are_sent_along(tmp_path: Path) -> None:
    """And a path in a request is never opened."""
    config = ImageMlpConfig(hidden_sizes=[4], image_size=8, num_channels=1, id2label={0: "zero", 1: "one"})
    ImageMlpForImageClassification(config).save_pretrained(tmp_path / "run" / "model")
    ImageProcessor(size=8, channels=1, mean=(0.5,), std=(0.5,)).save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("data: {}\n")
    picture = png(Image.new("L", (8, 8), 100))

    def form(*files: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
        parts = [
            f'--edge\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
            + data
            + b"\r\n"
            for name, data in files
        ]
        return b"".join(parts) + b"--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}

    with served(tmp_path / "run") as (port, _):
        status, said, _ = ask(port, "POST", "/predict", *form(("a.png", picture), ("../../b.png", picture)))
        assert status == 200, said
        answers = json.loads(said)["answers"]
        assert [answer["file"] for answer in answers] == ["a.png", "b.png"]
        assert {answer["label"] for answer in answers} <= {"zero", "one"}
        status, said, _ = ask(port, "POST", "/predict", *form(("a.png", picture), ("b.png", b"no picture")))
        assert (status, json.loads(said)["error"].startswith("b.png cannot be answered")) == (400, True), said
        assert "/" not in json.loads(said)["error"]
        for body, headers in (({"inputs": ["/etc/passwd"]}, JSON), form()):
            assert ask(port, "POST", "/predict", body, headers)[0] in (400, 415)
        assert "FormData" in ask(port, "GET", "/")[1]


def test_pairs_are_rows(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "run" / "model")
    config = BertConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("data: {max_length: 12, text: q, text_pair: p}\n")
    with served(tmp_path / "run") as (port, _):
        status, said, _ = ask(port, "POST", "/predict", {"inputs": [{"q": "w11", "p": "w12"}]})
        assert (status, json.loads(said)["answers"][0]["q"]) == (200, "w11"), said
        status, said, _ = ask(port, "POST", "/predict", {"inputs": [{"q": "w11"}]})
        assert (status, "no text in a column 'p'" in json.loads(said)["error"]) == (400, True), said


class _Slow:
    """A model that takes its time, and refuses some."""

    def __init__(self) -> None:
        self.calls: list[Sequence[Any]] = []
        self.gate = threading.Event()

    def stream(self, inputs: Iterable[Any], *, batch: int) -> Iterator[list[Answer]]:
        inputs = list(inputs)
        self.calls.append(inputs)
        self.gate.wait(10)
        if "bad" in inputs:
            raise DataError("input 1 is bad")
        if "defect" in inputs:
            raise ValueError("a defect")
        yield [Answer(one, {"text": one}) for one in inputs]


def test_requests_are_answered_together_and_fail_alone() -> None:
    model = _Slow()
    batcher = Batcher(model, batch=4, wait=0.2, room=5)
    first = batcher.submit(["a"] * 4)  # which the model has to do with
    while not model.calls:
        time.sleep(0.01)
    waiting = [batcher.submit([word]) for word in ("b", "bad", "c")]
    more = batcher.submit(["d", "e"])
    third = batcher.submit(["f"])
    with pytest.raises(Busy):
        batcher.submit(["g"])
    model.gate.set()
    assert len(first.result(10)) == 4
    assert [future.result(10)[0].shown for future in (waiting[0], waiting[2])] == ["b", "c"]
    with pytest.raises(DataError, match="input 1 is bad"):
        waiting[1].result(10)
    assert [answer.shown for answer in more.result(10)] == ["d", "e"]
    assert third.result(10)[0].shown == "f"
    assert model.calls[1] == ["b", "bad", "c", "d", "e"]
    assert model.calls[2:7] == [["b"], ["bad"], ["c"], ["d", "e"], ["f"]]
    with pytest.raises(ValueError, match="a defect"):
        batcher.submit(["defect"]).result(10)
    last = batcher.submit(["h"])
    batcher.close()
    assert last.result(0)[0].shown == "h", "what waits at the end is answered"
    assert batcher.counts["inputs"] == 4 + 1 + 1 + 2 + 1 + 1


def test_mistakes_are_told_before_the_model_is_loaded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, message in (
            (["--port", str(port)], f"--port {port}: Address already in use"),
            (["--tokens", "5"], "--tokens has no effect on a classifier"),
            (["--port", "70000"], "--port"),
            (["--wait", "x"], "--wait"),
        ):
            assert main(["serve", str(run), *options]) == 2
            assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert main(["serve", str(run / "none")]) == 2
    assert main(["serve", str(run), "--port", "0", "--top", str(len(LABELS) + 1)]) == 2
