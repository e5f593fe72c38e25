"""Slow, obvious counterparts of the training unroll, and the smallest models and data that training runs on."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.training.ttt import TTTDraftModel

VOCAB_SIZE = 40
DRAFT_VOCAB_SIZE = 24

ATTENTION = {
    "mla-R0": {"attention_type": "mla", "mla_latent_dim": 12},
    "mla-R4": {"attention_type": "mla", "mla_latent_dim": 12, "mla_rope_dim": 4, "mla_kv_norm_type": "rms_norm"},
    "mla-R6-q-lora": {"attention_type": "mla", "mla_latent_dim": 8, "mla_rope_dim": 6, "mla_q_lora_rank": 10},
    "gqa": {"attention_type": "gqa"},
}

# Of a target of any family.
TARGET_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}

CHAT_TEMPLATE = """{% for message in messages %}{{ '<' + message['role'] + '>' }}\
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<end>' }}{% endgeneration %}\
{% else %}{{ message['content'] + '<end>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""

CONVERSATIONS = [
    [("user", "say abc"), ("assistant", "abc abc abc")],
    [("system", "be brief"), ("user", "count"), ("assistant", "1 2 3"), ("user", "more"), ("assistant", "4 5 6 7")],
    [("user", "repeat x"), ("assistant", "x x x x x x x x")],
    [("user", "say the letters"), ("assistant", "a b c d e f")],
    [("user", "say nothing much"), ("assistant", "much")],
]


def tiny_config(**overrides) -> Eagle3MLAConfig:
    """A draft of a few hundred weights."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "draft_vocab_size": DRAFT_VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "target_num_hidden_layers": 6,
        "initializer_range": 0.3,
        "attn_implementation": "sdpa",
    }
    return Eagle3MLAConfig(**fields | overrides)


def tiny_draft(**overrides) -> TTTDraftModel:
    """The draft of `tiny_config` in fp64, with a draft vocabulary that is neither a prefix nor contiguous."""
    torch.manual_seed(0)
    draft = TTTDraftModel(tiny_config(**overrides)).double()
    draft.set_draft_vocabulary(torch.randperm(VOCAB_SIZE)[:DRAFT_VOCAB_SIZE].sort().values)
    return draft


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose chat template marks what the assistant says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<pad>", "<end>", "<user>", "<assistant>", "<system>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special_tokens, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text for turns in CONVERSATIONS for _, text in turns], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )


def tiny_target(vocab_size: int = VOCAB_SIZE, **overrides) -> LlamaForCausalLM:
    """A random Llama of six layers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TARGET_SIZES | {"vocab_size": vocab_size} | overrides)).eval()


def save_tiny_target(directory: Path) -> Path:
    """The tiny target with the tiny tokenizer, as a checkpoint directory."""
    tokenizer = tiny_tokenizer()
    tiny_target(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_conversations(path: Path, conversations=None) -> Path:
    """A JSONL file with one `messages` row per conversation."""
    conversations = CONVERSATIONS if conversations is None else conversations
    rows = [[{"role": role, "content": content} for role, content in turns] for turns in conversations]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows), encoding="utf-8")
    return path


