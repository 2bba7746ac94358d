"""Pairs of texts: what is given and learnt, that no token sees what it must not, and what is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    NllbTokenizer,
    T5ForConditionalGeneration,
)

from tests.parity.job import tiny_tokenizer
from toolkit.compute import fuse_loss, remove_padding
from toolkit.config import DecodeConfig, EncoderDecoderConfig
from toolkit.encoder_decoders import (
    language_token,
    languages_of,
    load_encoder_decoder,
    start_token,
    tell_languages,
)
from toolkit.errors import ConfigError
from toolkit.generation import write_as
from toolkit.precision import Reduced
from toolkit.tasks import Answering, Seq2Seq
from toolkit.tasks.seq2seq import IGNORED

VOCABULARY = 100
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1},
    "init_std": 0.2,
}


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "initializer_factor": 3.0}
    return T5ForConditionalGeneration(AutoConfig.for_model("t5", vocab_size=VOCABULARY, **sizes, **ids))


MODELS = {
    "t5": t5,
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**SIZES, bos_token_id=2, scale_embedding=True)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SIZES, bos_token_id=2)),
    "marian": lambda: MarianMTModel(MarianConfig(**SIZES)),
    "m2m100": lambda: M2M100ForConditionalGeneration(M2M100Config(**SIZES)),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def rows() -> dict[str, list[Any]]:
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return [*torch.randint(3, VOCABULARY, (count - 1,), generator=generator).tolist(), 1]

    return {
        "input_ids": [some(5), some(9), some(2)],
        "labels": [some(7), some(3), some(4)],
        "given": ["a", "b", "c"],
        "wanted": ["d", "e", "f"],
        "id": [4, 5, 6],
    }


def task(kind: type[Seq2Seq] = Seq2Seq, **options: Any) -> Seq2Seq:
    return kind(tiny_tokenizer(), **({"vocabulary": VOCABULARY} | options))


def test_the_decoder_is_given_the_target_moved_by_one() -> None:
    batch = task(start=9).collate(rows(), empty=False)
    assert batch.inputs["input_ids"].shape == (3, 9)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [5, 9, 2]
    assert batch.inputs["decoder_input_ids"][:, 0].tolist() == [9, 9, 9]
    for row, labels in enumerate(rows()["labels"]):
        length = len(labels)
        assert batch.labels[row, :length].tolist() == labels
        assert batch.inputs["decoder_input_ids"][row, 1:length].tolist() == labels[:-1]
        assert set(batch.labels[row, length:].tolist()) <= {IGNORED}
    assert task().units(batch) == 14
    filler = task().collate(rows(), empty=True)
    assert task().units(filler) == 0
    assert filler.ids == []


@pytest.mark.parametrize("free", [False, True], ids=["padded", "padding-free"])
@pytest.mark.parametrize("name", MODELS)
def test_a_future_or_padded_token_changes_nothing(name: str, free: bool) -> None:
    model, batch = model_of(name), task().collate(rows(), empty=False)
    if free and (why := remove_padding(model)):
        assert name != "mbart", why  # what is made anew must be served
    with torch.no_grad():
        whole = model(**batch.inputs).logits
        ids, there = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        decoder, held = batch.inputs["decoder_input_ids"], batch.inputs["decoder_attention_mask"].bool()

        def outputs(**other: torch.Tensor) -> torch.Tensor:
            return model(**(batch.inputs | other)).logits  # type: ignore[no-any-return]

        # Padding, of either side.
        assert torch.equal(outputs(input_ids=ids.where(there, 17))[held], whole[held])
        assert torch.equal(outputs(decoder_input_ids=decoder.where(held, 17))[held], whole[held])
        # A future token of a target: what stands before it stays, what stands behind it does not.
        later = decoder.clone()
        later[0, 4] = 17
        changed = outputs(decoder_input_ids=later)
        assert torch.allclose(changed[0, :4], whole[0, :4], atol=1e-5)
        assert (changed[0, 4:7] - whole[0, 4:7]).abs().amax(-1).min() > 1e-3
        # A real token of a source changes all that is written for it, and nothing that is written for another.
        other = ids.clone()
        other[1, 3] = 17
        changed = outputs(input_ids=other)
        assert (changed[1, :3] - whole[1, :3]).abs().amax(-1).min() > 1e-3
        assert torch.allclose(changed[0][held[0]], whole[0][held[0]], atol=1e-5)
        # Each pair alone: sums in another order, of logits that go up to 20.
        rounded = 2e-5 * float(whole.abs().max())
        for row, (given, written) in enumerate(zip(rows()["input_ids"], rows()["labels"], strict=True)):
            alone = task().collate({name: [column[row]] for name, column in rows().items()}, empty=False)
            expected = whole[row, : len(written)]
            assert torch.allclose(model(**alone.inputs).logits[0], expected, atol=rounded), (row, given)


@pytest.mark.parametrize("name", MODELS)
def test_in_bf16(name: str) -> None:
    model, batch = model_of(name), task().collate(rows(), empty=False)
    with torch.no_grad():
        exact = model(**batch.inputs).logits
        reduced = Reduced(model, torch.bfloat16)
        found = reduced.forward(batch.inputs).logits
        with reduced.in_force():
            assert model.generate(**batch.prompts, max_new_tokens=4, num_beams=2).shape[0] == 3
    held = batch.inputs["decoder_attention_mask"].bool()
    assert (found - exact)[held].abs().median() < 0.1 * exact[held].abs().median()


def test_the_loss_is_the_models_own_and_smoothing_is_torchs() -> None:
    model, batch = model_of("t5"), task().collate(rows(), empty=False)
    outputs = model(**batch.inputs)
    inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    own = model(**inputs, labels=batch.labels).loss * 14
    assert task().loss(outputs, batch).item() == pytest.approx(own.item(), rel=1e-5)
    smoothed = task(label_smoothing=0.1)
    counted = batch.labels != IGNORED
    expected = F.cross_entropy(outputs.logits[counted], batch.labels[counted], reduction="sum", label_smoothing=0.1)
    assert smoothed.loss(outputs, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    counts = smoothed.measure(outputs, batch)  # which is not smoothed
    assert float(counts["loss"]) == pytest.approx(own.item(), rel=1e-5)
    assert smoothed.metrics(counts)["units"] == 14
    assert fuse_loss(model) == ""
    fused = task(fused=True)
    batch = fused.collate(rows(), empty=False)
    assert float(fused.loss(model(**batch.inputs), batch)) == pytest.approx(float(own), rel=1e-5)


def test_a_decoder_goes_on_with_what_it_is_given() -> None:
    answering = task(Answering)
    batch = answering.collate(rows(), empty=False)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()
    loss = float(answering.loss(model(**batch.inputs), batch))
    expected = 0.0
    for given, written in zip(rows()["input_ids"], rows()["labels"], strict=True):
        logits = model(torch.tensor([given + written])).logits[0, len(given) - 1 : -1]
        expected += float(F.cross_entropy(logits, torch.tensor(written), reduction="sum"))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert answering.units(batch) == 14
    for row, given in enumerate(rows()["input_ids"]):  # left of a prompt there is padding, and right of it nothing
        assert batch.prompts["input_ids"][row, -len(given) :].tolist() == given
        assert batch.prompts["attention_mask"][row].sum() == len(given)
        assert batch.prompts["attention_mask"][row, -1] == 1
    ids, there, learnt = answering.shown(batch)
    assert [ids[row][learnt[row]].tolist() for row in range(3)] == rows()["labels"]
    assert there.sum() == 16 + 14


def test_unfit_rows_are_told() -> None:
    limited = task(positions=8)
    row = {name: column[0] for name, column in rows().items()}
    assert limited.problem(row) == ""
    assert limited.problem(row | {"input_ids": [5] * 9}) == "of its source, it has 9 tokens, of which the model takes 8"
    assert limited.problem(row | {"labels": [5, 200]}) == "of its target, token id 200 is not among the model's 100"
    assert "has no tokens" in limited.problem(row | {"labels": []})
    assert "it has 12 tokens" in task(Answering, positions=11).problem(row)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["mbart", "t5", "bart"])
def test_what_is_written_depends_on_no_padding_and_no_neighbour(name: str, beams: int) -> None:
    model, batch = model_of(name), task().collate(rows(), empty=False)
    write_as(model, tiny_tokenizer(), DecodeConfig(beams=beams), tokens=10)
    padded = model.generate(**batch.prompts)
    assert padded.shape[1] <= 11
    assert remove_padding(model) == "" or name != "mbart"
    assert torch.equal(model.generate(**batch.prompts), padded)
    for row, given in enumerate(rows()["input_ids"]):
        alone = model.generate(input_ids=torch.tensor([given]))[0]
        assert alone.tolist() == padded[row, : len(alone)].tolist()


def test_a_length_penalty_needs_beams() -> None:
    with pytest.raises(ConfigError, match="no effect on one beam"):
        write_as(model_of("t5"), tiny_tokenizer(), DecodeConfig(length_penalty=2.0), tokens=10)


def nllb() -> Any:
    return NllbTokenizer(extra_special_tokens=["eng_Latn", "zho_Hans", "deu_Latn"])


def test_a_language_is_told_to_tokenizer_and_decoder() -> None:
    tokenizer = nllb()
    assert languages_of(tokenizer) == ["deu_Latn", "eng_Latn", "zho_Hans"]
    assert languages_of(tiny_tokenizer()) == []
    tell_languages(tokenizer, "eng_Latn", "deu_Latn")
    code = {name: tokenizer.convert_tokens_to_ids(name) for name in languages_of(tokenizer)}
    assert tokenizer("x")["input_ids"][0] == code["eng_Latn"]
    assert tokenizer(text_target="x")["input_ids"][0] == code["deu_Latn"]
    assert language_token(tokenizer) == code["deu_Latn"]
    model = model_of("m2m100")
    write_as(model, tokenizer, DecodeConfig(), tokens=5)
    written = model.generate(input_ids=torch.tensor([[code["eng_Latn"], 5, 2]]))
    assert written[0, :2].tolist() == [start_token(model), code["deu_Latn"]]


@pytest.mark.parametrize(
    ("make", "codes", "said"),
    [
        (nllb, ("eng_Latn", "zho_Hanz"), "the tokenizer knows no such language. Did you mean 'zho_Hans'"),
        (nllb, ("en", "zho_Hans"), "--data.source_lang en"),
        (nllb, (None, "zho_Hans"), "--data.source_lang does not say which"),
        (nllb, ("eng_Latn", None), "--data.target_lang does not say which"),
        (tiny_tokenizer, ("en", None), "this tokenizer has no tokens of languages"),
    ],
)
def test_unknown_languages_are_refused(make: Any, codes: tuple[str | None, str | None], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tell_languages(make(), *codes)
    assert said in str(caught.value)


def test_sizes_that_have_no_effect_are_refused() -> None:
    for config, said in (
        (EncoderDecoderConfig(hidden_size=30, heads=4), "no multiple"),
        (EncoderDecoderConfig(revision="main"), "--model.revision has no effect"),
        (EncoderDecoderConfig(name="somewhere", layers=5), "--model.layers has no effect"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_encoder_decoder(config, tiny_tokenizer(), 32, seed=0)
