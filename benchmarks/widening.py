"""Widening of trained weights that leaves the function as it is: where a small model's numbers go in a large one.

A `Layout` says what each entry of a vector of the large model holds: an entry of the small model's vector, always
zero, or noise, which nothing reads. A matrix maps a layout to a layout, and that decides its entries:

    row \\ column     entry        zero       noise
    entry            the weight   random     0
    zero             0            random     0
    noise            random       random     random

"Random" is what the matrix was made with; the other entries are written in place, on its device. An entry that the
columns hold several times is read as their mean.

Residual streams are padded with zeros, D -> D', which makes their mean square smaller by D / D': the norms that read
them take `sqrt(D / D')` times the weight and `D / D'` times the epsilon. A draft has one epsilon for all norms. What
enters its norms of latents and compressed queries is tiled instead, so that mean and variance stay, and multiplied by
`sqrt(D / D')` to suit the epsilon. Queries are multiplied by `sqrt(d' / d)`, which the attention divides by. A used
RoPE pair i goes to `i d' / d`, where the same base gives the same frequency, bit for bit.

In exact arithmetic nothing changes. The factors are powers of two where D' / D and d' / d are powers of four, and
means are exact over powers of two; any other factor rounds the weights once more, in bf16 by up to 0.4 % each. Kernels
of another width also sum in another order.

Shapes: D hidden, I intermediate, H heads, G key-value heads, d head width, R decoupled RoPE, C latent; D' of the twin.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ZERO, NOISE = -1, -2


@dataclass(frozen=True)
class Layout:
    """
    What the entries of a vector of the large model hold.

    Args:
        entries (`torch.LongTensor` of shape `(n',)`):
            The place in the small model's vector, `ZERO` for what is always zero, `NOISE` for what nothing reads.
    """

    entries: Tensor

    @property
    def used(self) -> Tensor:
        """Places of the large vector that hold an entry of the small one."""
        return (self.entries >= 0).nonzero().flatten()

    @property
    def sources(self) -> Tensor:
        """The small vector's place for each of `used`."""
        return self.entries[self.used]

    @property
    def copies(self) -> Tensor:
        """For each of `used`, how many places hold the same entry."""
        return self.sources.bincount()[self.sources]


def padded(size: int, twin_size: int) -> Layout:
    """The small vector, then zeros."""
    entries = torch.arange(twin_size)
    return Layout(entries.masked_fill(entries >= size, ZERO))


def tiled(size: int, twin_size: int) -> Layout:
    """The small vector again and again."""
    return Layout(torch.arange(twin_size) % size)


def side_by_side(*layouts: Layout) -> Layout:
    """The concatenation of vectors whose small counterparts are concatenated."""
    entries, offset = [], 0
    for layout in layouts:
        entries.append(torch.where(layout.entries >= 0, layout.entries + offset, layout.entries))
        offset += int(layout.entries.max()) + 1
    return Layout(torch.cat(entries))


