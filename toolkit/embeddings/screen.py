"""What a matrix is, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from toolkit.embeddings.transfer import KINDS
from toolkit.report import Console


class Screen:
    """Progress, and then the figures."""

    def __init__(self) -> None:
        self._console = Console()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._console.close()

    def progress(self, title: str, done: int, total: int) -> None:
        """So much of it is done."""
        if total:
            self._console.evaluation(title, min(done, total), total)

    def matrix(self, folder: Path, facts: Mapping[str, Any], embedding: nn.Embedding) -> None:
        """Coverage, neighbours, and where it lies.

        Args:
            folder: of the matrix.
            facts: as `write_matrix` gives them.
            embedding: as it was loaded again.
        """
        shares = facts.get("by_occurrence")
        rows = [
            [
                kind,
                f"{facts['by_kind'][kind]:,}",
                f"{facts['by_kind'][kind] / facts['tokens']:.1%}",
                *([f"{shares[kind]:.1%}"] if shares else []),
            ]
            for kind in KINDS
        ]
        header = ["rows", "tokens", "share", *(["of all occurrences"] if shares else [])]
        self._console.table(f"{facts['vocabulary']} out of {facts['source']}", header, rows)
        if "variance_kept" in facts:
            self._console.note(f"\n{facts['features']} components keep {facts['variance_kept']:.1%} of the variance")
        near = [
            [word, "  ".join(f"{other} {near:.2f}" for other, near in others)]
            for word, others in facts["neighbours"].items()
        ]
        self._console.note("")
        self._console.table("nearest neighbours", ["word", ""], near)
        self._console.note(
            f"\n{folder}: {embedding.num_embeddings:,} × {embedding.embedding_dim}, "
            f"padding {embedding.padding_idx}; toolkit.embeddings.load_embedding reads it"
        )
