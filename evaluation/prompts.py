"""Prompts of an evaluation: the part of each conversation that comes before its last answer.

Shapes: T prompt tokens.
"""

import logging
from dataclasses import dataclass

from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Requests that any chat model understands, in the form that the embedded nano target was trained on.
BUILT_IN_REQUESTS = (
    "Write the Python function `is_palindrome(text)`.\n\nReturn True if text reads the same in both directions.",
    "Write the Python function `count_words(path)`.\n\nReturn the number of words in the file at path.",
    "Write the Python function `flatten(items)`.\n\nYield the elements of a nested list one after the other.",
    "Write the Python function `parse_version(text)`.\n\nReturn a tuple of integers for a string such as '3.11.7'.",
    "Write the Python method `__repr__(self)` of the class `Point`.",
    "Write the Python method `close(self)` of the class `Connection`.\n\nClose the socket and forget it.",
    "Write the Python function `gcd(a, b)`.\n\nReturn the greatest common divisor of a and b.",
    "Write the Python method `pop(self, key, default=None)` of the class `Cache`.\n\nRemove key and return its value.",
    "Write the Python function `merge(left, right)`.\n\nReturn one sorted list of the elements of two sorted lists.",
    "Write the Python function `main(argv=None)`.\n\nParse the command line and print each file's size.",
)


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for `generate()`.

    Args:
        name (`str`): The conversation's id, or its line number.
        input_ids (`torch.Tensor` of shape `(1, T)`): The rendered conversation up to where the answer begins.
    """

    name: str
    input_ids: Tensor


def messages_before_last_answer(messages: list[dict]) -> list[dict]:
    """Everything before the last assistant turn; all of `messages` where there is none."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1]] if answers else messages


def choose_evenly(rows: list, num_samples: int) -> list:
    """At most `num_samples` rows at equal distances, so that neighbours of one source do not crowd out the others."""
    count = min(num_samples, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def built_in_conversations() -> list[dict]:
    return [
        {"id": f"built-in-{number}", "messages": [{"role": "user", "content": request}]}
        for number, request in enumerate(BUILT_IN_REQUESTS, start=1)
    ]


def render(messages: list[dict], tokenizer: PreTrainedTokenizerBase, tools: list[dict] | None = None) -> Tensor:
    """Token ids `(1, T)` of `messages` and the beginning of an answer."""
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        raise ValueError(f"The target's chat template refuses a conversation: {error}.") from None
    return encoded["input_ids"]


def render_prompts(rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> list[Prompt]:
    """Applies the target's chat template to each row's messages before its last answer.

    Args:
        rows (`list[dict]`): Conversations with `messages` and, *optional*, `id` and `tools`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        max_prompt_tokens (`int`): Longer prompts are left out, and the log says how many.

    Returns:
        `list[Prompt]`: In the order of `rows`.

    Raises:
        ValueError: If the tokenizer has no chat template, or no row gives a prompt that is short enough.
    """
    if tokenizer.chat_template is None:
        raise ValueError("The target's tokenizer has no chat template, so conversations cannot be rendered.")
    prompts = []
    for number, row in enumerate(rows, start=1):
        messages = messages_before_last_answer(row["messages"])
        if messages:
            prompts.append(Prompt(str(row.get("id", number)), render(messages, tokenizer, row.get("tools"))))
    kept = [prompt for prompt in prompts if prompt.input_ids.shape[1] <= max_prompt_tokens]
    if not kept:
        raise ValueError(f"No conversation has a prompt of 1 to {max_prompt_tokens} tokens before its last answer.")
    if len(kept) < len(prompts):
        logger.warning("%d prompts of more than %d tokens are left out.", len(prompts) - len(kept), max_prompt_tokens)
    return kept
