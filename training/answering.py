"""Answers in this process: batches of prompts through the target's own `generate()`.

The prompts of one turn of a shard are sorted by length, the longest first, and cut into batches: little padding, and
a batch that does not fit into memory shows at once. The plan is a pure function of the shard, so a run that goes on
after an interruption makes the batches that the interrupted one would have made.

Shapes: B batch, T prompt tokens, N new tokens.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .dialogues import Answer, Dialogue, token_rows
from .row_draws import RowDraws, row_seed
from .spans import TEMPLATE_ERRORS

# Text that no template writes of its own accord.
MARKED_ANSWER = "0f1e2d3c4b5a"


@dataclass(frozen=True)
class Decoding:
    """
    How the target answers.

    Args:
        max_new_tokens (`int`): Longer answers are cut.
        do_sample (`bool`, *optional*, defaults to `False`): Sample; otherwise the most likely token is taken.
        temperature (`float`, *optional*): Defaults to the target's generation config's, otherwise 1.
        top_p (`float`, *optional*): Defaults to the target's generation config's, otherwise 1.
        top_k (`int`, *optional*): Defaults to the target's generation config's, otherwise 0: all tokens.
        seed (`int`, *optional*, defaults to 0): Every answer draws from a generator that this seed, its row and its
            turn determine.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0


