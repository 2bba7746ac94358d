"""Models that checkpoints become: whole, with the right weights and names, and never half there."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TimesFmConfig,
)

from tests.ranks import on_ranks
from tests.unit.checkpoint_runs import CHINESE, classifier, masked, pass_on, tokenizer, write_run
from toolkit.checkpoint.export import (
    BOUND,
    build_model,
    export_model,
    load_tokenizer,
    load_weights,
    probe_batch,
    prove,
    state_digest,
    write_base,
    write_model,
)
from toolkit.checkpoint.manifest import read_manifest, write_manifest
from toolkit.config import NextItemNetworkConfig, TableNetworkConfig
from toolkit.data.tables import Catalogue, Preprocessor
from toolkit.errors import CheckpointError, ModelError
from toolkit.networks.next_item import next_item_network
from toolkit.networks.tables import table_network

LAST = Path("checkpoints/step_00000030")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Runs by strategy and model, each made once, and the weights that they ended with."""
    made: dict[Any, tuple[Path, dict[str, Any]]] = {}

    def make(strategy: str, ranks: int, kind: str = "classifier") -> tuple[Path, dict[str, Any]]:
        key = (strategy, ranks, kind)
        if key not in made:
            run = tmp_path_factory.mktemp(f"{strategy}_{kind}")
            made[key] = run, on_ranks(write_run, ranks, run, strategy, kind, (30,))[0]
        return made[key]

    return make


@pytest.mark.parametrize("kind", ["mlp", "ft_transformer", "next_item"])
def test_networks_that_read_no_tokens_of_texts(kind: Any, tmp_path: Path) -> None:
    """Rows of tables and sequences of items, with what says how they are read."""
    reading: Any = Catalogue(("a", "b", "c"), ("A", "B", "C"), (3, 2, 1), exclude_seen=True)
    if kind == "next_item":
        model = next_item_network(NextItemNetworkConfig(), 3, 20, seed=0)
    else:
        model = table_network(TableNetworkConfig(architecture=kind), 3, (4, 5), 2, seed=0)
        reading = Preprocessor.from_json(
            {"target": "x", "labels": ["a", "b"], "scale": None, "kinds": {"y": "category"}, "numbers": []}
            | {"categories": {"y": ["u", "v"]}, "clip": 5.0, "missing_values": ["NA"]}
        )
    write_base(model, reading, tmp_path / "base")
    proof = export_model(tmp_path / "base", model.state_dict(), tmp_path / "model", "5GB")
    assert proof.weight_difference == proof.logit_difference == 0
    assert load_tokenizer(tmp_path / "model") == reading


@pytest.fixture
def exported(runs: Any, tmp_path: Path) -> tuple[Path, Any]:
    """A model folder, and the model that it was made from."""
    run, _ = runs("single", 1)
    weights = load_weights(run / LAST, read_manifest(run / LAST))
    export_model(run / "base", weights, tmp_path / "model", "5GB")
    return tmp_path / "model", build_model(run / "base", weights)


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# Weights


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("fsdp", 2), ("zero1", 2), ("zero3", 2)])
def test_the_weights_are_those_that_the_strategy_gathers(runs: Any, strategy: str, ranks: int) -> None:
    run, expected = runs(strategy, ranks)
    weights = load_weights(run / LAST, read_manifest(run / LAST))
    assert len(list((run / LAST).glob("*.safetensors"))) == ranks
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name], strict=True)


def test_one_digest_for_one_state(runs: Any, tmp_path: Path) -> None:
    """Whatever strategy and ranks it lies on."""
    source = runs("single", 1)[0] / LAST
    expected = state_digest(source, read_manifest(source))
    on_ranks(pass_on, 2, source, tmp_path / "fsdp", "fsdp")
    on_ranks(pass_on, 3, tmp_path / "fsdp" / LAST, tmp_path / "zero2", "zero2")
    for name, ranks in (("fsdp", 2), ("zero2", 3)):
        folder = tmp_path / name / LAST
        assert len(list(folder.glob("*.safetensors"))) == ranks
        assert state_digest(folder, read_manifest(folder)) == expected


