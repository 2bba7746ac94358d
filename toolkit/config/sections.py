"""The sections of a recipe's settings: what each key means, its type, its range and its default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field

Precision = Literal["auto", "fp32", "bf16", "fp16", "fp8"]
Normalisation = Literal["nfkc", "halfwidth", "control", "html", "simplified", "traditional", "spaces"]
Quantization = Literal["none", "int8", "nf4", "fp4", "nf4-double", "fp4-double"]

# Strict: YAML's `true` is no number. Real numbers are not, because YAML takes `1e-4`, without a dot, for a text.
Count = Annotated[int, Field(gt=0, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class ModelConfig:
    """The network to start from."""

    name: str = "sample:minilm"
    """`sample:NAME` (weights that ship inside a package), a local folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the network from its configuration alone, without the weights."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Overrides every dropout probability of the network. 0 makes runs comparable across world sizes."""
    freeze: tuple[str, ...] = ()
    """Regular expressions; a parameter whose name one of them matches (anywhere) is not trained."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    """Attention implementation of transformers. By default sdpa for the networks that have it, else eager."""


@dataclass(frozen=True)
class AdapterConfig:
    """A few new weights instead of all: the network is frozen, an adapter in it is trained (over PEFT)."""

    name: Literal["none", "lora", "rslora", "dora", "pissa", "loftq", "ia3", "prompt", "prefix"] = "none"
    """Low-rank products beside linear layers (`lora`; `rslora` scales them for high ranks, `dora` trains the norms of
    the weights apart, `pissa` begins with the largest singular values, `loftq` with what `--quantization` takes from
    the weights), a scale for each activation (`ia3`), virtual tokens in front of each text (`prompt`), or keys and
    values in front of those of each block (`prefix`)."""
    rank: Count | None = None
    """Rank of the products (default 16)."""
    alpha: Positive | None = None
    """The products are multiplied by alpha / rank, for `rslora` by alpha / √rank (default 2 × rank)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout probability of what goes into the products (default 0)."""
    targets: tuple[str, ...] = ("auto",)
    """Layers that get an adapter: `auto` (PEFT's choice for the architecture where it has one, else `all-linear`),
    `all-linear` (all linear layers but the head), or regular expressions that match a layer's name (anywhere)."""
    lr_ratio: Positive | None = None
    """LoRA+: learning rate of the second factor over that of the first and of all else (default 1; try 16)."""
    virtual_tokens: Count | None = None
    """Virtual tokens in front of each text, of `prompt` and `prefix` (default 20)."""
    train: tuple[str, ...] = ()
    """Regular expressions; a module that holds a parameter whose name one of them matches (anywhere) is trained whole,
    beside the adapter and a classifier's head."""


@dataclass(frozen=True)
class TextDataConfig:
    """Labelled texts: where they are, how they are split and cut into tokens."""

    name: str = "sample:bbc-news"
    """`sample:NAME`, a file, folder or glob (CSV, TSV, JSONL, Parquet, a folder of text files per class), or a
    hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    text: str = "text"
    """Column that holds the text."""
    label: str = "label"
    """Column that holds the class, as a word or a number; or what else `target` says."""
    text_pair: str | None = None
    """Column that holds a second text, where pairs of texts are to be judged."""
    target: Literal["class", "labels", "number"] = "class"
    """What is to be said of a text: one of several classes; any of several labels (a list, or words with `separator`
    between); or a number (regression)."""
    group: str | None = None
    """Column of what must not be parted by a split, as an author or a patient: all of its rows are trained on, or none.
    The split is then not stratified."""
    separator: str | None = None
    """What stands between labels that are no list (default a comma)."""
    validation: str | None = None
    """File, folder or glob with the validation split. Without it a share of the training data is taken."""
    test: str | None = None
    """File, folder or glob with the test split. Without it a share of the training data is taken."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the samples held out for validation where no validation split is given."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the samples held out for the test where no test split is given."""
    train_samples: Count | None = None
    """Use at most so many training samples (stratified)."""
    validation_samples: Count | None = None
    """Use at most so many validation samples (stratified)."""
    test_samples: Count | None = None
    """Use at most so many test samples (stratified)."""
    split_seed: Natural = 0
    """Seed of the splits, apart from the run's seed, so that runs with other seeds are tested alike."""
    normalise: tuple[Normalisation, ...] = ()
    """What is done to each text first, as `html control spaces`: `html` takes tags out, `nfkc` unifies characters that
    mean the same (and ①, ﬁ, ｱ with them), `halfwidth` full-width ASCII alone, `control` takes out invisible
    characters, `simplified` or `traditional` converts Chinese, `spaces` unifies blanks and empty lines. `toolkit
    predict` does the same."""
    folds: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Cross-validation: cut the data into so many stratified folds, of which `fold` is the test. It stands in the place
    of `test_share`."""
    fold: Natural = 0
    """Which fold is the test, from 0."""
    deduplicate: bool = True
    """Drop repeated texts, and texts that stand under two labels, before the split. A split that is given as a file of
    its own keeps its repeats."""
    max_length: Annotated[int, Field(ge=3, strict=True)] = 64
    """Longest sample in tokens; the rest of a text is cut off."""
    workers: Natural | None = None
    """Processes that collate batches beside the training process; 0 collates in it. By default 1 for a GPU, which would
    wait, and 0 for a CPU, whose cores have enough to do."""
    tokenize_processes: Count | None = None
    """Processes that cut texts into tokens; by default one for each core, at most 8. Small data uses fewer."""
    max_bad_rows: Natural = 100
    """Training samples that may turn out unfit (damaged or too long) and are left out, before the run stops."""


@dataclass(frozen=True)
class DecoderConfig:
    """The language model to train: a new one of these sizes, or one to go on from."""

    name: str | None = None
    """Weights to go on from: `sample:NAME`, a local folder, or a hub id. Its sizes are its own. By default a new
    network."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    architecture: Literal["llama", "qwen3", "gpt2"] = "llama"
    """Kind of a new network: as transformers has it."""
    layers: Count = 6
    """Blocks of a new network."""
    hidden_size: Count = 256
    """Width of a new network."""
    heads: Count = 4
    """Attention heads of a block."""
    kv_heads: Count | None = None
    """Heads of keys and values, which heads share (grouped-query attention). By default as many as `heads`."""
    mlp_size: Count | None = None
    """Inner width of a feed-forward layer. By default 8/3 of the width for gated ones (a multiple of 64), else 4."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary position embedding."""
    tie_embeddings: bool = True
    """Let the output layer be the table of the input embedding."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Overrides every dropout probability of the network."""
    freeze: tuple[str, ...] = ()
    """Regular expressions; a parameter whose name one of them matches (anywhere) is not trained."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    """Attention implementation of transformers. By default sdpa for the networks that have it, else eager."""


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens: by a tokenizer that is there, or by one that is trained on the data."""

    name: str | None = None
    """`sample:NAME`, a local folder, or a hub id. By default that of `model.name`; for a new network one is trained."""
    vocabulary: Annotated[int, Field(ge=260, strict=True)] = 8192
    """Size of the vocabulary that is trained (byte-level BPE), special tokens among it."""
    train_bytes: Count = 100_000_000
    """Bytes of text that a tokenizer is trained on, at most."""


@dataclass(frozen=True)
class SourcesConfig:
    """Texts or conversations: where they are, how they are mixed and split."""

    name: tuple[str, ...] = ()
    """One source or several: `sample:NAME`, a file, folder or glob, or a hub id."""
    weights: tuple[Positive, ...] = ()
    """Share of the training tokens that each source gives. One that is too small for its share is repeated within the
    epoch. By default all are taken as they are."""
    validation: tuple[str, ...] = ()
    """Sources of the validation split. Without it a share of the data is held out."""
    test: tuple[str, ...] = ()
    """Sources of the test split. Without it a share of the data is held out."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """Share held out for validation where no validation split is given."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """Share held out for the test where no test split is given."""
    folds: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Cross-validation: cut the data into so many folds, of which `fold` is the test. It stands in the place
    of `test_share`."""
    fold: Natural = 0
    """Which fold is the test, from 0."""
    group: str | None = None
    """Column of what must not be parted by a split, as an author or a speaker: all of its rows are trained on, or
    none."""
    train_texts: Count | None = None
    """Use at most so many texts (or conversations) for training."""
    split_seed: Natural = 0
    """Seed of the splits, apart from the run's seed, so that runs with other seeds are tested alike."""
    normalise: tuple[Normalisation, ...] = ()
    """What is done to each text first, as `html control spaces`: `html` takes tags out, `nfkc` unifies characters that
    mean the same (and ①, ﬁ, ｱ with them), `halfwidth` full-width ASCII alone, `control` takes out invisible
    characters, `simplified` or `traditional` converts Chinese, `spaces` unifies blanks and empty lines. `toolkit
    predict` does the same."""
    min_chars: Count | None = None
    """Drop texts of fewer characters (of a conversation: in all messages together, without the system's)."""
    max_chars: Count | None = None
    """Drop texts of more characters."""
    languages: tuple[str, ...] = ()
    """Languages to keep, as `en zh`; texts in others are dropped. By default all."""
    deduplicate: bool = True
    """Drop what stands in an earlier row."""
    near_duplicates: Annotated[float, Field(ge=0.5, le=1)] | None = None
    """Drop what is nearly another text, of training or held out: at least so much of their runs of five words, taken
    together, is in both (Jaccard similarity). 0.8 is usual. By default nothing: what is too much alike is a judgement
    on the data, and it takes as long as cutting into tokens."""
    decontaminate: Annotated[int, Field(ge=5, strict=True)] | None = None
    """Drop training texts that share a run of so many words with a held-out one; 13 is usual. By default none."""
    workers: Natural | None = None
    """Processes that collate batches beside the training process; 0 collates in it. By default 1 for a GPU, which would
    wait, and 0 for a CPU, whose cores have enough to do."""
    tokenize_processes: Count | None = None
    """Processes that cut texts into tokens; by default one for each core, at most 8. Small data uses fewer."""
    max_bad_rows: Natural = 100
    """Rows that may turn out unfit (malformed, damaged) and are left out, before the run stops."""


@dataclass(frozen=True)
class CorpusConfig(SourcesConfig):
    """Plain texts: where they are, how they are mixed, split and packed into sequences."""

    name: tuple[str, ...] = ("sample:bbc-news",)
    """One source or several: `sample:NAME`, a file, folder or glob (text, JSONL, CSV, Parquet), or a hub id."""
    text: str = "text"
    """Column that holds the text."""
    texts_in: Literal["file", "paragraph", "line"] = "file"
    """What one text of a .txt file is: all of it, a paragraph between blank lines, or a line."""
    max_length: Annotated[int, Field(ge=8, strict=True)] = 512
    """Tokens of a sequence: texts are packed into it, and one that is longer goes on in another."""


@dataclass(frozen=True)
class ChatConfig(SourcesConfig):
    """Conversations: where they are, how they are laid out, mixed and split, and what of them is learnt."""

    name: tuple[str, ...] = ("sample:instructions",)
    """One source or several: `sample:NAME`, a file, folder or glob (JSONL, JSON, Parquet), or a hub id."""
    layout: Literal["auto", "messages", "sharegpt", "alpaca"] = "auto"
    """How a row holds a conversation: `messages` (a list of role and content), `sharegpt` (`conversations`, a list of
    from and value), `alpaca` (instruction, input, output). `auto` goes by the columns."""
    template: Path | None = None
    """File with a chat template (Jinja), in place of the tokenizer's own."""
    learn: Literal["all", "last"] = "all"
    """Answers of a conversation that are learnt: all, or the last alone. Nothing else is."""
    max_length: Annotated[int, Field(ge=8, strict=True)] = 1024
    """Tokens of the longest conversation."""
    too_long: Literal["truncate", "drop", "split"] = "truncate"
    """What becomes of a longer one: its end is cut off, it is left out, or its end goes on as another sample, which
    then lacks what was said before."""


@dataclass(frozen=True)
class PairsConfig(SourcesConfig):
    """Pairs of answers to one question, of which one is preferred: where they are, and how they are written."""

    name: tuple[str, ...] = ("sample:piqa",)
    """One source or several: `sample:NAME`, a file, folder or glob (JSONL, JSON, Parquet), or a hub id. A row has the
    columns `chosen` and `rejected`, each a conversation or, beside a column `prompt`, an answer to it."""
    template: Path | None = None
    """File with a chat template (Jinja), in place of the tokenizer's own."""
    max_length: Annotated[int, Field(ge=8, strict=True)] = 1024
    """Tokens of the longest question with an answer."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What becomes of a pair with a longer one: the end of that is cut off, or the pair is left out."""


@dataclass(frozen=True)
class PreferenceConfig:
    """How a model learns from pairs of answers."""

    loss: Literal["dpo", "ipo", "kto", "orpo"] = "dpo"
    """`dpo`, `ipo` and `kto` hold the model against the one that it was before; `orpo` does not, and learns the
    preferred answers as well."""
    beta: Positive = 0.1
    """How dear it is to leave that model (dpo, kto); the margin to be reached is 1 / (2 beta), in log-probability per
    token (ipo); the weight of the preference beside the preferred answers (orpo)."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, and in what batches."""

    epochs: Positive = 2.0
    """Passes over the training split; a part of one may be asked for. `steps` overrides it."""
    steps: Count | None = None
    """Optimizer steps; where it is given, it decides and `epochs` does not."""
    global_batch: Count = 32
    """Samples of one optimizer step, over all ranks: the same curve on any number of processes."""
    micro_batch: Count | None = None
    """Samples of one forward pass on one rank. By default the largest divisor of its share, 32 at most.
    Accumulation follows: global_batch / (micro_batch × processes)."""
    eval_batch: Count = 64
    """Samples of one forward pass on one rank in evaluation."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient to this global norm; `None` does not clip."""
    padding_free: Literal["auto", "on", "off"] = "auto"
    """Compute on real tokens alone, with attention within each text: `auto` where the model's outputs stay the same."""
    compile: bool = False
    """Let torch compile the model's blocks (torch.compile). The first steps wait for it; worth a try on GPUs."""
    cuda_graphs: bool = False
    """Launch forward and backward as CUDA graphs, one for each shape, to which batches are filled up. For networks so
    small that launching their kernels takes longer than computing; one GPU, bf16."""
    activation_checkpointing: Literal["none", "selective", "full", "offload"] = "none"
    """Keep less for backward and compute it again there: `full` keeps the inputs of each block, `selective` the results
    of its matrix products too, `offload` the inputs in the host's memory, for GPUs. Less memory for more time, and the
    same numbers."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes in the training loss."""
    on_fault: Literal["stop", "rewind"] = "stop"
    """What follows a loss or gradient that is not finite, or a spike: `stop` the run, or `rewind` to the newest
    checkpoint and leave out the samples of that step; if it happens again before the next checkpoint, those of all
    steps since."""
    spike: Positive | None = None
    """Take a loss for a spike that lies so many robust standard deviations (1.4826 × the median absolute deviation of
    the last 100 losses) above their median; 10 is a cautious choice. By default nothing is a spike."""
    max_rewinds: Count = 3
    """Rewinds of one run, after which a fault stops it."""


@dataclass(frozen=True)
class GenerateConfig:
    """What the model is let write after each evaluation on the validation split."""

    prompts: tuple[str, ...] = ()
    """Beginnings of texts that it goes on with. None: it writes nothing."""
    tokens: Count = 40
    """Tokens that it adds to each, at most."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    """Of the distribution that tokens are drawn from; 0 takes the likeliest each time."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the learning-rate schedule, which counts optimizer steps."""

    name: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    """`adamw-8bit` keeps the moments of large weights in 8 bits, 2 bytes a weight in the place of 8; `paged-…` lets
    them move to the host's memory while a GPU needs the room. Both through bitsandbytes."""
    lr: Positive = 1e-4
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: Positive = 1e-8
    """Term added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Decoupled weight decay; biases and norms are left out of it."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Shape after the warm-up: linear or cosine to `final_share`, constant, or warm-up–stable–decay."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of all steps over which the rate rises linearly from 0. `warmup_steps` overrides it."""
    warmup_steps: Natural | None = None
    """Steps over which the rate rises; where it is given, it decides and `warmup_share` does not."""
    final_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Learning rate that the last step leads to, as a share of the peak (default 0); not for `constant`."""
    decay_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of all steps over which `wsd` decays (default 0.2); for `wsd` only."""


@dataclass(frozen=True)
class StrategyConfig:
    """How the model, the gradients and the optimizer's state are laid over the ranks."""

    name: Literal["auto", "single", "ddp", "diloco", "fsdp", "zero1", "zero2", "zero3"] = "auto"
    """`auto` takes what `accelerate launch` asked for: FSDP2, a ZeRO stage, else DDP on several processes."""
    reshard_after_forward: bool | None = None
    """FSDP: free the gathered parameters between forward and backward (default yes; no = more memory, less traffic)."""
    shard_size: Annotated[int, Field(ge=2, strict=True)] | None = None
    """FSDP: ranks that hold one copy of the model between them; the others replicate it (hybrid sharding)."""
    wrap: tuple[str, ...] = ()
    """FSDP: class names of the blocks that are sharded one by one. By default the model's repeated blocks."""
    offload: Literal["none", "optimizer", "parameters"] | None = None
    """Keep the optimizer's state (ZeRO), or the parameters and it (ZeRO-3, FSDP), in CPU memory. Needs GPUs."""
    deepspeed: Path | None = None
    """ZeRO: a DeepSpeed JSON of your own. What this recipe decides must be "auto" there, or agree."""
    compress: Literal["none", "bf16", "powersgd"] = "none"
    """DDP: send gradients in bf16, or as products of two narrow matrices (PowerSGD); the numbers then differ."""
    compress_rank: Count | None = None
    """PowerSGD: columns of the narrow matrices (default 4). More = closer to the gradient, more traffic."""
    compress_start: Annotated[int, Field(ge=2, strict=True)] | None = None
    """PowerSGD: steps that are sent in full before it begins (default 10)."""
    local_steps: Annotated[int, Field(ge=2, strict=True)] | None = None
    """DiLoCo: steps that each rank takes alone before the ranks meet (default 20); the numbers then differ."""
    outer_lr: Positive | None = None
    """DiLoCo: share of the way to the ranks' average that is gone at a meeting (default 0.7; local SGD: 1)."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """DiLoCo: Nesterov's momentum from meeting to meeting (default 0.9; local SGD: 0)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """How a run survives, and what is kept of the model."""

    every: Count | None = None
    """Steps between two checkpoints. One is always written at the end, and when a signal stops the run."""
    every_minutes: Positive | None = 10.0
    """Minutes between two checkpoints, beside or instead of `every`."""
    keep: Count = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest validation loss too, and finish with its weights."""
    asynchronous: bool = True
    """Write while training goes on; otherwise it waits."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto`: the same command line goes on with its run where there is one. `never` starts a new run; `must` refuses
    to."""
    allow_change: tuple[str, ...] = ()
    """Keys (or sections) that may differ from those of the run that is continued, as `train.steps`."""
    crash_limit: Count = 3
    """Refuse to start after so many crashes in a row at the same step."""
    save_model: bool = True
    """Write the trained model to `model/` in the run's folder (Hugging Face layout)."""
    max_shard_size: Annotated[str, Field(pattern=r"^\d+(\.\d+)?[KMGT]B$")] = "5GB"
    """Largest weight file, as `500MB` or `5GB`."""


@dataclass(frozen=True)
class RunConfig:
    """The run's folder, seed and reporting."""

    dir: Path | None = None
    """Folder of the run. By default `runs/RECIPE/NAME`."""
    name: str | None = None
    """Name of the run. By default the next free number."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    """Seed of the order of the samples, of new layers and of dropout."""
    log_every: Count = 10
    """Steps between two lines on a screen that is not a terminal, and between two points in the trackers."""
    eval_every: Count | None = None
    """Steps between two evaluations on the validation split. By default once an epoch."""
    early_stopping: Count | None = None
    """Stop after so many evaluations in a row without a lower validation loss."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate to log to: `tensorboard`."""
    hang_seconds: Positive | None = 10.0
    """End the run (exit code 75) where no progress is made for so long and three times the slowest hundredth of the
    steps; `None` never does."""
    profile: Count | None = None
    """Trace so many steps, after the first few, and say where their time goes. By default none."""
    show: Count | None = None
    """Show so many training samples as the model would see them, with what of them is learnt, and end there."""
    debug: bool = False
    """Show the traceback of an error."""


class RecipeConfig(Protocol):
    """The sections that every recipe's settings have. Those of text models have `adapter` and `quantization` too."""

    @property
    def train(self) -> TrainConfig:
        """How long, and in what batches."""

    @property
    def optim(self) -> OptimConfig:
        """Optimizer and schedule."""

    @property
    def precision(self) -> str:
        """Number format."""

    @property
    def strategy(self) -> StrategyConfig:
        """Layout over the ranks."""

    @property
    def checkpoint(self) -> CheckpointConfig:
        """What is kept."""

    @property
    def run(self) -> RunConfig:
        """Folder, seed, reporting."""
