"""Predictions: those of the recipe's own evaluation, whatever stands beside a text; and what is refused."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from rich.cells import cell_len
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from recipes.bert_cls import Config
from recipes.bert_cls import main as train
from tests.parity.job import tiny_bert
from toolkit.cli import main
from toolkit.config import ModelConfig, OptimConfig, RunConfig, TextDataConfig, TrainConfig, to_yaml
from toolkit.data.tokenize import tokenize
from toolkit.errors import CheckpointError, ConfigError, DataError, ModelError, NumericsError, ToolkitError
from toolkit.predict import Classifier, Prediction, find_model, read_texts
from toolkit.predict.classifier import BATCHES_OF_A_WINDOW

LABELS = ("bad", "good", "时政")
MAX_LENGTH = 12
WORDS = [f"w{i}" for i in range(10, 90)]


def save_tokenizer(folder: Path) -> None:
    """Words as in `tiny_tokenizer`, with a special token at both ends and Chinese letters one by one."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: index for index, word in enumerate([*special, *"今天的电影很好看", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokens = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)


def save_model(folder: Path) -> None:
    model = tiny_bert()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embeddings" not in name:
                weight.mul_(10)  # or all texts would get nearly the same answer
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {label: index for index, label in enumerate(LABELS)}
    model.save_pretrained(folder)
    save_tokenizer(folder)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On busy cores, two threads over so small a model would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as the recipe leaves it, as far as predictions read it. Not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "001"
    save_model(folder / "model")
    (folder / "config.yaml").write_text(to_yaml(Config(data=TextDataConfig(max_length=MAX_LENGTH))), encoding="utf-8")
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run to be spoilt."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture(scope="module")
def classifier(run: Path) -> Classifier:
    return Classifier(find_model(run), device="cpu")


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 20 words, so that some are cut and most are padded."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(count)]


def difference(one: list[Prediction], other: list[Prediction]) -> float:
    assert [found.text for found in one] == [found.text for found in other]
    pairs = zip(one, other, strict=True)
    return max(abs(a.scores[label] - b.scores[label]) for a, b in pairs for label in LABELS)


# What is computed


def test_the_held_out_figures_are_those_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run of the recipe; then its test split through `Classifier`, from the files that the run left."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    tiny_bert().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    draw, sets = random.Random(1), {}
    for name, count in (("train", 160), ("test", 75)):
        codes = [draw.randrange(3) for _ in range(count)]
        texts = [" ".join(draw.choices(WORDS[20 * code : 20 * code + 35], k=draw.randint(1, 20))) for code in codes]
        sets[name] = list(zip(texts, codes, strict=True))
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            rows = [("text", "label"), *((text, LABELS[code]) for text, code in sets[name])]
            csv.writer(file).writerows(rows)
    data = TextDataConfig(
        name=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"), max_length=MAX_LENGTH, tokenize_processes=1
    )
    settings = Config(
        model=ModelConfig(name=str(tmp_path / "base")),
        data=data,
        train=TrainConfig(steps=30, global_batch=16),
        optim=OptimConfig(lr=3e-3),
        precision="fp32",
        run=RunConfig(dir=tmp_path / "run"),
    )
    train(settings)

    expected = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["test"]
    own = Classifier(find_model(tmp_path / "run"), device="cpu")
    found = own.predict([text for text, _ in sets["test"]], batch=7)
    confusion = [[0] * 3 for _ in LABELS]
    for (_, code), prediction in zip(sets["test"], found, strict=True):
        confusion[code][LABELS.index(prediction.label)] += 1
    true = torch.tensor([p.scores[LABELS[code]] for (_, code), p in zip(sets["test"], found, strict=True)])
    assert 0.4 < expected["accuracy"] < 1, "the task is too easy or too hard to tell anything"
    assert confusion == expected["confusion"]
    assert -true.double().log().mean().item() == pytest.approx(expected["loss"], rel=1e-5)


def test_each_text_is_cut_and_answered_as_training_would_alone(
    run: Path, classifier: Classifier, tmp_path: Path
) -> None:
    texts = [*some_texts(40), "今天的电影 很好看 w10", "w11\n\nw12\tw13", "x" * 500, "w14 " * 300, " w15 ", "e\u0301é"]
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    data = Dataset.from_dict({"text": texts})
    rows = tokenize(data, tokenizer, MAX_LENGTH, processes=1, scratch=tmp_path, title="texts")
    assert max(rows["whole"]) > MAX_LENGTH == max(rows["length"])
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row])).logits.softmax(-1)[0].tolist() for row in rows["input_ids"]]
    for prediction, row in zip(classifier.predict(texts, batch=16), expected, strict=True):
        assert [prediction.scores[label] for label in LABELS] == pytest.approx(row, abs=1e-5)