def test_the_digest_reads_everything(runs: Any, tmp_path: Path) -> None:
    """One bit of a tensor; a name; a shape."""
    source = runs("single", 1)[0] / LAST
    manifest = read_manifest(source)
    expected = state_digest(source, manifest)
    copy = tmp_path / source.name
    shutil.copytree(source, copy)
    assert state_digest(copy, manifest) == expected
    shard = next(copy.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert state_digest(copy, manifest) != expected
    tensors = dict(manifest["tensors"])
    tensors["weights/classifier.weight"] = {"shape": [32, 3], "dtype": "float32"}
    assert state_digest(source, manifest | {"tensors": tensors}) != expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights/classifier.bias": None}, r"do not name the same tensors \(weights/classifier.bias\)"),
        ({"weights/strange": {"shape": [1], "dtype": "float32"}}, r"do not name the same tensors \(weights/strange\)"),
        ({"weights/classifier.bias": {"shape": [4], "dtype": "float32"}}, "there are 3 elements of 4"),
        ({"weights/classifier.bias": {"shape": [3], "dtype": "bfloat16"}}, "a range at 0 of float32"),
    ],
)
def test_weights_that_are_not_what_the_manifest_says(runs: Any, change: dict[str, Any], message: str) -> None:
    source = runs("single", 1)[0] / LAST
    manifest = read_manifest(source)
    tensors = {name: facts for name, facts in (manifest["tensors"] | change).items() if facts}
    with pytest.raises(CheckpointError, match=message):
        load_weights(source, manifest | {"tensors": tensors})


def test_a_gap_between_ranges_is_no_weight(runs: Any, tmp_path: Path) -> None:
    """Without one of two files, the end of each tensor is still there, and so would be its size."""
    source = runs("fsdp", 2)[0] / LAST
    manifest = read_manifest(source)
    files = {name: facts for name, facts in manifest["files"].items() if name != "shard_00001.safetensors"}
    with pytest.raises(CheckpointError, match="after one that ends at 0"):
        load_weights(source, manifest | {"files": files})


@pytest.mark.parametrize("name", ["../shard.safetensors", "/etc/x.safetensors", "a/b.safetensors", "link.safetensors"])
def test_a_manifest_that_leads_out_of_the_folder(runs: Any, tmp_path: Path, name: str) -> None:
    source = runs("single", 1)[0] / LAST
    copy = tmp_path / source.name
    shutil.copytree(source, copy)
    manifest = read_manifest(copy)
    shutil.move(next(copy.glob("*.safetensors")), tmp_path / "shard.safetensors")
    (copy / "link.safetensors").symlink_to(tmp_path / "shard.safetensors")
    with pytest.raises(CheckpointError, match="no name of a file|a symbolic link"):
        load_weights(copy, manifest | {"files": {name: {}}})


# Exports


def test_an_export(runs: Any, tmp_path: Path) -> None:
    run, expected = runs("fsdp", 2)
    weights = load_weights(run / LAST, read_manifest(run / LAST))
    proof = export_model(run / "base", weights, tmp_path / "model", "50KB")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shards = files_of(tmp_path / "model")
    assert len(shards) == proof.files == 2
    assert all(path.stat().st_size < 54_000 for path in shards)
    assert sum(path.stat().st_size for path in shards) == proof.bytes
    assert (proof.weight_difference, proof.logit_difference, proof.bound) == (0.0, 0.0, BOUND)
    assert proof.tensors == len(expected)
    assert proof.parameters == sum(tensor.size for tensor in expected.values())
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {modes["config.json"]}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < modes.keys()
    model = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name], strict=True)


