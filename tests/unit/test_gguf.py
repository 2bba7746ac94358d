"""A GGUF file is the model that it was made from, as transformers reads it, or there is no file."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.chats import CHATML
from tests.recipes.launching import ROOT, environment
from toolkit.adapters import Adapter
from toolkit.cli import main
from toolkit.config import AdapterConfig
from toolkit.errors import ModelError
from toolkit.gguf import architectures, vocabulary, writing

TEXTS = (
    "It's 12345 o'clock:  they'LL say “naïve” twice.\n\n\tAnd then?  ",
    "新华社北京一月一日电：2024年，我国经济稳步增长！",
    "<|im_start|>user\n天气怎么样？<|im_end|>",
)
CORPUS = ["They'll say it's twelve o'clock, and then it's late.", "新华社北京电：我国经济稳步增长，天气很好。"] * 20
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 96, "initializer_range": 0.1}
"""Weights so large that the answers depend on every part."""

LLAMA = LlamaConfig(**GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
CONFIGS = {
    "llama": LLAMA,
    "llama, tied, biased": LlamaConfig(**GROUPED, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama 3": LlamaConfig(
        **GROUPED,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED, head_dim=32),
}
SPLITS = {
    "llama": "smollm",
    "llama, tied, biased": "smollm",
    "llama 3": "llama-bpe",
    "gpt2": "gpt-2",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
}


def tokenizer_of(split: str, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes and some words, split as the tokenizers of that name do."""
    steps = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }
    for name, pattern in (("qwen2", vocabulary._QWEN2), ("llama-bpe", vocabulary._LLAMA3)):
        steps[name] = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    raw = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(steps[split])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    if split == "qwen2":
        raw.normalizer = normalizers.NFC()
    if split == "llama-bpe":
        raw.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template=template, additional_special_tokens=[*SPECIAL], **names
    )


def save(folder: Path, config: Any = LLAMA, tokenizer: Any = None) -> Path:
    """A model whose embedding has some rows more than its tokenizer has tokens, as transformers saves it."""
    tokenizer = tokenizer or tokenizer_of("smollm")
    config = type(config).from_dict(config.to_dict())
    config.vocab_size = len(tokenizer) + 5
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 2, 0
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in model.named_parameters():  # norms of ones and biases of zeros would prove nothing
        if tensor.dim() == 1:
            torch.nn.init.normal_(tensor, mean=1.0 if "norm" in name or "ln_" in name else 0.0, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """Of the Llama's folder, to change."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["gguf", *(str(word) for word in words)])
    said = capsys.readouterr()
    return code, " ".join((said.out + said.err).replace("│", " ").split())


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    answers: list[torch.Tensor] = [model(torch.tensor([ids(tokenizer, text)])).logits for text in TEXTS]
    return torch.cat(answers, dim=1)


def read(path: Path, config: Any = None) -> Any:
    """As anyone would with transformers; `config` where it does not read all of it from the file."""
    more = {} if config is None else {"config": config}
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **more).eval()


def field(path: Path, name: str) -> Any:
    found = gguf.GGUFReader(path).get_field(name)
    return None if found is None else found.contents()


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_same_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_of(SPLITS[name])
    folder = save(tmp_path / "model", CONFIGS[name], tokenizer)
    target = tmp_path / "out" / "model.gguf"
    target.parent.mkdir()
    code, said = command(capsys, folder, target, "--dtype", "f32")
    assert code == 0, said
    assert "its logits differ by at most 0 (" in said
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    # What the file states of these, transformers leaves aside.
    unread = model.config if name not in ("llama", "qwen2") else None
    assert torch.equal(logits(read(target, unread), tokenizer), logits(model, tokenizer))
    again = AutoTokenizer.from_pretrained(target.parent, gguf_file=target.name)
    for text in TEXTS:
        assert ids(again, text) == ids(tokenizer, text)
        assert again.decode(ids(again, text)) == text
    assert again.chat_template == CHATML
    kind = str(field(target, "general.architecture"))
    assert kind == model.config.model_type
    assert field(target, "tokenizer.ggml.pre") == SPLITS[name]
    if unread is not None:
        assert field(target, f"{kind}.context_length") == 128
    if name == "qwen3":
        assert field(target, f"{kind}.attention.key_length") == field(target, f"{kind}.attention.value_length") == 32
    if name == "gpt2":
        assert field(target, f"{kind}.feed_forward_length") == 4 * 64


def test_slower_frequencies_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers does not read them: they are what its own network is built with."""
    folder = save(tmp_path / "model", CONFIGS["llama 3"], tokenizer_of("llama-bpe"))
    code, said = command(capsys, folder, tmp_path / "model.gguf", "--dtype", "q8_0")
    assert code == 0, said
    written = next(tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors if "rope" in tensor.name)
    assert written.name == "rope_freqs.weight"
    by = torch.from_numpy(written.data.copy())
    plain = 10000.0 ** -(torch.arange(8) / 8)
    own = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    assert torch.allclose(plain / by, own)
    assert by[0] == pytest.approx(1)
    assert by[-1] == pytest.approx(4)


@pytest.mark.parametrize(
    ("scaling", "stated"),
    [
        ({"rope_type": "linear"}, {"type": "linear", "factor": 4.0, "original_context_length": None}),
        ({"rope_type": "yarn"}, {"type": "yarn", "factor": 4.0, "original_context_length": 128}),
        (
            {"rope_type": "yarn", "original_max_position_embeddings": 32},
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
        ),
    ],
)
def test_scaling_is_stated(
    scaling: dict[str, Any], stated: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {"rope_theta": 10000.0, "factor": 4.0, **scaling}
    folder = save(tmp_path / "model", Qwen2Config(**GROUPED, rope_parameters=rope), tokenizer_of("qwen2"))
    target = tmp_path / "model.gguf"
    code, said = command(capsys, folder, target)
    assert code == 0, said
    assert {name: field(target, f"qwen2.rope.scaling.{name}") for name in stated} == stated


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 5e-2)])
def test_rounded_weights(
    dtype: str, bound: float, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.gguf"
    words = [] if dtype == "f16" else ["--dtype", dtype]  # which is the default
    code, said = command(capsys, llama, target, *words)
    assert code == 0, said
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(target).tensors}
    assert types["blk.0.attn_norm.weight"] == "f32"
    assert {types[name] for name in ("token_embd.weight", "output.weight", "blk.1.attn_q.weight")} == {dtype}
    assert field(target, "general.file_type") == gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    meant = logits(AutoModelForCausalLM.from_pretrained(llama), tokenizer)
    difference = float((logits(read(target), tokenizer) - meant).abs().max() / meant.abs().max())
    assert 0 < difference < bound