def test_an_answer_does_not_depend_on_the_texts_beside_it(classifier: Classifier) -> None:
    texts = some_texts(60)
    alone = [classifier.predict([text])[0] for text in texts]
    assert max(one.scores["bad"] for one in alone) - min(one.scores["bad"] for one in alone) > 0.1
    for batch in (3, 32, 60):
        assert difference(alone, classifier.predict(texts, batch=batch)) < 1e-5
    # Beside a text of full length, all others are padded: sorting must not be what makes the answers equal.
    beside_long = [classifier.predict([text, "w10 " * 40])[0] for text in texts]
    assert difference(alone, beside_long) < 1e-5
    assert classifier.predict(texts) == classifier.predict(texts), "not the same bits the second time"


def test_scores_are_sorted_probabilities(classifier: Classifier) -> None:
    for found in classifier.predict(some_texts(20)):
        scores = list(found.scores.values())
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1)
        assert (found.label, found.score) == found.top(1)[0]
        assert found.top(None) == list(found.scores.items())


def test_a_stream_keeps_the_order_and_holds_a_window_only(classifier: Classifier) -> None:
    texts, taken = some_texts(200), 0

    def source() -> Iterator[str]:
        nonlocal taken
        for text in texts:
            taken += 1
            yield text

    done: list[int] = []
    found: list[Prediction] = []
    for window in classifier.stream(source(), batch=4, on_batch=done.append):
        found += window
        assert taken == len(found), "texts were read ahead"
        assert len(window) <= 4 * BATCHES_OF_A_WINDOW
    assert [prediction.text for prediction in found] == texts
    assert sum(done) == 200
    assert max(done) == 4
    assert difference(found, classifier.predict(texts)) < 1e-5


def test_a_model_without_its_run_cuts_where_it_must_itself(run: Path, tmp_path: Path) -> None:
    assert find_model(run / "model").max_length == MAX_LENGTH  # the run is found above the model
    alone = shutil.copytree(run / "model", tmp_path / "moved")
    saved = find_model(alone)
    assert saved.max_length is None
    assert Classifier(saved).max_length == 32  # its positions
    assert Classifier(saved, max_length=5).max_length == 5
    with pytest.raises(ConfigError, match="3 to 32 tokens"):
        Classifier(saved, max_length=33)
    with pytest.raises(ConfigError, match="3 to 32 tokens"):
        Classifier(saved, max_length=2)


# Which folders are refused


def set_in(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | changes), encoding="utf-8")


def keep_no_model(run: Path) -> None:
    shutil.rmtree(run / "model")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    settings["checkpoint"]["save_model"] = False
    (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def fail(run: Path) -> None:
    shutil.rmtree(run / "model")
    (run / "report.json").write_text('{"status": "failed"}', encoding="utf-8")


def save_as_pickle(run: Path) -> None:
    weights = run / "model" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()


def forget_tokenizer(run: Path) -> None:
    for file in run.glob("model/tokenizer*"):
        file.unlink()


def forget_head(run: Path) -> None:
    weights = run / "model" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if "classifier" not in name}
    save_file(kept, weights, metadata={"format": "pt"})


def cut_weights(run: Path) -> None:
    with (run / "model" / "model.safetensors").open("r+b") as file:
        file.truncate(3000)


def forbid_padding(run: Path) -> None:
    set_in(run / "model" / "tokenizer_config.json", pad_token=None)


def give_labels(*labels: str) -> Callable[[Path], None]:
    return lambda run: set_in(run / "model" / "config.json", id2label=dict(enumerate(labels)), label2id={})


