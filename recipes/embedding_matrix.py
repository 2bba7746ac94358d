"""Make a matrix of word embeddings for a new model out of what others have learnt.

$ python recipes/embedding_matrix.py
$ python recipes/embedding_matrix.py --vocabulary.words words.txt --vectors.name glove.6B.100d.txt
$ python recipes/embedding_matrix.py --vocabulary.tokenizer my-model --vectors.name sample:e5-multilingual
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.config import MatrixConfig, VectorsConfig, VocabularyConfig
from toolkit.embeddings import load_embedding, load_target, nearest_words, reduced, transfer, vectors_for, write_matrix
from toolkit.embeddings.screen import Screen
from toolkit.embeddings.transfer import frequent_words
from toolkit.start import start


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    vocabulary: VocabularyConfig = VocabularyConfig()
    vectors: VectorsConfig = VectorsConfig()
    matrix: MatrixConfig = MatrixConfig()


def main(config: Config) -> None:
    """The whole job."""
    settings = config.matrix
    with Screen() as screen:
        target = load_target(config.vocabulary)
        source = vectors_for(target, config.vectors, screen.progress)
        matrix = transfer(target, source, folds=settings.fold, composes=settings.compose, seed=settings.seed)
        if settings.dimension:
            matrix = reduced(matrix, target.tokenizer.pad_token_id, settings.dimension)
        words = settings.neighbours or frequent_words(target, matrix)
        neighbours = nearest_words(target, matrix, words)
        facts = write_matrix(settings.output, target, matrix, neighbours)
        screen.matrix(settings.output, facts, load_embedding(settings.output))


if __name__ == "__main__":
    start(main, Config, __doc__ or "", alone=True)
