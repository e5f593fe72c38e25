"""Shows one generation as it happens, plain and assisted, with the accepted draft tokens coloured.

A round's tokens reach the streamer one by one, after the draft's statistics have counted them all. So a token comes
from the draft if more of its round follow it: the last one of a round is the target's own.
"""

import argparse
import logging
import time

import torch
import transformers
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from .loading import add_model_arguments, load_models
from .measure import Decoding
from .prompts import BUILT_IN_REQUESTS, Prompt, render_prompts

DRAFT_STYLE = "bold green"

logger = logging.getLogger(__name__)


class ColouringStreamer(BaseStreamer):
    """Collects the text of one generation, the accepted draft tokens in colour, and counts as it goes.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        draft ([`~transformers.PreTrainedModel`], *optional*): The draft whose statistics tell its tokens from the
            target's; without one every token is the target's.
        live ([`~rich.live.Live`], *optional*): Shows `panel()` after each token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, draft: PreTrainedModel | None = None, live: Live | None = None
    ):
        self.tokenizer, self.draft, self.live = tokenizer, draft, live
        self.text = Text()
        self.token_ids: list[int] = []
        self.num_accepted = 0
        self.has_prompt = False
        self.start = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """Takes the prompt at the first call, then new tokens, `(1,)` or `(1, n)`."""
        if self.has_prompt:
            for token_id in value.flatten().tolist():
                self.append(token_id)
        self.has_prompt = True
        if self.live is not None:
            self.live.update(self.panel())

    def append(self, token_id: int) -> None:
        is_accepted = self.is_accepted_draft()
        self.token_ids.append(token_id)
        self.num_accepted += is_accepted
        decoded = self.tokenizer.decode(self.token_ids, skip_special_tokens=True)
        if not decoded.endswith("\N{REPLACEMENT CHARACTER}"):
            self.text.append(decoded[len(self.text) :], style=DRAFT_STYLE if is_accepted else None)

    def is_accepted_draft(self) -> bool:
        """Whether the next token to arrive was drafted: others of its round follow it."""
        return self.draft is not None and len(self.token_ids) + 1 < self.draft.speculation_stats.new_tokens

    def end(self) -> None:
        if self.live is not None:
            self.live.update(self.panel())

    def counts(self) -> str:
        """What has happened so far, in one line."""
        num_tokens = len(self.token_ids)
        rate = f"{num_tokens} tokens, {num_tokens / (time.perf_counter() - self.start):.0f} per second"
        if self.draft is None:
            return f"{rate}, {num_tokens} target calls"
        stats = self.draft.speculation_stats
        num_calls = stats.target_calls if stats is not None else 0
        acceptance = f"acceptance length {stats.acceptance_length:.2f}" if num_calls else "no round yet"
        return f"{rate}, {num_calls} target calls, {self.num_accepted} accepted from the draft, {acceptance}"

    def panel(self) -> Panel:
        title = "plain" if self.draft is None else f"assisted ([{DRAFT_STYLE}]accepted from the draft[/])"
        return Panel(Group(self.text, Text(), Text(self.counts(), style="dim")), title=title, title_align="left")


def stream(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    decoding: Decoding,
    console: Console,
    draft: PreTrainedModel | None = None,
) -> list[int]:
    """Generates one text on `console`; on anything but a terminal only its end is shown.

    Returns:
        `list[int]`: The new tokens.
    """
    input_ids = prompt.input_ids.to(target.device)
    torch.manual_seed(decoding.seeds[0])
    with Live(console=console, refresh_per_second=10) as live:
        streamer = ColouringStreamer(tokenizer, draft, live)
        target.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            assistant_model=draft,
            streamer=streamer,
            **decoding.generate_arguments(),
        )
    if not console.is_terminal:
        console.line()
    return streamer.token_ids


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--prompt", default=BUILT_IN_REQUESTS[0], help="the user's message (default: a built-in one)")
    parser.add_argument("--seed", type=int, default=0, help="when sampling (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Streams one prompt plainly, then assisted.

    Returns:
        `int`: 0 if the texts are equal, 1 if they differ, 2 if the command cannot be run.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.disable_progress_bar()
    arguments = parse_arguments(argv)
    try:
        target, draft, tokenizer = load_models(arguments)
        row = {"messages": [{"role": "user", "content": arguments.prompt}]}
        max_positions = target.config.get_text_config(decoder=True).max_position_embeddings
        (prompt,) = render_prompts([row], tokenizer, max_positions - arguments.max_new_tokens)
    except (ValueError, OSError, NotImplementedError) as error:
        logger.error("error: %s", error)
        return 2
    decoding = Decoding(arguments.max_new_tokens, arguments.do_sample, arguments.temperature, (arguments.seed,))
    console = Console()
    console.print(Panel(Text(arguments.prompt), title="prompt", title_align="left"))
    plain, assisted = (
        stream(target, tokenizer, prompt, decoding, console, draft=assistant) for assistant in (None, draft)
    )
    console.print("The two texts are equal token for token." if plain == assisted else "The two texts differ.")
    return 0 if plain == assisted else 1