SPOILT: dict[str, tuple[Callable[[Path], object], type[ToolkitError], str]] = {
    "gone": (shutil.rmtree, CheckpointError, "is not there"),
    "a file": (lambda run: (shutil.rmtree(run), run.write_text("")), CheckpointError, "is a file, not a folder"),
    "no run": (lambda run: (run / "config.yaml").unlink(), CheckpointError, "no config.yaml.*no config.json"),
    "not kept": (keep_no_model, CheckpointError, "(?s)save_model: false.*--checkpoint.save_model True"),
    "unfinished": (lambda run: shutil.rmtree(run / "model"), CheckpointError, "no model: it has not finished"),
    "failed": (fail, CheckpointError, "no model: it failed"),
    "no YAML": (lambda run: (run / "config.yaml").write_text("a: ["), CheckpointError, "not valid YAML"),
    "length": (
        lambda run: (run / "config.yaml").write_text("data: {max_length: long}"),
        CheckpointError,
        "max_length: l",
    ),
    "no JSON": (lambda run: (run / "model/config.json").write_text("{"), ModelError, "config.json cannot be read"),
    "language model": (
        lambda run: set_in(run / "model/config.json", architectures=["BertForMaskedLM"]),
        ModelError,
        "is a BertForMaskedLM, which this command does not know",
    ),
    "nameless": (
        lambda run: set_in(run / "model/config.json", architectures=None),
        ModelError,
        "which this command does not know",
    ),
    "pickle": (save_as_pickle, ModelError, "no .safetensors file, only pytorch_model.bin"),
    "no weights": (lambda run: (run / "model/model.safetensors").unlink(), ModelError, "no .safetensors file"),
    "no tokenizer": (forget_tokenizer, ModelError, "no tokenizer"),
    "cut": (cut_weights, ModelError, "cannot be loaded"),
    "no head": (forget_head, ModelError, "lacks 2 of its weights .classifier.bias, classifier.weight"),
    "foreign code": (
        lambda run: set_in(run / "model/config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
        ModelError,
        "cannot be loaded",
    ),
    "other size": (lambda run: set_in(run / "model/config.json", hidden_size=64), ModelError, "cannot be loaded"),
    "no padding": (forbid_padding, ModelError, "no padding token"),
    "two alike": (give_labels("a", "b", "a"), ModelError, "no two alike"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), SPOILT.values(), ids=SPOILT)
def test_a_run_without_a_usable_model(
    copy: Path, spoil: Callable[[Path], object], error: type[ToolkitError], message: str
) -> None:
    spoil(copy)
    with pytest.raises(error, match=message) as caught:
        Classifier(find_model(copy))
    assert caught.value.remedy or "alike" in caught.value.message


def test_a_misspelt_run_and_a_folder_of_runs(run: Path) -> None:
    with pytest.raises(CheckpointError, match="Did you mean '001'"):
        find_model(run.parent / "0001")
    with pytest.raises(CheckpointError, match="Name one of the runs in it: 001"):
        find_model(run.parent)


def test_weights_that_are_not_finite(copy: Path) -> None:
    file = copy / "model" / "model.safetensors"
    weights = load_file(file)
    weights["classifier.weight"][:] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="not finite"):
        Classifier(find_model(copy)).predict(["w10"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(run: Path) -> None:
    with pytest.raises(ConfigError, match="--device cuda"):
        Classifier(find_model(run), device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same(run: Path, classifier: Classifier) -> None:
    texts = some_texts(60)
    found = Classifier(find_model(run), device="cuda").predict(texts)
    assert difference(classifier.predict(texts), found) < 1e-4


# Files of texts

FILES = {
    "a.txt": ('今天 w1\r\nsecond, "quoted"\n\ufeffthird\n \n\n', ["今天 w1", 'second, "quoted"', "\ufeffthird"]),
    "last.txt": ("\ufeffone\ntwo", ["one", "two"]),
    "a.csv": ('id,text\n1,"one, with\n""two"" lines"\n\n2,NA\n', ['one, with\n"two" lines', "NA"]),
    "a.tsv": ("\ufefftext\tid\r\nhe said, no\t1\r\n007\t2\r\n", ["he said, no", "007"]),
    "A.JSONL": ('{"text": "one\\ntwo", "id": 1}\n\n{"id": 2, "text": "今天"}', ["one\ntwo", "今天"]),
    "long.csv": ("text\n" + "w" * 200_000 + "\n", ["w" * 200_000]),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_read(tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert list(read_texts(tmp_path / name)) == expected


FAULTY = {
    "gap.txt": (b"one\n\ntwo\n", "gap.txt, line 2: the text is empty"),
    "latin.txt": ("one\ncaf\xe9\n".encode("latin-1"), "latin.txt, line 2: byte 0xe9 is not UTF-8"),
    "wide.csv": ("text\none\n".encode("utf-16"), "(?s)wide.csv, line 1: .*UTF-16"),
    "other.csv": (b"id,review\n1,good\n", "other.csv has no column 'text'; it has 'id', 'review'"),
    "near.csv": (b"id,Text\n1,good\n", "Did you mean 'Text'"),
    "empty.csv": (b"text,id\na,1\n,2\n", "empty.csv, line 3: the text is empty"),
    "few.csv": (b"text,id\na,1\nb\n", "few.csv, line 3: 1 fields, where the header names 2"),
    "quote.csv": (b'text,id\na,1\n"b,2\n', "quote.csv, line 3: a quote that is not closed"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "broken.jsonl, line 2: not JSON"),
    "list.jsonl": (b'["a"]\n', "list.jsonl, line 1: a list, not an object"),
    "number.jsonl": (b'{"text": 5}\n', "number.jsonl, line 1: 'text' is 5, not a text"),
    "null.jsonl": (b'{"text": null}\n', "null.jsonl, line 1: the text is empty"),
    "key.jsonl": (b'{"text": "a"}\n{"txt": "b"}\n', "key.jsonl, line 2 has no column 'text'; it has 'txt'"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', "half.jsonl, line 1: half of a character"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_files_that_are_refused(tmp_path: Path, name: str) -> None:
    content, message = FAULTY[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_texts(tmp_path / name))


def test_files_that_are_not_there_or_no_files(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"Did you mean 'texts\.csv'"):
        list(read_texts(tmp_path / "text.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="there is no file"):
        list(read_texts(tmp_path / "folder.csv"))


# The command


def predict(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["predict", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_json(run: Path, classifier: Classifier, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["w10 w11", "今天的电影很好看", "w12 \x1b[31m\n"]
    code, out, err = predict(capsys, run, texts[0], "--json", *texts[1:])  # an option may stand among the texts
    assert (code, err) == (0, "")
    assert "今天的电影很好看" in out
    lines = [json.loads(line) for line in out.splitlines()]
    for line, found in zip(lines, classifier.predict(texts), strict=True):
        assert list(line) == ["text", "label", "score", "scores"]
        assert (line["text"], line["label"]) == (found.text, found.label)
        assert line["scores"] == pytest.approx(found.scores, rel=1e-5)
        assert line["score"] == next(iter(line["scores"].values()))
    _, out, _ = predict(capsys, run, texts[0], "--json", "--top", 2)
    assert list(json.loads(out)["scores"]) == list(lines[0]["scores"])[:2]
    _, out, _ = predict(capsys, run, "--json", "w10", "--", "-w11", "--top")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["w10", "-w11", "--top"]


def test_table(run: Path, classifier: Classifier, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["w10 w11", "今天的电影很好看", "w12 \x1b[31m\n\tw13", "[red]w14", "电影" * 60]
    code, out, err = predict(capsys, run, *texts)
    assert (code, err) == (0, "")
    head, _, *lines = out.splitlines()
    column = head.index("label")
    assert "\x1b" not in out
    assert lines[2].startswith("w12 �[31m w13 ")
    assert lines[3].startswith("[red]w14 ")
    assert "…" in lines[4]
    for line, found in zip(lines, classifier.predict(texts), strict=True):
        text = line[: line.index(found.label)]
        assert cell_len(text) == column, "the labels do not stand one below the other"
        assert line.endswith(f" {found.score:.4f}")
        assert cell_len(line) <= 100
    _, out, _ = predict(capsys, run, "w10 w11", "--top", 3)
    first, *others = out.splitlines()[2:]
    (found,) = classifier.predict(["w10 w11"])
    assert [line.split()[-2:] for line in (first, *others)] == [[k, f"{v:.4f}"] for k, v in found.scores.items()]


def test_a_long_table_has_one_head(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = some_texts(100)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    code, out, _ = predict(capsys, run, "--file", tmp_path / "texts.txt", "--batch", 8)
    lines = out.splitlines()
    assert code == 0
    assert len(lines) == 102
    assert [line.split("  ")[0] for line in lines[2:]] == texts
    assert len({cell_len(line) for line in lines}) == 1


def test_output_to_files(run: Path, classifier: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [*some_texts(90), 'two\nlines, and "quotes"', "今天"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"review": text}) + "\n" for text in texts))
    words = [run, "--file", tmp_path / "in.jsonl", "--text", "review", "--batch", 8, "--output"]
    code, out, err = predict(capsys, *words, tmp_path / "out.csv", "--top", 2)
    assert (code, out) == (0, "")
    assert "92 texts classified" in err.replace("\n", " ")
    expected = classifier.predict(texts)
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["text", "label", "score", "label_2", "score_2"]
    for row, found in zip(rows, expected, strict=True):
        assert [row["text"], row["label"], row["label_2"]] == [found.text, *list(found.scores)[:2]]
        assert [float(row["score"]), float(row["score_2"])] == pytest.approx(list(found.scores.values())[:2], rel=1e-5)
    predict(capsys, *words, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == texts
    assert list(lines[-1]["scores"]) == list(expected[-1].scores)
    # What was written can be read again as texts.
    assert list(read_texts(tmp_path / "out.csv")) == list(read_texts(tmp_path / "out.jsonl")) == texts


def test_texts_are_brought_into_the_form_of_the_run(
    copy: Path, classifier: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(data=TextDataConfig(max_length=MAX_LENGTH, normalise=("html", "simplified")))
    (copy / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert main(["predict", str(copy), "<p>今天的電影很好看</p>", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (plain,) = classifier.predict(["今天的电影很好看"])
    assert found["text"].strip() == "今天的电影很好看"
    assert found["score"] == pytest.approx(plain.score, rel=1e-5)


def test_standard_input(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(content: bytes) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return predict(capsys, run, "-", "--json", "--batch", "1")

    code, out, _ = answer("今天\r\nw10\n".encode())
    assert code == 0
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["今天", "w10"]
    code, out, err = answer(b"w10\nw11\nw12\n\xff\n")
    assert code == 2
    assert json.loads(out.splitlines()[0])["text"] == "w10", "what came before the fault is lost"
    assert "standard input, line 4" in err
    code, _, err = answer(b"\n")
    assert code == 2
    assert "standard input has no text" in err


def test_notes_about_the_model(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "report.json").write_text('{"status": "interrupted"}', encoding="utf-8")
    code, out, err = predict(capsys, copy, "w10", "--json")
    assert (code, out.count("\n")) == (0, 1)
    assert "warning: the run ended early (interrupted)" in err
    alone = (copy / "model").rename(tmp_path / "alone")
    _, out, err = predict(capsys, alone, "w10 " * 30, "--json")
    assert "texts are cut to 32 tokens" in err
    _, cut, err = predict(capsys, alone, "w10 " * 30, "--json", "--max-length", MAX_LENGTH)
    assert err == ""
    assert json.loads(cut)["scores"] != json.loads(out)["scores"]


REFUSED: dict[str, tuple[list[str], str]] = {
    "no text": ([], "there is no text"),
    "empty text": (["w10", " \t"], "text 2: the text is empty"),
    "not UTF-8": (["w10\udcff"], "text 1: half of a character"),
    "both": (["w10", "--file", "texts.csv"], "both on the command line and in --file"),
    "both inputs": (["w10", "-"], "stands beside other texts"),
    "no column": (["--file", "texts.csv"], "has no column 'text'; it has 'id', 'review'"),
    "no rows": (["--file", "head.csv"], "head.csv has no text"),
    "no lines": (["--file", "nothing.txt"], "nothing.txt has no text"),
    "no file": (["--file", "nowhere.csv"], "there is no file nowhere.csv"),
    "type of file": (["--file", "texts.pdf"], "Give .txt, .csv, .tsv, .jsonl"),
    "type of output": (["w10", "--output", "out.xlsx"], "Name a .csv or a .jsonl file"),
    "no folder": (["w10", "--output", "nowhere/out.csv"], "there is no folder nowhere"),
    "over itself": (["--file", "texts.csv", "--text", "review", "--output", "./texts.csv"], "write over the texts"),
    "not writable": (["w10", "--output", "taken.csv"], "taken.csv cannot be written"),
    "two outputs": (["w10", "--json", "--output", "out.jsonl"], "--json prints and --output writes"),
    "idle column": (["w10", "--text", "review"], "--text review has no effect"),
    "too many labels": (["w10", "--top", "4"], "--top 4: the model has 3 labels"),
    "top": (["w10", "--top", "0"], "--top: '0' is not a whole number from 1 on"),
    "batch": (["w10", "--batch", "many"], "--batch: 'many' is not a whole number from 1 on"),
    "device": (["w10", "--device", "tpu"], "--device: invalid choice"),
    "length": (["w10", "--max-length", "99"], "--max-length 99: this model takes 3 to 32 tokens"),
    "unknown option": (["w10", "--jsn"], "unrecognized arguments: --jsn. Did you mean '--json'?"),
    "abbreviation": (["w10", "--js"], "unrecognized arguments: --js"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_mistakes(
    run: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("texts.csv", "id,review\n1,w10\n"), ("head.csv", "text\n"), ("nothing.txt", "")):
        Path(name).write_text(content)
    Path("taken.csv").mkdir()
    code, out, err = predict(capsys, run, *words)
    assert code == 2
    assert out == ""
    assert message in " ".join(line.strip("│╭╮╰╯─ ") for line in err.splitlines())
    assert "Traceback" not in err
    assert Path("texts.csv").read_text() == "id,review\n1,w10\n"
