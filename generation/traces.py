"""Traces: the target's hidden states and attentions behind every emitted token, for those who ask for them.

Plain generation has them from one forward per token, of one position that sees the text so far. Here a forward reads a
tree, and the position is the node after which the token was emitted: its states are the node's own, its attentions
those over the committed tokens and the node's path, in this order. Of a sliding-window layer plain generation shows
the window alone; a tree sees the windows of all its nodes.

Shapes: B batch, T tokens, N nodes, P nodes on a path, H heads, K keys of the forward, D the target's hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from .branching import layer_kinds


@dataclass
class Traces:
    """
    One entry per emitted token: what the target returned, a tuple over layers.

    Args:
        hidden_states (`tuple`, *optional*): Entries of `(B, 1, D)`, the prompt's `(B, T, D)`; `None` if not wanted.
        attentions (`tuple`, *optional*): Entries of `(B, H, 1, keys)`, the prompt's `(B, H, T, T)`; `None` if not
            wanted. Where the target's attention keeps no weights, they hold what it returns instead.
    """

    hidden_states: tuple | None
    attentions: tuple | None

    @classmethod
    def wanted_by(cls, generation_config: GenerationConfig) -> "Traces":
        """Empty ones, `None` where the caller does not ask for them."""
        is_returned = generation_config.return_dict_in_generate
        return cls(
            hidden_states=() if is_returned and generation_config.output_hidden_states else None,
            attentions=() if is_returned and generation_config.output_attentions else None,
        )

    @property
    def are_wanted(self) -> bool:
        return self.hidden_states is not None or self.attentions is not None

    def add_prompt(self, outputs) -> None:
        """Adds the entry of the first token: the target's output of the prompt as it is."""
        if self.hidden_states is not None:
            self.hidden_states += (outputs.hidden_states,)
        if self.attentions is not None:
            self.attentions += (outputs.attentions,)

    def add_path(self, target: PreTrainedModel, outputs, path: Tensor) -> None:
        """
        Adds the entries of the tokens of a round; what the target returned of other nodes is not kept.

        Args:
            target (`PreTrainedModel`): The target.
            outputs (`ModelOutput`): Of its forward over the trees.
            path (`torch.LongTensor` of shape `(B, P)`): The nodes after which all sequences emitted a token.
        """
        if self.hidden_states is not None:
            self.hidden_states += entries(outputs.hidden_states, path, lambda _, states, path: state_of(states, path))
        if self.attentions is not None:
            seen = windows(target, outputs.past_key_values)
            self.attentions += entries(
                outputs.attentions, path, lambda layer, weights, path: attention_of(weights, path, seen[layer])
            )


def entries(layers: tuple | None, path: Tensor, of_node: Callable[[int, Tensor, Tensor], Tensor]) -> tuple:
    """
    The entries of the tokens after each node of a path.

    Args:
        layers (`tuple`, *optional*): What the target returned, for each layer a tensor or `None`, which then stands in
            the entries too.
        path (`torch.LongTensor` of shape `(B, P)`): The nodes.
        of_node (`Callable`): From a layer's index, its tensor and the path up to a node to what belongs to the node.
    """
    paths = [path[:, : depth + 1] for depth in range(path.shape[1])]
    if layers is None:
        return (None,) * len(paths)
    return tuple(
        tuple(each if each is None else of_node(layer, each, path) for layer, each in enumerate(layers))
        for path in paths
    )


def state_of(states: Tensor, path: Tensor) -> Tensor:
    """The states of the last node of a path, `(B, N, D)` -> `(B, 1, D)`."""
    path = path.to(states.device)
    return states[torch.arange(len(path), device=path.device), path[:, -1], None]


def attention_of(weights: Tensor, path: Tensor, window: int | None) -> Tensor:
    """
    What the last node of a path gives to the committed tokens and to the path, `(B, H, N, K)` -> `(B, H, 1, keys)`.

    Args:
        weights (`torch.Tensor` of shape `(B, H, N, K)`): A layer's attentions; the last N keys are the nodes.
        path (`torch.LongTensor` of shape `(B, P)`): The path up to the node.
        window (`int`, *optional*): How many keys plain generation shows at most; `None`: all.
    """
    batch_size, num_heads, num_nodes, num_keys = weights.shape
    num_committed, path = num_keys - num_nodes, path.to(weights.device)
    committed = torch.arange(num_committed, device=path.device).expand(batch_size, -1)
    keys = torch.cat([committed, num_committed + path], dim=1)
    keys = keys if window is None else keys[:, -window:]
    of_last = weights[torch.arange(batch_size, device=path.device), :, path[:, -1]]  # (B, H, K)
    return of_last.gather(2, keys[:, None].expand(-1, num_heads, -1))[:, :, None]


def windows(target: PreTrainedModel, cache: Cache) -> list[int | None]:
    """How many keys each of the target's layers sees in plain generation at most; `None`: all that there are."""
    kinds = layer_kinds(target.config.get_text_config(decoder=True))
    layers = [cache.layers[kinds.index(kind)] for kind in kinds]
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]