class Documents:
    """
    A batch of random tokens and states in fp64, laid out by `document_ids`, with a linear target head.

    The same seed gives a document the same content wherever it lies, so that layouts can be compared.

    Args:
        draft (`TTTDraftModel`): Whose sizes to use.
        layout (`list[list[tuple[int, int, int]]]`): For each row of the batch its documents as (content seed, number
            of tokens, number of prompt tokens); seed 0 is padding.
    """

    def __init__(self, draft: TTTDraftModel, layout: list[list[tuple[int, int, int]]]):
        rows = [[self._document(draft, index, *spec) for index, spec in enumerate(row)] for row in layout]
        joined = {name: torch.stack([torch.cat([part[name] for part in row]) for row in rows]) for name in rows[0][0]}
        self.document_ids, self.loss_mask = joined["document_ids"], joined["loss_mask"]
        self.input_ids, self.inputs_embeds = joined["input_ids"], joined["inputs_embeds"]
        self.aux_hidden_states, self.last_hidden_states = joined["aux_hidden_states"], joined["last_hidden_states"]
        sizes = draft.config.vocab_size, draft.config.target_hidden_size
        self.head = torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def target_logits(self, states: Tensor) -> Tensor:
        return states @ self.head.T

    def unroll(self, draft: TTTDraftModel, num_ttt_steps: int):
        arguments = (self.inputs_embeds, self.aux_hidden_states, self.loss_mask, self.document_ids)
        return draft.unroll(*arguments, num_ttt_steps)

    def run(self, draft: TTTDraftModel, step_weights: list[float], **kwargs):
        return draft(
            input_ids=self.input_ids,
            inputs_embeds=self.inputs_embeds,
            aux_hidden_states=self.aux_hidden_states,
            last_hidden_states=self.last_hidden_states,
            target_logits=self.target_logits,
            loss_mask=self.loss_mask,
            document_ids=self.document_ids,
            step_weights=torch.tensor(step_weights, dtype=torch.float64),
            **kwargs,
        )

    @staticmethod
    def _document(draft: TTTDraftModel, index: int, seed: int, num_tokens: int, num_prompt: int) -> dict[str, Tensor]:
        config = draft.config
        generator = torch.Generator().manual_seed(seed)

        def normal(width: int) -> Tensor:
            return torch.randn(num_tokens, width, dtype=torch.float64, generator=generator)

        return {
            "document_ids": torch.full((num_tokens,), 0 if seed == 0 else index + 1),
            "loss_mask": (torch.arange(num_tokens) >= num_prompt).long() * (seed != 0),
            "input_ids": torch.randint(config.vocab_size, (num_tokens,), generator=generator),
            "inputs_embeds": normal(config.hidden_size),
            "aux_hidden_states": normal(3 * config.target_hidden_size),
            "last_hidden_states": normal(config.target_hidden_size),
        }


def decode_one_row(draft, inputs_embeds: Tensor, aux_hidden_states: Tensor, row: int, num_steps: int) -> Tensor:
    """Logits `(num_steps, Vd)` of a draft that decodes with its cache after the target committed token `row + 1`.

    The cache first takes every row up to `row` from true target states; then each step feeds back its own state with
    the next token of the text, one position at a time. `inputs_embeds (T, D)` and `aux_hidden_states (T, 3 * Dt)` hold
    one document without padding.
    """
    cache = DynamicCache()
    output = draft(
        inputs_embeds=inputs_embeds[None, 1 : row + 2],
        aux_hidden_states=aux_hidden_states[None, : row + 1],
        position_ids=torch.arange(row + 1)[None],
        past_key_values=cache,
    )
    logits = [output.logits[0, -1]]
    for ttt_step in range(1, num_steps):
        token = row + 1 + ttt_step
        output = draft(
            inputs_embeds=inputs_embeds[None, token : token + 1],
            fused_states=output.states[:, -1:],
            position_ids=torch.tensor([[row + ttt_step]]),
            past_key_values=cache,
        )
        logits.append(output.logits[0, -1])
    return torch.stack(logits)


def visited_pairs(loss_mask: list[int], num_ttt_steps: int) -> set[tuple[int, int]]:
    """(row, step) pairs that chain decoding visits in one document, by replaying every round it could make.

    A round begins when the target has committed token `root`, produced by the assistant, after a row `root - 1` whose
    state it knows. The draft then proposes tokens one by one until the assistant's turn is over.
    """
    pairs = set()
    for root in range(1, len(loss_mask)):
        if not loss_mask[root]:
            continue
        for ttt_step in range(num_ttt_steps):
            proposed = root + 1 + ttt_step
            if proposed >= len(loss_mask) or not loss_mask[proposed]:
                break
            pairs.add((root - 1, ttt_step))
    return pairs