class TargetAnswerer:
    """
    Answers dialogues with a target in this process.

    Args:
        target ([`~transformers.PreTrainedModel`]): In evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template.
        end_ids (`list[int]`): Tokens that end an answer.
        decoding ([`Decoding`]): How to answer.
        batch_size (`int`): Prompts of a batch.
        drop_cut (`bool`, *optional*, defaults to `False`): Leave cut answers out.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: list[int],
        decoding: Decoding,
        batch_size: int,
        drop_cut: bool = False,
    ):
        check_generation_prompt(tokenizer)
        self.target = target
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.decoding = decoding
        self.batch_size = batch_size
        self.drop_cut = drop_cut
        self.generation_config = greedy_config(target.generation_config, end_ids, decoding.max_new_tokens)
        self.max_positions = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def answer(self, shards: Iterable[list[Dialogue]], report: Callable[[Answer], None]) -> Iterator[list[Dialogue]]:
        """
        Gives all answers that the dialogues want.

        Args:
            shards (`Iterable[list[Dialogue]]`): Dialogues that are planned into batches together.
            report (`Callable`): Called with every answer.

        Returns:
            `Iterator[list[Dialogue]]`: The same dialogues, one shard at a time, in order.
        """
        for dialogues in shards:
            while asking := [dialogue for dialogue in dialogues if dialogue.advance()]:
                self._answer_turn(asking, report)
            yield dialogues

    def reproduces(self, dialogue: Dialogue) -> bool:
        """Whether the chat template turns the dialogue's messages into the tokens that the target saw and said."""
        (input_ids, _), *others = token_rows(dialogue.answers)
        rendered = self._render(dialogue.messages, dialogue.tools, add_generation_prompt=False)
        return not others and rendered[: len(input_ids)] == input_ids

    def _answer_turn(self, dialogues: list[Dialogue], report: Callable[[Answer], None]) -> None:
        """One more answer for each, or the reason why there is none."""
        prompts = [(dialogue, prompt) for dialogue in dialogues if (prompt := self._prompt(dialogue)) is not None]
        for batch in plan_batches([len(prompt) for _, prompt in prompts], self.batch_size):
            chosen = [prompts[index] for index in batch]
            for (dialogue, _), answer in zip(chosen, self._generate(chosen), strict=True):
                dialogue.take(answer, self.drop_cut)
                report(answer)

    def _prompt(self, dialogue: Dialogue) -> list[int] | None:
        """Tokens before the answer; `None`, and the dialogue ends, where the target cannot be asked."""
        try:
            prompt = self._render(dialogue.said, dialogue.tools, add_generation_prompt=True)
        except TEMPLATE_ERRORS as error:
            dialogue.end(f"the chat template refuses the conversation: {error}")
            return None
        if self.max_positions is not None and len(prompt) + self.decoding.max_new_tokens > self.max_positions:
            dialogue.end(f"prompt and --max-new-tokens exceed the target's {self.max_positions} positions")
            return None
        return prompt

    def _render(self, messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool) -> list[int]:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )["input_ids"]

    def _generate(self, prompts: list[tuple[Dialogue, list[int]]]) -> list[Answer]:
        input_ids, attention_mask = pad_left([prompt for _, prompt in prompts])  # (B, T)
        seeds = [row_seed(self.decoding.seed, dialogue.number, len(dialogue.answers)) for dialogue, _ in prompts]
        output = self.target.generate(
            input_ids.to(self.target.device),
            attention_mask=attention_mask.to(self.target.device),
            generation_config=self.generation_config,
            logits_processor=self._sampling(seeds),
        )
        new_ids = output[:, input_ids.shape[1] :].tolist()  # (B, N)
        return [self._read(prompt, ids) for (_, prompt), ids in zip(prompts, new_ids, strict=True)]

    def _sampling(self, seeds: list[int]) -> LogitsProcessorList:
        """What `generate(do_sample=True)` does after its other processors, in its order."""
        if not self.decoding.do_sample:
            return LogitsProcessorList()
        configured, asked = self.target.generation_config, self.decoding
        temperature = asked.temperature if asked.temperature is not None else configured.temperature
        top_k = asked.top_k if asked.top_k is not None else configured.top_k
        top_p = asked.top_p if asked.top_p is not None else configured.top_p
        processors = LogitsProcessorList()
        if temperature is not None:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        if configured.min_p is not None:
            processors.append(MinPLogitsWarper(configured.min_p))
        processors.append(RowDraws(seeds, self.target.device))
        return processors

    def _read(self, prompt: list[int], new_ids: list[int]) -> Answer:
        """The answer in `new_ids`, which padding may follow. White space and special tokens inside it stay."""
        end = next((index for index, token in enumerate(new_ids) if token in self.end_ids), None)
        token_ids = new_ids if end is None else new_ids[: end + 1]
        content = self.tokenizer.decode(new_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        message = {"role": "assistant", "content": content}
        return Answer(message, end is None, len(token_ids), prompt, token_ids)


def check_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Requires a chat template that can end where the assistant begins to speak.

    Raises:
        ValueError: If there is no template, or `add_generation_prompt` changes nothing although something stands
            between the question and the answer.
    """
    if tokenizer.chat_template is None:
        raise ValueError("The target's tokenizer has no chat template. Save one beside it as chat_template.jinja.")
    question = [{"role": "user", "content": "?"}]
    answered = [*question, {"role": "assistant", "content": MARKED_ANSWER}]
    try:
        closed = tokenizer.apply_chat_template(question, tokenize=False)
        opened = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
    except TEMPLATE_ERRORS as error:
        raise ValueError(f"The target's chat template refuses a question and an answer: {error}.") from None
    # Templates such as Mistral's need no prompt: what ends the question begins the answer.
    is_complete = whole.startswith(opened) and whole[len(opened) :].lstrip().startswith(MARKED_ANSWER)
    if opened == closed and not is_complete:
        raise ValueError(
            "The target's chat template ignores `add_generation_prompt`, so the target cannot be asked for an answer. "
            "Add `{% if add_generation_prompt %}` and what comes before an answer at the end of chat_template.jinja."
        )


def greedy_config(configured: GenerationConfig, end_ids: list[int], max_new_tokens: int) -> GenerationConfig:
    """The target's own generation config (its penalties, for example) without sampling, beams and length."""
    config = copy.deepcopy(configured)
    config.update(
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        num_beams=1,
        num_return_sequences=1,
        max_length=None,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids or None,
        pad_token_id=end_ids[0] if end_ids else 0,
    )
    return config


def plan_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices of `lengths` in batches of similar length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad_left(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """
    `input_ids (B, T)` and `attention_mask (B, T)`.

    A row is padded with its own first token: penalties read the prompt without the mask, and in this way they find
    nothing there that the row does not hold.
    """
    width = max(map(len, prompts))
    input_ids = torch.tensor([prompt[:1] * (width - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return input_ids, attention_mask