def rotated(width: int, twin_width: int) -> Layout:
    """A head turned by RoPE in halves, `twin_width` a multiple of `width`; pairs between the used ones are zero."""
    step = twin_width // width
    entries = torch.full((2, twin_width // 2), ZERO)
    entries[:, ::step] = torch.arange(width).view(2, -1)
    return Layout(entries.flatten())


@dataclass(frozen=True)
class Neurons:
    """
    The layouts of a gated MLP. Half of the added neurons are silenced by `up_proj`, half by `down_proj`, so that
    neither matrix is all zeros.
    """

    gate: Layout
    up: Layout
    product: Layout


def neurons(size: int, twin_size: int) -> Neurons:
    """`size` is 0 for an added layer."""
    entries = torch.arange(twin_size)
    is_added = entries >= size
    up = entries.masked_fill(is_added, NOISE).masked_fill(is_added & (entries % 2 == 0), ZERO)
    return Neurons(gate=Layout(entries.masked_fill(is_added, NOISE)), up=Layout(up), product=Layout(up))


@dataclass(frozen=True)
class HeadPlaces:
    """
    Which heads of the large model are those of the small one; `NOISE` for an added one.

    A key-value head whose queries are too many for one group of the large model is there several times.

    Args:
        queries (`list[int]`): The small query head of each of the H' query heads.
        keys (`list[int]`): The small key-value head of each of the G' key-value heads.
    """

    queries: list[int]
    keys: list[int]

    def owner(self, query: int) -> int:
        """The large model's key-value head that a query head reads."""
        return query // (len(self.queries) // len(self.keys))


def place_heads(num_queries: int, num_keys: int, twin_num_queries: int, twin_num_keys: int) -> HeadPlaces:
    """
    Raises:
        ValueError: If the small heads do not fit.
    """
    group, twin_group = num_queries // num_keys, twin_num_queries // twin_num_keys
    copies = math.ceil(group / twin_group)
    if twin_num_keys < num_keys * copies:
        raise ValueError(
            f"`num_key_value_heads` must be at least {num_keys * copies} with {twin_group} query heads each, to hold "
            f"{num_queries} query heads and {num_keys} key-value heads, got {twin_num_keys}."
        )
    keys = [key // copies if key < num_keys * copies else NOISE for key in range(twin_num_keys)]
    queries = [NOISE] * twin_num_queries
    for query in range(num_queries):
        key, index = divmod(query, group)
        queries[key * copies * twin_group + index] = query
    return HeadPlaces(queries, keys)


def added_heads(twin_num_queries: int, twin_num_keys: int) -> HeadPlaces:
    """Those of a layer that the small model has not."""
    return HeadPlaces([NOISE] * twin_num_queries, [NOISE] * twin_num_keys)


def query_layout(places: HeadPlaces, head: Layout) -> Layout:
    """All queries `(H' d')`; what the keys have no entry for is noise."""
    noisy = Layout(head.entries.masked_fill(head.entries < 0, NOISE))
    return heads_layout((source, noisy, NOISE) for source in places.queries)


def key_layout(places: HeadPlaces, head: Layout) -> Layout:
    """All keys `(G' d')`, zero beside the entries of a used head."""
    return heads_layout((source, head, NOISE) for source in places.keys)


def value_layout(places: HeadPlaces, head: Layout) -> Layout:
    """All values `(G' d')`. Every second added head is silenced here, the others by `o_proj`."""
    return heads_layout((source, head, added_value(key)) for key, source in enumerate(places.keys))


def output_layout(places: HeadPlaces, head: Layout) -> Layout:
    """What `o_proj` reads, `(H' d')`: values as the query heads mix them, a mix by an added query head being noise."""
    noisy = Layout(head.entries.masked_fill(head.entries >= 0, NOISE))
    blocks = []
    for query, source in enumerate(places.queries):
        key = places.owner(query)
        is_added_to_used = source == NOISE and places.keys[key] != NOISE
        blocks.append((0, noisy, NOISE) if is_added_to_used else (source, head, added_value(key)))
    return heads_layout(blocks)


def added_value(key: int) -> int:
    """What the values of an added key-value head are."""
    return ZERO if key % 2 == 0 else NOISE


def heads_layout(blocks: Iterable[tuple[int, Layout, int]]) -> Layout:
    """Heads side by side; each is a small head's number, its layout, and what all of it is where it is added."""
    entries = []
    for source, head, otherwise in blocks:
        width = int(head.entries.max()) + 1
        shifted = torch.where(head.entries >= 0, head.entries + source * width, head.entries)
        entries.append(torch.full_like(shifted, otherwise) if source == NOISE else shifted)
    return Layout(torch.cat(entries))


@torch.no_grad()
def write_matrix(weight: Tensor, small: Tensor | None, rows: Layout, columns: Layout, scale: float = 1.0) -> None:
    """
    Writes the small matrix, times `scale`, and the zeros that keep its function.

    Args:
        weight (`torch.Tensor` of shape `(out', in')`): The large matrix, made with random values.
        small (`torch.Tensor` of shape `(out, in)`, *optional*): `None` in an added layer.
        rows (`Layout`), columns (`Layout`): Of what the matrix writes and of what it reads.

    **Effects**: changes `weight` in place.
    """
    device = weight.device
    must_be_zero = (rows.entries != NOISE).to(device)[:, None] & (columns.entries != ZERO).to(device)
    weight.masked_fill_(must_be_zero, 0)
    if small is None:
        return
    block = small.to(device, torch.promote_types(small.dtype, torch.float32))
    block = block[rows.sources.to(device)][:, columns.sources.to(device)] * scale / columns.copies.to(device)
    weight[rows.used.to(device)[:, None], columns.used.to(device)] = block.to(weight.dtype)


@torch.no_grad()
def write_vector(vector: Tensor, small: Tensor | None, layout: Layout, scale: float = 1.0) -> None:
    """As `write_matrix` for a bias or the weights of a norm. **Effects**: changes `vector` in place."""
    device = vector.device
    vector.masked_fill_((layout.entries != NOISE).to(device), 0)
    if small is None:
        return
    values = small.to(device, torch.promote_types(small.dtype, torch.float32))[layout.sources.to(device)] * scale
    vector[layout.used.to(device)] = values.to(vector.dtype)


def write_linear(
    linear: nn.Linear, small: nn.Linear | None, rows: Layout, columns: Layout, scale: float = 1.0
) -> None:
    """Weight and bias of a projection."""
    write_matrix(linear.weight, None if small is None else small.weight, rows, columns, scale)
    if linear.bias is not None:
        write_vector(linear.bias, None if small is None else small.bias, rows, scale)


@torch.no_grad()
def write_embedding(embedding: nn.Embedding, small: nn.Embedding, hidden: Layout) -> None:
    """Token embeddings `(V, D')`, a matrix from the vocabulary to the residual stream."""
    vocabulary = padded(small.num_embeddings, embedding.num_embeddings)
    write_matrix(embedding.weight.T, small.weight.T, rows=hidden, columns=vocabulary)


def write_head(head: nn.Linear, small: nn.Linear, hidden: Layout) -> None:
    """An output head `(V, D')`."""
    write_linear(head, small, padded(small.out_features, head.out_features), hidden)


def write_norm(norm: nn.Module, small: nn.Module, layout: Layout) -> None:
    """A norm over a padded or a tiled vector."""
    write_vector(norm.weight, small.weight, layout, norm_factor(layout))
    if getattr(norm, "bias", None) is not None:
        write_vector(norm.bias, small.bias, layout)


def norm_factor(layout: Layout) -> float:
    """`sqrt(D / D')` of a padded vector, 1 of a tiled one: what padding multiplies the root mean square by."""
    return math.sqrt(len(layout.used) / len(layout.entries))