def test_rows_that_make_no_blocks_keep_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "model", GPT2Config(n_embd=48, n_layer=1, n_head=4, n_positions=64))
    code, said = command(capsys, folder, tmp_path / "model.gguf", "--dtype", "q8_0")
    assert code == 0, said
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.attn_qkv.weight"] == "F16"  # 48 columns; its down-projection has 192
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["position_embd.weight"] == "F32"


def test_special_tokens(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model.gguf"
    assert command(capsys, llama, target, "--name", "Ours")[0] == 0
    size = len(AutoTokenizer.from_pretrained(llama))
    stated = {
        "general.name": "Ours",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,  # the template writes all there is to be
        "tokenizer.chat_template": CHATML,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 5000.0,
        "llama.vocab_size": size + 5,
    }
    assert {name: field(target, name) for name in stated} == stated
    types = field(target, "tokenizer.ggml.token_type")
    assert types[:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]
    assert types[size:] == [TokenType.UNUSED] * 5


@pytest.mark.parametrize(
    ("split", "template", "ends", "begins", "end_of_turn"),
    [
        ("smollm", None, "<|endoftext|>", True, None),  # texts are trained on with a token before them
        ("llama-bpe", CHATML, "<|im_end|>", True, None),  # as the tokenizer itself does it
        ("smollm", CHATML, "<|endoftext|>", False, 2),  # an answer's end, which the template tells
    ],
)
def test_where_texts_begin_and_answers_end(
    split: str, template: str | None, ends: str, begins: bool, end_of_turn: int | None
) -> None:
    tokenizer = tokenizer_of(split, template)
    tokenizer.eos_token = ends
    found = vocabulary.vocabulary_of(tokenizer, len(tokenizer))
    assert found.begins is begins
    assert found.special.get("eot") == end_of_turn
    tokenizer.bos_token = None
    assert vocabulary.vocabulary_of(tokenizer, len(tokenizer)).special["bos"] == tokenizer.eos_token_id


# What breaks a file


def unturned(patch: pytest.MonkeyPatch) -> None:
    plain = dataclasses.replace(architectures.ARCHITECTURES["llama"], turned=False)
    patch.setitem(architectures.ARCHITECTURES, "llama", plain)


def no_rope_base(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda *_: None)


def no_merges(patch: pytest.MonkeyPatch) -> None:
    kept = gguf.GGUFWriter.add_token_merges
    patch.setattr(gguf.GGUFWriter, "add_token_merges", lambda writer, merges: kept(writer, merges[:20]))


def no_query(patch: pytest.MonkeyPatch) -> None:
    kept = writing.pieces
    patch.setattr(writing, "pieces", lambda model: (piece for piece in kept(model) if "attn_q" not in piece.name))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (unturned, "answers otherwise: its logits differ by up to"),
        (no_rope_base, "answers otherwise: its logits differ by up to"),
        (no_merges, "the file makes the tokens"),
        (no_query, "the file lacks weights: model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_a_wrong_file_is_found_and_not_kept(
    break_it: Callable[[pytest.MonkeyPatch], None],
    said: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "model.gguf"
    target.write_text("what was there")
    break_it(monkeypatch)
    code, told = command(capsys, llama, target, "--dtype", "f32", "--overwrite")
    assert code == 2
    assert said in told
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert target.read_text() == "what was there"


def test_weights_beyond_16_bits(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(copy)
    code, said = command(capsys, copy, tmp_path / "model.gguf")
    assert code == 2
    assert "written in f16, the model answers otherwise" in said
    assert "Take a wider --dtype: bf16 holds larger numbers" in said
    assert command(capsys, copy, tmp_path / "model.gguf", "--dtype", "bf16")[0] == 0


def test_ctrl_c_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize, seen = gguf.quantize, []

    def interrupted(*arguments: Any) -> Any:
        seen.append([path.name for path in tmp_path.glob("*/*.gguf")])
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return quantize(*arguments)

    monkeypatch.setattr(gguf, "quantize", interrupted)
    assert command(capsys, llama, tmp_path / "model.gguf")[0] == 130
    assert seen == [["model.gguf"]] * 3  # a part of it was there, aside
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_a_kill_leaves_no_half_file(llama: Path, tmp_path: Path) -> None:
    """What it leaves aside, the next command removes."""
    target = tmp_path / "model.gguf"
    words = [sys.executable, "-m", "toolkit.cli", "gguf", str(llama), str(target)]
    process = subprocess.Popen(words, cwd=ROOT, env=environment())
    while not (parts := [*tmp_path.glob(".writing*/*.gguf")]) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert parts
    assert not target.exists()
    assert subprocess.run(words, cwd=ROOT, env=environment()).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


# What is refused


def change(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_act": "gelu"}, "this llama has hidden_act = gelu, which readers of GGUF files would not heed"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "this llama has rotary scaling of type dynamic",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16}},
            "this llama has beta_fast = 16 of YaRN",
        ),
        (
            {"model_type": "opt"},
            "a model of type opt cannot be written as GGUF by this command → It knows these types of models:",
        ),
        ({"model_type": "optt"}, "config.json cannot be understood"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "holds a classifier"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "this qwen2 has use_sliding_window = True"),
    ],
)
def test_networks_that_are_refused(
    values: dict[str, Any], said: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(copy, **values)
    code, told = command(capsys, copy, tmp_path / "model.gguf")
    assert code == 2
    assert said in told
    assert not [*tmp_path.glob("*.gguf")]


def test_an_adapter_is_to_be_merged(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, why in (
        ("lora", "which is no model without its base → Merge them first, with `toolkit merge"),
        ("prompt", "virtual tokens stand in front of a text, and cannot be merged → Use it on its base"),
    ):
        Adapter(AdapterConfig(name=name), 0, "", None, "", (), ()).write(copy)  # type: ignore[arg-type]
        code, said = command(capsys, copy, tmp_path / "model.gguf")
        assert code == 2
        assert why in said


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("taken.gguf", "taken.gguf is there already → Name a new file, or replace it with --overwrite."),
        ("model.bin", "has no name that ends in .gguf"),
        ("none/model.gguf", "there is no folder"),
        ("folder.gguf", "is a folder → Name a new file."),
    ],
)
def test_targets_that_are_refused(
    target: str, said: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken.gguf").touch()
    (tmp_path / "folder.gguf").mkdir()
    code, told = command(capsys, llama, tmp_path / target)
    assert code == 2
    assert said in told
    assert not (tmp_path / "taken.gguf").stat().st_size


def test_a_missing_tokenizer(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "tokenizer.json").unlink()
    code, said = command(capsys, copy, tmp_path / "model.gguf")
    assert code == 2
    assert "has a model but no tokenizer (tokenizer.json)" in said


def sentencepiece(tokenizer: Any) -> None:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["model"]["byte_fallback"] = True
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))


def lower(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def other_digits(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def greedy_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(AddedToken("<mask>", lstrip=True))


@pytest.mark.parametrize(
    ("change_it", "said"),
    [
        (sentencepiece, "the tokenizer is no byte-level BPE"),
        (lower, "splits texts in a way that GGUF has no name for"),
        (other_digits, "splits texts in a way that GGUF has no name for"),
        (greedy_token, "the token <mask> takes in the spaces beside it"),
    ],
)
def test_tokenizers_that_are_refused(change_it: Callable[[Any], None], said: str) -> None:
    tokenizer = tokenizer_of("smollm")
    change_it(tokenizer)
    with pytest.raises(ModelError, match=re.escape(said)):
        vocabulary.vocabulary_of(tokenizer, len(tokenizer))