def test_files_are_as_open_as_the_folder_is(runs: Any, tmp_path: Path) -> None:
    """safetensors itself writes for the owner alone."""
    run, _ = runs("single", 1)
    weights = load_weights(run / LAST, read_manifest(run / LAST))
    for folder, umask in (("shared", 0o002), ("closed", 0o077)):
        before = os.umask(umask)
        try:
            export_model(run / "base", weights, tmp_path / folder, "5GB")
        finally:
            os.umask(before)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / folder).iterdir()}
        assert modes == {0o666 & ~umask}


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("fsdp", 2)])
def test_tied_weights(runs: Any, tmp_path: Path, strategy: str, ranks: int) -> None:
    """Written once, and tied again when they are loaded."""
    run, _ = runs(strategy, ranks, "masked")
    weights = load_weights(run / LAST, read_manifest(run / LAST))
    tied = "cls.predictions.decoder.weight"
    assert tied not in weights
    proof = export_model(run / "base", weights, tmp_path / "model", "5GB")
    (written,) = map(load_file, files_of(tmp_path / "model"))
    assert (tied in written) + ("bert.embeddings.word_embeddings.weight" in written) == 1
    model = BertForMaskedLM.from_pretrained(tmp_path / "model")
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    expected = masked()
    expected.load_state_dict(weights, strict=False)
    probe = probe_batch(model.config)
    assert torch.equal(model.eval()(**probe).logits, expected.eval()(**probe).logits)
    assert proof.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_copies_of_tied_weights_are_written_once(tmp_path: Path) -> None:
    """As a strategy gathers them: under both names, in different memory."""
    model = masked()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "cls.predictions.decoder.weight" in weights
    write_model(model, weights, tokenizer(), tmp_path / "model", "5GB")
    (written,) = map(load_file, files_of(tmp_path / "model"))
    assert written.keys() == dict(model.named_parameters()).keys()
    prove(tmp_path / "model", model, probe_batch(model.config))


def test_the_copies_of_an_engine_do_not_set_the_type(tmp_path: Path) -> None:
    """Under ZeRO with bf16 the model's own parameters are rounded; the weights that are written are not."""
    model = classifier()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_model(model.bfloat16(), weights, tokenizer(), tmp_path / "model", "5GB")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert again.dtype == torch.float32
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())


def test_what_a_run_begins_with(tmp_path: Path) -> None:
    model = classifier()
    write_base(model, tokenizer(), tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == [type(model).__name__]
    built = build_model(tmp_path / "base", model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in built.state_dict().items())
    assert load_tokenizer(tmp_path / "base")(CHINESE) == tokenizer()(CHINESE)


def test_the_tokenizer_comes_through(exported: tuple[Path, Any]) -> None:
    expected = tokenizer()(CHINESE)["input_ids"]
    assert len(expected) == len(CHINESE) + 2
    assert 1 not in expected  # no character is unknown
    settings = json.loads((exported[0] / "tokenizer_config.json").read_text())
    assert "local_files_only" not in settings
    again = AutoTokenizer.from_pretrained(exported[0])
    assert again(CHINESE)["input_ids"] == expected
    assert again.decode(expected, skip_special_tokens=True).replace(" ", "") == CHINESE


# Proofs


def test_other_weights_are_refused(exported: tuple[Path, Any]) -> None:
    folder, model = exported
    with torch.no_grad():
        model.classifier.bias[0] += 1e-3
    proof = prove(folder, model, probe_batch(model.config), bound=2e-3)
    assert proof.weight_difference == pytest.approx(1e-3, rel=1e-3)
    assert proof.logit_difference == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(CheckpointError, match=r"weights differ by up to 0.001, its logits by up to 0.001, .* is 1e-05"):
        prove(folder, model, probe_batch(model.config))
    assert not folder.exists()


def test_other_answers_are_refused(exported: tuple[Path, Any]) -> None:
    """The same weights in another network, which its configuration describes."""
    folder, model = exported
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(
        CheckpointError, match=r"weights differ by up to 0, its logits by up to 0\.\d+, and the bound is"
    ):
        prove(folder, model, probe_batch(model.config))
    assert not folder.exists()


def test_what_is_no_number_is_no_small_difference(exported: tuple[Path, Any]) -> None:
    folder, model = exported
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(CheckpointError, match="weights differ by up to nan, its logits by up to nan"):
        prove(folder, model, probe_batch(model.config))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier.bias": None}, "has 1 missing keys: classifier.bias"),
        ({"strange.bias": torch.ones(3)}, "has 1 unexpected keys: strange.bias"),
        ({"classifier.bias": torch.ones(4)}, "cannot be loaded|1 mismatched keys"),
        ({"classifier.bias": torch.ones(0)}, r"classifier.bias was written without an element: \[0\]"),
        ({"module.classifier.bias": torch.ones(3)}, "module.classifier.bias is the name of a wrapper"),
        ({"_orig_mod.classifier.bias": torch.ones(3)}, "_orig_mod.classifier.bias is the name of a wrapper"),
        ({"bert._fsdp_wrapped_module.x": torch.ones(3)}, "is the name of a wrapper"),
        ({"bert._checkpoint_wrapped_module.x": torch.ones(3)}, "is the name of a wrapper"),
    ],
)
def test_wrong_files_are_refused(exported: tuple[Path, Any], changes: dict[str, Any], message: str) -> None:
    folder, model = exported
    (file,) = files_of(folder)
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        prove(folder, model, probe_batch(model.config))
    assert not folder.exists()


