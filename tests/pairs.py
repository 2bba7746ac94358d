"""Small pairs of texts that a small network can learn, and jobs with them."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = {
    "red": "红",
    "blue": "蓝",
    "green": "绿",
    "cat": "猫",
    "dog": "狗",
    "bird": "鸟",
    "sees": "看见",
    "eats": "吃",
    "finds": "找到",
    "the": "这只",
}


def write_pairs(path: Path, count: int = 240) -> Path:
    """English sentences with a Chinese one for each, word by word."""
    rng = random.Random(0)
    adjectives, nouns, verbs = list(WORDS)[:3], list(WORDS)[3:6], list(WORDS)[6:9]
    found: dict[str, str] = {}
    while len(found) < count:
        words = ["the", rng.choice(adjectives), rng.choice(nouns), rng.choice(verbs), "the", rng.choice(nouns)]
        words = words[: rng.choice([3, 6])]
        if rng.random() < 0.5:
            words.insert(1, rng.choice(adjectives))
        found[" ".join(words)] = "".join(WORDS[word] for word in words)
    rows = [{"source": source, "target": target} for source, target in found.items()]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
