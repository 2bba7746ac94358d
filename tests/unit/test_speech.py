"""Speech, part by part: reading recordings, what is blanked out, batches, transcripts and their error rates."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from tests.speech import save_speech_model, say
from toolkit.compute.cross_entropy import IGNORED
from toolkit.data.audio import RATE, read_audio
from toolkit.data.rows import Unfit
from toolkit.data.spec_augment import SpecAugment
from toolkit.data.speech import tokens_of
from toolkit.error_rates import error_counts, words_of
from toolkit.errors import ConfigError
from toolkit.predict.speech import cut
from toolkit.recognizers import load_processor, load_recognizer
from toolkit.tasks import SpeechRecognition
from toolkit.tasks.speech import SpeechBatch
from toolkit.transcription import rules_of, write_out
from toolkit.world import world

AUGMENT = SpecAugment(time_masks=2, time_share=0.2, mel_masks=1, mel_bands=4, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech")
    save_speech_model(path)
    return path


# Recordings.


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_recordings_come_at_one_rate(rate: int, channels: int, tmp_path: Path) -> None:
    say(["low", "mid"], tmp_path / "a.wav", rate=rate, channels=channels)
    heard = read_audio(tmp_path / "a.wav")
    assert heard.dtype == np.int16
    assert len(heard) == pytest.approx(0.4 * RATE, abs=2)
    for begin, tone in ((0, 300), (0.2, 900)):
        part = heard[int(begin * RATE) : int(begin * RATE) + 3200].astype(float)
        assert np.abs(np.fft.rfft(part)).argmax() * RATE / 3200 == pytest.approx(tone, abs=6)
        assert np.abs(part).max() == pytest.approx(0.5 * 32000, rel=0.1)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.flac", "PCM_16"), ("a.ogg", "VORBIS"), ("a.wav", "FLOAT"), ("b.wav", "ULAW")]
)
def test_other_kinds_of_files(name: str, kind: str, tmp_path: Path) -> None:
    say(["mid"], tmp_path / "pcm.wav")
    expected = read_audio(tmp_path / "pcm.wav")
    soundfile.write(tmp_path / name, expected / 32768, RATE, subtype=kind)
    heard = read_audio(tmp_path / name)
    assert np.corrcoef(heard[:3000], expected[:3000])[0, 1] > 0.99


def test_recordings_that_are_none(tmp_path: Path) -> None:
    say(["low"], tmp_path / "a.wav")
    content = (tmp_path / "a.wav").read_bytes()
    for name, found in {
        "cut.wav": content[:2000],
        "noise.wav": b"no recording at all",
        "empty.wav": b"",
        "header.wav": content[:44].replace(len(content[44:]).to_bytes(4, "little"), bytes(4)),
        "silent.wav": content[:44] + bytes(len(content) - 44),
    }.items():
        (tmp_path / name).write_bytes(found)
    say(["low"], tmp_path / "slow.wav", rate=4_000)
    say(["low"], tmp_path / "six.wav", channels=6)
    for name, said in {
        "missing.wav": "is not there",
        "cut.wav": "is cut off: 0.1 of 0.2 seconds",
        "noise.wav": "cannot be read",
        "empty.wav": "cannot be read",
        "header.wav": "is empty",
        "silent.wav": "is silent",
        "slow.wav": "4000 samples a second",
        "six.wav": "has 6 channels",
    }.items():
        with pytest.raises(Unfit, match=said):
            read_audio(tmp_path / name)


def test_long_recordings_are_cut_where_it_is_quiet() -> None:
    heard = np.full(5 * RATE, 1000, np.int16)
    heard[int(1.8 * RATE) : int(1.9 * RATE)] = 0
    pieces = cut(heard, 2 * RATE)
    assert np.array_equal(np.concatenate(pieces), heard)
    assert max(map(len, pieces)) <= 2 * RATE
    assert 1.8 * RATE <= len(pieces[0]) <= 1.9 * RATE
    assert [len(piece) for piece in cut(heard[: 2 * RATE], 2 * RATE)] == [2 * RATE]


# What is blanked out.


def blanked(epoch: int, sample: int, augment: SpecAugment = AUGMENT) -> torch.Tensor:
    features = torch.ones(16, 100)
    augment.apply(features, 60, epoch, sample)
    return features == 0


def test_masks_follow_from_seed_epoch_and_sample() -> None:
    assert torch.equal(blanked(1, 7), blanked(1, 7))
    others = [blanked(2, 7), blanked(1, 8), blanked(1, 7, SpecAugment(2, 0.2, 1, 4, seed=4))]
    assert not any(torch.equal(blanked(1, 7), other) for other in others)
    for sample in range(50):
        masked = blanked(0, sample)
        columns, bands = masked.all(0), masked.all(1)
        assert not columns[60:].any(), "there is nothing to blank out in padding"
        assert int(columns.sum()) <= 2 * 12
        assert int(bands.sum()) <= 4
        assert torch.equal(masked, columns | bands[:, None])


# Batches.


def rows_of(processor: Any, texts: list[str], training: bool) -> dict[str, list[Any]]:
    draw = np.random.default_rng(0)
    heard = [draw.integers(-9000, 9000, 4000 + 3000 * i).astype(np.int16).tobytes() for i in range(len(texts))]
    rows = {
        "audio": heard,
        "tokens": [tokens_of(text, processor.tokenizer) for text in texts],
        "text": texts,
        "id": list(range(len(texts))),
    }
    return rows | ({"epoch": [1] * len(texts)} if training else {})


def task_of(processor: Any, vocabulary: int = 259) -> SpeechRecognition:
    return SpeechRecognition(processor, vocabulary=vocabulary, positions=40, augment=AUGMENT)


def test_batches(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    task = task_of(processor)
    batch = task.collate(rows_of(processor, ["Low.", "Mid high."], training=False), empty=False)
    tokens = tokens_of("Low.", processor.tokenizer)
    assert tokens[:2] == list(processor.tokenizer.prefix_tokens)
    assert tokens[-1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode(tokens[2:-1]) == " Low."
    assert processor.tokenizer.decode(tokens_of("打电话", processor.tokenizer)[2:-1]) == "打电话"
    assert batch.inputs["input_features"].shape == (2, 16, 200)
    assert batch.inputs["decoder_input_ids"][0, : len(tokens)].tolist() == tokens
    # The prefix is given; text and end are learnt; padding is not.
    assert batch.labels[0].tolist() == [IGNORED, *tokens[2:], *[IGNORED] * 5]
    assert task.units(batch) == len("Low. Mid high.") + 1 + 2
    assert batch.texts == ["Low.", "Mid high."]
    filler = task.collate(rows_of(processor, ["Low."], training=False), empty=True)
    assert (task.units(filler), filler.ids, filler.texts, float(filler.weights.sum())) == (0, [], [], 0)


def test_augmentation_is_for_training_alone(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    task = task_of(processor)
    trained, tested = (
        task.collate(rows_of(processor, ["Low.", "Mid."], training), empty=False).inputs["input_features"]
        for training in (True, False)
    )
    plain = processor.feature_extractor(
        [np.frombuffer(b, np.int16) / np.float32(32768) for b in rows_of(processor, ["Low.", "Mid."], False)["audio"]],
        sampling_rate=RATE,
        return_tensors="pt",
    ).input_features
    assert torch.equal(tested, plain)
    changed = trained != tested
    assert changed.any()
    assert not trained[changed].any(), "what differs is blank"


def test_samples_that_are_unfit(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    task = task_of(processor)
    fit = {"audio": b"ab" * RATE, "tokens": [257, 258, 9, 256]}
    assert task.problem(fit) == ""
    assert "no sound" in task.problem(fit | {"audio": b""})
    assert "2.1 seconds, of which the model hears 2" in task.problem(fit | {"audio": b"ab" * int(2.1 * RATE)})
    assert "token id 300" in task.problem(fit | {"tokens": [257, 300]})
    assert "41 tokens" in task.problem(fit | {"tokens": [9] * 41})


# The model, and what it writes.


@pytest.fixture(scope="module")
def taught(folder: Path) -> tuple[Any, Any]:
    """A model, with a window of 1 s instead of 2, and its processor."""
    from toolkit.config import ModelConfig

    config = ModelConfig(name=str(folder))
    processor = load_processor(config, 1, None)
    return load_recognizer(config, processor, seed=0), processor


def test_a_shorter_window_has_the_first_positions(taught: tuple[Any, Any], folder: Path) -> None:
    model, processor = taught
    whole = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    assert (model.config.max_source_positions, processor.feature_extractor.nb_max_frames) == (50, 100)
    own, all_of_them = model.get_encoder().embed_positions.weight, whole.get_encoder().embed_positions.weight
    assert torch.equal(own, all_of_them[:50])
    assert not own.requires_grad


class Alone:
    """The strategy of one process, as far as it is asked here."""

    def __init__(self, model: Any) -> None:
        self.model, self.world = model.eval(), world()

    def forward(self, inputs: dict[str, Any]) -> Any:
        return self.model(**inputs)


def test_transcripts_are_those_of_transformers(taught: tuple[Any, Any]) -> None:
    model, processor = taught
    task = task_of(processor)
    batch: SpeechBatch = task.collate(rows_of(processor, ["Low.", "Mid high.", "High."], training=False), empty=False)
    features = batch.inputs["input_features"]
    model.eval()
    # Of a network that was not trained all scores are nearly alike: let them depend on what was heard and written.
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    with torch.no_grad():
        encoded = model(**batch.inputs).encoder_last_hidden_state
        expected = model.generate(features, do_sample=False, num_beams=1, max_length=40)
    written = write_out(Alone(model), encoded, rules_of(model, processor))  # type: ignore[arg-type]
    end = processor.tokenizer.eos_token_id
    for own, theirs in zip(written, expected.tolist(), strict=True):
        theirs = [token for token in theirs if token not in (end, *processor.tokenizer.prefix_tokens)]
        assert own == theirs
        assert own
    assert len({tuple(row) for row in written}) > 1
    assert not any(5 in row for row in written), "it may not be written"


def test_what_is_refused_of_a_model(folder: Path, tmp_path: Path) -> None:
    from toolkit.config import ModelConfig

    for config, seconds, language, said in (
        (ModelConfig(name=str(folder)), 3, None, "hears 2 seconds at a time"),
        (ModelConfig(name=str(folder)), 2, "zh", "no effect on a model that knows English alone"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_processor(config, seconds, language)


# Error rates.


def test_words() -> None:
    assert words_of("  Press 1, please -- the co-op!") == ["press", "1", "please", "the", "co", "op"]
    assert words_of("Don’t stop.") == ["dont", "stop"]
    assert words_of("Agent-log-off, ＡＢＣ № 5") == ["agent", "log", "off", "abc", "no", "5"]
    assert words_of("请按1号键，谢谢 Anna。") == ["请", "按", "1", "号", "键", "谢", "谢", "anna"]
    assert words_of("…") == []


def test_error_counts_by_hand() -> None:
    counts = error_counts(["Press one, please.", "打电话"], ["press on", "打个电话。"])
    assert counts == {"word_errors": 2 + 1, "words": 3 + 3, "character_errors": 8 + 1, "characters": 16 + 3}
    assert error_counts(["a b"], [""]) == {"word_errors": 2, "words": 2, "character_errors": 3, "characters": 3}
    assert error_counts([], []) == {"word_errors": 0, "words": 0, "character_errors": 0, "characters": 0}


def test_error_rates_are_those_of_jiwer_and_add_up() -> None:
    draw = random.Random(0)
    said = [" ".join(draw.choices(["one", "two", "three", "four", "ten"], k=draw.randint(1, 9))) for _ in range(40)]
    heard = [" ".join(word for word in text.split() if draw.random() < 0.8) or "ten" for text in said]
    counts = error_counts(said, heard)
    assert counts["word_errors"] / counts["words"] == pytest.approx(jiwer.wer(said, heard))
    assert counts["character_errors"] / counts["characters"] == pytest.approx(jiwer.cer(said, heard))
    assert counts["word_errors"] > 10
    halves = [error_counts(said[part], heard[part]) for part in (slice(0, 13), slice(13, None))]
    assert {name: sum(half[name] for half in halves) for name in counts} == counts
