"""Trains the nano target from scratch: a byte-level BPE tokenizer, then a Llama of 5.8 M parameters.

Rows of 1024 tokens hold either conversations, one after the other, or windows of plain code. Positions begin anew with
every conversation, which is how transformers knows that none may attend to the one before it.

The standard library is small (some 5 M tokens in both forms), so the model could learn it by heart; a draft head
trained on the features of memorised text would then meet other features on new prompts. Hence dropout, weight decay,
and a stopping point chosen by the loss on the answers of held-out conversations.

Shapes: B rows, T tokens.
"""

import argparse
import copy
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

logger = logging.getLogger(__name__)

ROW_LENGTH = 1024
VOCAB_SIZE = 4096
MAX_WEIGHT_BYTES = 12_000_000
SPECIAL_TOKENS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<|system|>"]
# Words with one leading character, single digits, punctuation, line ends, and indentation as one piece.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>\\n' }}
        {%- generation %}
            {{- message['content'] + '<|end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


def read_rows(data_dir: Path, name: str) -> list[dict]:
    path = data_dir / f"{name}.jsonl"
    if not path.is_file():
        raise ValueError(f"`--data-dir` must hold {path.name}, got {data_dir}. stdlib_conversations.py writes it.")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        padding_side="left",
        model_max_length=2 * ROW_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, dropout: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        max_position_embeddings=2 * ROW_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )

    def drop(module: torch.nn.Module, _, output: Tensor) -> Tensor:
        return F.dropout(output, dropout, training=module.training)

    # Residual dropout, which the Llama architecture lacks; hooks leave the saved model a plain Llama.
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tensor]:
    """Token ids over positions, `(2, T)`, of every text."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.stack([torch.tensor(ids), torch.arange(len(ids))]) for ids in encoded]


def conversation_rows(documents: list[Tensor], generator: torch.Generator) -> Tensor:
    """Shuffled conversations, `(B, 2, T)`: each row begins with a whole one, its last one is cut at the row's end."""
    rows, row, length = [], [], 0
    for index in torch.randperm(len(documents), generator=generator).tolist():
        row.append(documents[index])
        length += documents[index].shape[1]
        if length >= ROW_LENGTH:
            rows.append(torch.cat(row, dim=1)[:, :ROW_LENGTH])
            row, length = [], 0
    return torch.stack(rows)


def code_rows(documents: list[Tensor], generator: torch.Generator) -> Tensor:
    """Windows of the shuffled files laid end to end, `(B, 2, T)`, from another random offset in every epoch."""
    order = torch.randperm(len(documents), generator=generator).tolist()
    stream = torch.cat([documents[index] for index in order], dim=1)
    offset = torch.randint(ROW_LENGTH, (1,), generator=generator).item()
    rows = stream[:, offset:].unfold(1, ROW_LENGTH, ROW_LENGTH).transpose(0, 1).clone()  # (B, 2, T)
    rows[:, 1] = torch.arange(ROW_LENGTH)
    return rows


def training_batches(chats: list[Tensor], code: list[Tensor], batch_rows: int, seed: int) -> Iterator[Tensor]:
    """Batches of `(batch_rows, 2, T)` without end; every epoch packs the documents anew."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.cat([conversation_rows(chats, generator), code_rows(code, generator)])
        rows = rows[torch.randperm(len(rows), generator=generator)]
        yield from rows[: len(rows) // batch_rows * batch_rows].split(batch_rows)


def encode_answers(tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> list[dict[str, Tensor]]:
    """Token ids and assistant mask of each conversation, cut to one row, the longest first."""
    encoded = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], return_dict=True, return_assistant_tokens_mask=True
    )
    documents = [
        {"input_ids": torch.tensor(ids[:ROW_LENGTH]), "assistant_mask": torch.tensor(mask[:ROW_LENGTH]).bool()}
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]
    return sorted(documents, key=lambda document: -len(document["input_ids"]))


@torch.inference_mode()
def answer_loss(model: LlamaForCausalLM, documents: list[dict[str, Tensor]], batch_size: int = 64) -> float:
    """Mean cross-entropy, in nats per token, over the answers' tokens; right padding needs no mask under causality."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(documents), batch_size):
        batch = documents[start : start + batch_size]
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence([document[key] for document in batch], batch_first=True).to(model.device)
            for key in ("input_ids", "assistant_mask")
        )
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model(ids).logits
        targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
        total += F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += mask[:, 1:].sum().item()
    model.train()
    return total / count


