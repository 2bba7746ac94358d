"""Conversations: how rows are read, what is refused, what of each is learnt, and what becomes of long ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chats import CHATML, chat_tokenizer, write_chats
from toolkit.compute.cross_entropy import IGNORED
from toolkit.config import ChatConfig
from toolkit.data import LanguageData, TextCorpus, answer_end, chat, conversations, question, use_template
from toolkit.data.chat.encode import encode
from toolkit.data.chat.messages import Unfit, messages_of
from toolkit.data.chat.rows import messages_in
from toolkit.data.files import ROLES
from toolkit.errors import ConfigError, DataError
from toolkit.tasks import LanguageModeling

TALK = [
    {"role": "user", "content": "Who sings?"},
    {"role": "assistant", "content": "A bird sings."},
    {"role": "user", "content": "天空是什么颜色?"},
    {"role": "assistant", "content": "天空是蓝色的。"},
]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK]
FAMILIES = {
    "chatml": (CHATML, "<|im_end|>", "\n"),
    "end token behind the answer alone": (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}",
        "</s>",
        "",
    ),
    "one end token for all": (
        "{% for m in messages %}<turn>{{ m['role'] }}\n\n{{ m['content'] | trim }}<eot>{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n\n{% endif %}",
        "<eot>",
        "",
    ),
    "another name of the assistant": (
        "{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}"
        "<eot>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
        "<eot>",
        "\n",
    ),
}
FORGETFUL = (  # as templates that drop the thoughts of earlier answers
    "{% for m in messages %}<turn>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split(' ')[-1] }}{% else %}{{ m['content'] }}{% endif %}<eot>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def talks(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(count)
    ]


def read(*names: Path, **settings: Any) -> TextCorpus:
    return conversations(ChatConfig(name=tuple(map(str, names)), **settings))


def prepared(path: Path, **settings: Any) -> tuple[LanguageData, Any]:
    config = ChatConfig(name=(str(path),), **settings)
    tokenizer = chat_tokenizer()
    return chat(config, conversations(config), tokenizer), tokenizer


# Layouts


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"messages": TALK}, "messages"),
        ({"messages": json.dumps(TALK), "source": "a table"}, "messages"),
        ({"conversations": SHAREGPT}, "sharegpt"),
        ({"conversations": [{"from": m["role"], "value": m["content"]} for m in TALK]}, "sharegpt"),
    ],
)
def test_layouts(row: dict[str, Any], layout: Any) -> None:
    assert messages_of(row, "auto") == messages_of(row, layout) == TALK


def test_alpaca() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    expected = [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}]
    assert messages_of(row, "auto") == expected
    assert messages_of({"instruction": "Add 1 and 2", "output": "3"}, "alpaca")[0]["content"] == "Add 1 and 2"
    assert messages_of(row | {"input": None, "system": "Reckon."}, "auto")[0] == {
        "role": "system",
        "content": "Reckon.",
    }


def test_files_of_every_kind_hold_the_same(tmp_path: Path) -> None:
    rows = talks(40)
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerows([["messages"], *([json.dumps(row["messages"])] for row in rows)])
    found = [read(tmp_path / name).splits for name in ("a.jsonl", "b.json", "c.parquet", "d.csv")]
    for splits in found:
        for role in ROLES:
            assert splits[role]["text"] == found[0][role]["text"]
    texts = [text for role in ROLES for text in found[0][role]["text"]]
    assert sorted(m[0]["content"] for m in map(messages_in, texts)) == sorted(f"{i}?" for i in range(40))


# What is no conversation


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "A"}, "they have none of these columns: messages; conversations; instruction and output"),
        ({"messages": []}, "their column 'messages' holds no list of messages"),
        ({"messages": "[{"}, "their column 'messages' is not JSON"),
        ({"messages": [{"role": "user"}]}, "a message lacks 'role' or 'content'"),
        ({"messages": [{"role": "bot", "content": "A"}]}, "'bot' is none of the roles system, user, assistant, tool"),
        ({"messages": [{"role": "user", "content": ["A"]}]}, "is not text but of the type list"),
        ({"messages": TALK[1:]}, "a message of the assistant comes first"),
        ({"messages": TALK[:1] + TALK[:2]}, "a message of the user follows one of the user"),
        ({"messages": TALK[:3]}, "they do not end with an answer of the assistant"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, "a message of the assistant is empty"),
        ({"conversations": [{"from": "alien", "value": "A"}]}, "'alien' is none of the roles"),
        ({"instruction": "Add.", "output": ""}, "a message of the assistant is empty"),
        ({"instruction": "Add.", "output": 3}, "their column 'output' is not text but of the type int"),
    ],
)
def test_what_is_no_conversation(row: dict[str, Any], said: str) -> None:
    with pytest.raises(Unfit) as caught:
        messages_of(row, "auto")
    assert said in str(caught.value)


def test_malformed_rows_are_left_out_counted_and_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", talks(30) + [{"messages": TALK[:1]}] * 3 + [{"messages": TALK[1:]}, 7])
    with path.open("a") as file:
        file.write('{"messages": [\n')
    facts = read(path).facts
    assert facts["dropped"]["malformed"] == 6
    (warning,) = facts["warnings"]
    assert "3 because they do not end with an answer of the assistant (first: row 31 of" in warning
    assert "they are not JSON (first: row 36 of" in warning
    assert "they are no objects" in warning


def test_too_many_malformed_rows_end_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", talks(30) + [{"messages": TALK[:1]}] * 9)
    with pytest.raises(DataError, match=r"more than 8 rows of .*a\.jsonl .* row 31 of .*do not end") as caught:
        read(path, max_bad_rows=8)
    assert "--data.layout" in str(caught.value.remedy)
    with pytest.raises(DataError, match="more than 100 rows|their column|none of these"):
        read(write(tmp_path / "b.jsonl", [{"text": str(i)} for i in range(200)]))


def test_plain_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello.")
    with pytest.raises(DataError):
        read(tmp_path / "a.txt")


# What is learnt


def learnt(messages: list[dict[str, str]], tokenizer: Any, learn: Any = "all") -> list[str]:
    """The runs of tokens that are learnt, as text."""
    found = encode(messages, tokenizer, learn)
    runs: list[list[int]] = []
    before = False
    for token, trained in zip(found.input_ids, found.trained, strict=True):
        if trained:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = trained
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_and_their_ends_are_learnt_and_nothing_else(family: str) -> None:
    template, end, _ = FAMILIES[family]
    tokenizer = chat_tokenizer(template, end)
    answers = [m["content"] + end for m in TALK if m["role"] == "assistant"]
    assert [run.strip() for run in learnt(TALK, tokenizer)] == answers
    assert [run.strip() for run in learnt(TALK, tokenizer, "last")] == answers[-1:]
    whole = tokenizer.decode(encode(TALK, tokenizer).input_ids)
    assert whole == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.convert_ids_to_tokens(answer_end(tokenizer)) == end
    asked = tokenizer.decode(question("Who sings?", tokenizer))
    assert whole.startswith(asked)
    assert whole[len(asked) :].lstrip().startswith(TALK[1]["content"])


def test_a_template_that_forgets_earlier_answers() -> None:
    tokenizer = chat_tokenizer(FORGETFUL, "<eot>")
    with pytest.raises(Unfit, match=r"earlier turns otherwise .*--data\.learn last"):
        encode([TALK[0], {"role": "assistant", "content": "Hm. A bird."}, *TALK[2:]], tokenizer)
    assert learnt(TALK[:2], tokenizer) == ["A bird sings.<eot>"]


def test_templates_that_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        use_template(chat_tokenizer(None), None)
    bare = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ConfigError, match="ends no answer with a special token"):
        use_template(chat_tokenizer(bare), None)
    with pytest.raises(ConfigError, match="does not serve"):
        use_template(chat_tokenizer("{% for %}"), None)
    with pytest.raises(ConfigError, match="cannot be read"):
        use_template(chat_tokenizer(), tmp_path / "none.jinja")
    (tmp_path / "chat.jinja").write_text(CHATML)
    tokenizer = chat_tokenizer(None)
    use_template(tokenizer, tmp_path / "chat.jinja")
    assert tokenizer.chat_template == CHATML


def test_a_batch_learns_the_answers_alone(tmp_path: Path) -> None:
    data, tokenizer = prepared(write_chats(tmp_path / "chats.jsonl"))
    row = data.train[:3]
    batch = LanguageModeling(tokenizer, vocabulary=len(tokenizer)).collate(row, empty=False)
    for labels, ids, trained in zip(batch.labels.tolist(), row["input_ids"], row["trained"], strict=True):
        wanted = [token for token, mark in zip(ids, trained, strict=True) if mark]
        assert [label for label in labels if label != IGNORED] == wanted
        assert tokenizer.decode(wanted).endswith("<|im_end|>")
    facts = data.facts
    assert facts["learnt"]["train"] == sum(map(sum, data.train["trained"])) < facts["tokens"]["train"]
    answers = "".join(
        tokenizer.decode([t for t, m in zip(row["input_ids"][0], row["trained"][0], strict=True) if m]).split(
            "<|im_end|>"
        )
    )
    assert data.train[0]["bytes"] == len(answers.encode())


# Long ones


def test_long_conversations(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "chats.jsonl")
    whole, _ = prepared(path)
    lengths = whole.train["length"]
    room = sorted(lengths)[len(lengths) // 2]
    longer = sum(length > room for length in lengths)
    cut, _ = prepared(path, max_length=room)
    assert max(cut.train["length"]) == room
    assert cut.facts["cut"]["train"] == pytest.approx(longer / len(lengths))
    dropped, _ = prepared(path, max_length=room, too_long="drop")
    assert len(dropped.train) == len(lengths) - longer
    assert dropped.facts["dropped"]["too long"] >= longer
    assert any("too long" in warning for warning in dropped.facts["warnings"])
    split, _ = prepared(path, max_length=room, too_long="split")
    lost = whole.facts["learnt"]["train"] - split.facts["learnt"]["train"]
    assert len(split.train) > len(cut.train)
    assert lost >= 0
    assert max(split.train["length"]) <= room
    assert cut.facts["learnt"]["train"] < split.facts["learnt"]["train"] <= whole.facts["learnt"]["train"]


def test_an_answer_that_is_cut_off_is_counted(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} " + "blue " * 30}]}
        for i in range(40)
    ]
    data, _ = prepared(write(tmp_path / "a.jsonl", rows), max_length=24)
    assert data.facts["endless"]["train"] == len(data.train)


def test_nothing_within_reach(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{i} " + "blue " * 90}, {"role": "assistant", "content": "A"}]}
        for i in range(40)
    ]
    with pytest.raises(DataError, match=r"no conversations left .*without an answer within --data\.max_length"):
        prepared(write(tmp_path / "a.jsonl", rows), max_length=24)


def test_the_second_call_loads_the_first(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "chats.jsonl")
    one, _ = prepared(path)
    other, _ = prepared(path)
    assert one.fingerprint == other.fingerprint
    assert one.train["input_ids"] == other.train["input_ids"]
    assert prepared(path, learn="last")[0].fingerprint != one.fingerprint
