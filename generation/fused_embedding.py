"""Embeddings picked by indexing: PyTorch has a faster kernel for that than for `nn.Embedding`, where rows are few."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn


@contextmanager
def indexed_embeddings(*embeddings: nn.Module | None) -> Iterator[None]:
    """While the context is open, those of `embeddings` that are plain tables are indexed."""
    with ExitStack() as stack:
        for embedding in embeddings:
            # Others scale their rows, or fetch weights from elsewhere.
            if type(embedding) is nn.Embedding and embedding.max_norm is None and "forward" not in vars(embedding):
                embedding.forward = partial(rows_of, embedding)
                stack.callback(delattr, embedding, "forward")
        yield


def rows_of(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """The forward of a plain table, `(...)` -> `(..., D)`."""
    return embedding.weight[ids]
