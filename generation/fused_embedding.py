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
            if is_table(embedding):
                embedding.forward = partial(rows_of, embedding)
                stack.callback(delattr, embedding, "forward")
        yield


def is_table(embedding: nn.Module | None) -> bool:
    """Whether rows of the weights are all there is: others scale them, fetch them from elsewhere, or are quantised."""
    if type(embedding) is not nn.Embedding or type(embedding.weight) is not nn.Parameter:
        return False
    return embedding.max_norm is None and "forward" not in vars(embedding)


def rows_of(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """The forward of a plain table, `(...)` -> `(..., D)`."""
    return embedding.weight[ids]
