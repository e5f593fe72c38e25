"""What the benchmarks of acceptance share: a pair, held-out prompts, the shape of drafts, results that are kept."""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from eagle3_mla.evaluation.prompts import render
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel
from eagle3_mla.training.files import replace_file
from eagle3_mla.training.release import code_commit

Shape = tuple[int, int, int]  # nodes, top-k, depth
CHAIN: Shape = (7, 1, 7)


def make_parser(description: str, output: str, num_samples: int, max_new_tokens: int) -> argparse.ArgumentParser:
    """A parser of what all of them are told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL of held-out conversations")
    parser.add_argument("--num-samples", type=int, default=num_samples, help="prompts of each source")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="of each text")
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def load_models(arguments: argparse.Namespace, device: str = "cpu") -> tuple[PreTrainedModel, Eagle3MLADraftModel]:
    """Target and draft, in fp32."""
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32)
    draft = Eagle3MLADraftModel.from_pretrained(arguments.draft, dtype=torch.float32)
    return target.to(device).eval(), draft.to(device).eval()


def read_chats(path: Path) -> dict[str, list[list[dict]]]:
    """The conversations of each source."""
    chats = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        chats[row.get("source", "prompts")].append(row.get("conversations") or row["messages"])
    return chats


def read_prompts(path: Path, tokenizer, num_samples: int) -> dict[str, list[torch.Tensor]]:
    """At most `num_samples` prompts of each source, `(1, T)` each, cut before their last answer."""
    return {
        source: [render(chat[:-1], tokenizer) for chat in chats[:num_samples]]
        for source, chats in read_chats(path).items()
    }


def set_shape(draft: Eagle3MLADraftModel, shape: Shape) -> None:
    names = ("num_assistant_tokens", "assistant_tree_top_k", "assistant_tree_depth")
    for name, value in zip(names, shape, strict=True):
        setattr(draft.generation_config, name, value)


def generate(target, input_ids: torch.Tensor, do_sample: bool, max_new_tokens: int, draft=None) -> list[int]:
    """One text, greedy or at temperature 1 with always the same seed."""
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0} if do_sample else {"do_sample": False}
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return target.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, assistant_model=draft)[0].tolist()


def request_of(arguments: argparse.Namespace, *varying: str) -> dict[str, str]:
    """What results depend on: the commit, and all arguments but `varying` and where results go."""
    varying = {"work_dir", "output", *varying}
    request = {name: str(value) for name, value in vars(arguments).items() if name not in varying}
    return request | {"commit": code_commit()}


class Notebook:
    """
    Results that were measured already, in a file that is complete after each of them.

    Args:
        path (`Path`): The file.
        request (`dict`): What all results depend on.

    Raises:
        RuntimeError: If the file was begun for another request: a table would then not say how it was made.
    """

    def __init__(self, path: Path, request: dict):
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {"request": request, "results": {}}
        if self.content["request"] != request:
            raise RuntimeError(f"{path} was begun for {self.content['request']}. Give another --work-dir.")

    def recall(self, name: str, measure: Callable):
        """The result of that name, measured if there is none yet."""
        results = self.content["results"]
        if name not in results:
            results[name] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps(self.content))
        return results[name]
