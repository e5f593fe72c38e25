"""The smallest target that answers, some answers ending and some not, and the records of a directory."""

from pathlib import Path

import torch
from reference_ttt import tiny_target, tiny_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from eagle3_mla.training.answering import Decoding, TargetAnswerer
from eagle3_mla.training.conversations import Conversation

QUESTIONS = [
    [("user", "say abc"), ("assistant", "abc")],
    [("system", "be brief"), ("user", "count"), ("assistant", "1 2 3"), ("user", "more"), ("assistant", "4 5 6 7")],
    [("user", "repeat x x x x x x x x x"), ("assistant", "x")],
    [("user", "letters"), ("assistant", "a"), ("user", "again"), ("assistant", "b"), ("user", "go on")],
    [("user", "say nothing much, and slowly"), ("assistant", "much")],
    [("user", "why")],
    [("user", "count to ten"), ("assistant", "1")],
]


def answering_target(vocab_size: int) -> LlamaForCausalLM:
    """A random Llama that likes to end its answers (id 1) more than chance would have it."""
    target = tiny_target(vocab_size=vocab_size, eos_token_id=1, max_position_embeddings=256)
    with torch.no_grad():
        target.lm_head.weight[1] *= 6
    return target


def tiny_answerer(decoding: Decoding, batch_size: int = 3, **settings) -> TargetAnswerer:
    tokenizer = tiny_tokenizer()
    return TargetAnswerer(answering_target(len(tokenizer)), tokenizer, [1], decoding, batch_size, **settings)


def save_answering_target(directory: Path) -> Path:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    answering_target(len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def messages_of(turns: list[tuple[str, str]]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def conversation_of(turns: list[tuple[str, str]], **settings) -> Conversation:
    return Conversation(messages_of(turns), **settings)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a result by its name, but for the one that holds times."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "provenance.json"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