def build_optimizer(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=model.device.type == "cuda")


def train(
    model: LlamaForCausalLM, batches: Iterator[Tensor], num_steps: int, args: argparse.Namespace
) -> Iterator[tuple[int, float]]:
    """AdamW with warm-up and cosine; yields the step and the mean loss since the last yield, ten times in all."""
    optimizer = build_optimizer(model, args)
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(200, num_steps // 10), num_steps)
    device = model.device
    every = math.ceil(num_steps / 10)
    losses = torch.zeros((), device=device)
    for step in tqdm(range(1, num_steps + 1), mininterval=10):
        ids, position_ids = next(batches).to(device).unbind(dim=1)  # (B, T)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(ids, position_ids=position_ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses += loss.detach()
        if step % every == 0 or step == num_steps:
            yield step, losses.item() / ((step - 1) % every + 1)
            losses.zero_()


def save(model: LlamaForCausalLM, output_dir: Path) -> None:
    """Writes the model in bf16 beside `output_dir`'s files, then renames each into place."""
    temporary = output_dir / "checkpoint.tmp"
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(temporary)
    size = (temporary / "model.safetensors").stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise ValueError(f"The weights must take at most {MAX_WEIGHT_BYTES} bytes, got {size}.")
    for path in temporary.iterdir():
        os.replace(path, output_dir / path.name)
    temporary.rmdir()


def git_commit() -> str | None:
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict:
    return {
        "argv": sys.argv,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
    }


def write_json(record: dict, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="output folder of stdlib_conversations.py")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent, help="default: this folder")
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, help="stop early: for a trial run")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    chats, held_out, code = (read_rows(args.data_dir, name) for name in ("train", "heldout", "code_train"))

    turns = [message["content"] for row in chats for message in row["messages"]]
    tokenizer = train_tokenizer(turns + [row["text"] for row in code])
    tokenizer.save_pretrained(args.output_dir)
    conversations = tokenizer.apply_chat_template([row["messages"] for row in chats], tokenize=False)
    chat_documents = encode(tokenizer, conversations)
    code_documents = encode(tokenizer, [row["text"] + tokenizer.bos_token for row in code])
    chat_tokens, code_tokens = (sum(d.shape[1] for d in documents) for documents in (chat_documents, code_documents))
    batch_tokens = args.batch_rows * ROW_LENGTH
    num_steps = min(int(args.epochs * (chat_tokens + code_tokens)) // batch_tokens, args.max_steps or sys.maxsize)
    logger.info("%d conversation and %d code tokens, %d steps", chat_tokens, code_tokens, num_steps)

    model = build_model(tokenizer, args.dropout).to("cuda" if torch.cuda.is_available() else "cpu")
    held_out_answers = encode_answers(tokenizer, held_out)
    train_answers = encode_answers(tokenizer, chats[:: max(1, len(chats) // len(held_out))])
    batches = training_batches(chat_documents, code_documents, args.batch_rows, args.seed)
    history, start = [], time.perf_counter()
    for step, train_loss in train(model, batches, num_steps, args):
        losses = {
            "step": step,
            "train_loss": train_loss,
            "train_answer_loss": answer_loss(model, train_answers),
            "held_out_answer_loss": answer_loss(model, held_out_answers),
        }
        logger.info(" ".join(f"{key} {value:.4g}" for key, value in losses.items()))
        history.append(losses)
        best = min(history, key=lambda entry: entry["held_out_answer_loss"])
        if best is losses:
            save(model, args.output_dir)
        record = {
            **provenance(),
            "parameters": model.num_parameters(),
            "conversation_tokens": chat_tokens,
            "code_tokens": code_tokens,
            "tokens_seen": step * batch_tokens,
            "seconds": round(time.perf_counter() - start, 1),
            "best": best,
            "history": history,
        }
        write_json(record, args.output_dir / "training.json")


if __name__ == "__main__":
    main()