def test_pickles_are_not_weights(exported: tuple[Path, Any]) -> None:
    folder, model = exported
    (file,) = files_of(folder)
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        prove(folder, model, probe_batch(model.config))


def test_a_proof_leaves_the_model_as_it_was(exported: tuple[Path, Any]) -> None:
    folder, model = exported
    prove(folder, model.train(), probe_batch(model.config))
    assert model.training
    model(**probe_batch(model.config)).logits.sum().backward()


TINY: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0}
PROBED = {
    "bert": classifier,
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=60)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60)),
    "gpt2 classifier": lambda: GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=60)
    ),
    "t5": lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **TINY)),
    "bart classifier": lambda: BartForSequenceClassification(
        BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            vocab_size=60,
            max_position_embeddings=8,
        )
    ),
}


@pytest.mark.parametrize("name", PROBED)
def test_every_text_model_can_be_proved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = PROBED[name]().eval()
    probe = probe_batch(model.config)
    assert all(torch.equal(tensor, probe_batch(model.config)[key]) for key, tensor in probe.items())
    lengths = probe["attention_mask"].sum(1).tolist()
    assert lengths == ([12, 7] if model.config.pad_token_id is not None and name != "bart classifier" else lengths)
    assert int(probe["input_ids"].max()) < model.config.vocab_size
    write_model(model, model.state_dict(), tokenizer(), tmp_path / "model", "5GB")
    assert prove(tmp_path / "model", model, probe).logit_difference == 0
    # It tells models apart: most weights change some answer.
    with torch.no_grad():
        list(model.parameters())[-1].add_(torch.randn_like(list(model.parameters())[-1]))
    with pytest.raises(CheckpointError, match="differ by"):
        prove(tmp_path / "model", model, probe)


def test_what_reads_no_text_has_no_probe() -> None:
    with pytest.raises(CheckpointError, match="a timesfm reads no tokens"):
        probe_batch(TimesFmConfig())


# The model's description


def test_building_moves_no_random_number(runs: Any) -> None:
    run, _ = runs("single", 1)
    weights = load_weights(run / LAST, read_manifest(run / LAST))
    before = torch.get_rng_state()
    model = build_model(run / "base", weights)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_low_precision_in_the_configuration_is_not_taken_over(runs: Any, tmp_path: Path) -> None:
    run, _ = runs("single", 1)
    weights = load_weights(run / LAST, read_manifest(run / LAST))
    shutil.copytree(run / "base", tmp_path / "base")
    config = json.loads((run / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    export_model(tmp_path / "base", weights, tmp_path / "model", "5GB")
    assert load_file(files_of(tmp_path / "model")[0])["classifier.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier.bias": None}, r"0 do not fit \(none\), 1 are missing \(classifier.bias\)"),
        ({"classifier.bias": torch.ones(4)}, r"1 do not fit \(classifier.bias\)"),
        ({"module.classifier.bias": torch.ones(3)}, r"1 do not fit \(module.classifier.bias\)"),
    ],
)
def test_weights_of_another_model(runs: Any, change: dict[str, Any], message: str) -> None:
    run, _ = runs("single", 1)
    weights = load_weights(run / LAST, read_manifest(run / LAST)) | change
    with pytest.raises(CheckpointError, match=message):
        build_model(run / "base", {name: tensor for name, tensor in weights.items() if tensor is not None})


