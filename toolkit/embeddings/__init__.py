"""Matrices of word embeddings for new models, out of what others have learnt: `transfer`, `load_embedding`.

A target is a vocabulary with its tokenizer (`targets`); a source gives vectors for words and pieces of words, from a
model's input embedding or a file (`table`, `files`) or from what a model makes of words (`contexts`); `transfer`
brings them together, and `folder` writes and reads the result.
"""

from toolkit.embeddings.folder import load_embedding as load_embedding
from toolkit.embeddings.folder import word_vectors as word_vectors
from toolkit.embeddings.folder import write_matrix as write_matrix
from toolkit.embeddings.sources import vectors_for as vectors_for
from toolkit.embeddings.targets import Target as Target
from toolkit.embeddings.targets import load_target as load_target
from toolkit.embeddings.transfer import Matrix as Matrix
from toolkit.embeddings.transfer import nearest_words as nearest_words
from toolkit.embeddings.transfer import reduced as reduced
from toolkit.embeddings.transfer import transfer as transfer