@pytest.mark.parametrize("architecture", ["BertForSorcery", "os", "logging", "AutoModel", "", "__doc__"])
def test_what_is_no_model_of_transformers(runs: Any, tmp_path: Path, architecture: str) -> None:
    run, _ = runs("single", 1)
    config = json.loads((run / "base" / "config.json").read_text()) | {"architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="which is no model of transformers"):
        build_model(tmp_path, {})


def test_code_beside_a_model_is_not_run(runs: Any, tmp_path: Path) -> None:
    run, _ = runs("single", 1)
    marker, weights = tmp_path / "marker", load_weights(run / LAST, read_manifest(run / LAST))
    shutil.copytree(run / "base", tmp_path / "base")
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import BertConfig as C, BertTokenizerFast as T\n"
    for name in ("evil_config", "evil_model", "evil_tokenizer"):
        (tmp_path / "base" / f"{name}.py").write_text(code)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "evil_config.C", "AutoModelForSequenceClassification": "evil_model.C"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil_tokenizer.T", "evil_tokenizer.T"]}),
    ):
        values = json.loads((tmp_path / "base" / name).read_text())
        (tmp_path / "base" / name).write_text(json.dumps(values | {"auto_map": auto_map}))
    export_model(tmp_path / "base", weights, tmp_path / "model", "5GB")
    values = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(values | {"model_type": "evil"}))
    with pytest.raises(ModelError):
        build_model(tmp_path / "base", weights)
    assert not marker.exists()
    assert not list((tmp_path / "model").glob("*.py"))


def test_a_tokenizer_that_is_missing(runs: Any, tmp_path: Path) -> None:
    run, _ = runs("single", 1)
    shutil.copy(run / "base" / "config.json", tmp_path)
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


# Never half there


def test_the_old_model_stays_where_the_new_one_fails(exported: tuple[Path, Any], runs: Any) -> None:
    folder, _ = exported
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run, _ = runs("single", 1)
    weights = load_weights(run / LAST, read_manifest(run / LAST))
    with pytest.raises(CheckpointError, match="differ by up to 0, its logits by up to 0, and the bound is -1"):
        export_model(run / "base", weights, folder, "5GB", bound=-1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_full_disk_is_told() -> None:
    """/dev/full is the one device that is always full; a folder on it cannot even be made."""
    model = classifier()
    with pytest.raises(CheckpointError, match="cannot be written: .*Not a directory"):
        write_model(model, model.state_dict(), tokenizer(), Path("/dev/full/model"), "5GB")


def write_again_and_again(target: Path) -> None:
    """Models whose weights are all 1, all 2, …, one after the other."""
    model = classifier()
    for number in range(1, 10_000):
        weights = {name: torch.full_like(tensor, number) for name, tensor in model.state_dict().items()}
        write_model(model, weights, tokenizer(), target, "50KB")


def test_kills_leave_whole_models_only(tmp_path: Path) -> None:
    target, rng = tmp_path / "model", random.Random(0)
    context = multiprocessing.get_context("forkserver")
    seen, left = set(), 0
    for _ in range(12):
        process = context.Process(target=write_again_and_again, args=(target,), daemon=True)
        process.start()
        while not target.exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        process.join()
        left += len(list(tmp_path.iterdir())) - target.exists()
        if target.exists():
            tensors = [tensor for path in files_of(target) for tensor in load_file(path).values()]
            assert len(tensors) == 41
            assert len({float(value) for tensor in tensors for value in tensor.unique()}) == 1
            assert load_tokenizer(target)(CHINESE)["input_ids"]
            assert len(BertForSequenceClassification.from_pretrained(target).state_dict()) == 41
            seen.add(float(tensors[0].flatten()[0]))
    assert left  # some kill came in the middle
    assert seen
    model = classifier()
    write_model(model, model.state_dict(), tokenizer(), target, "5GB")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_manifest_made_by_hand(runs: Any, tmp_path: Path) -> None:
    """Names of tensors become names of files elsewhere."""
    save_file(
        {"../x": torch.ones(1)}, tmp_path / "a.safetensors", {"DCP_SHARDING_INFO": '{"../x": {"saved_offsets": [0]}}'}
    )
    write_manifest(
        tmp_path, {"step": 1, "files": {"a.safetensors": {}}, "tensors": {"../x": {"shape": [1], "dtype": "float32"}}}
    )
    with pytest.raises(CheckpointError, match=r"'../x' is no name of a tensor"):
        state_digest(tmp_path, read_manifest(tmp_path))
