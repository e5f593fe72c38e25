"""Rounds per second on the CPU, and what a round costs besides the forwards of draft and target.

"Rest" is the time of the rounds in which neither model is in a forward: from the end of the forward over the prompt to
the end of the call, less all forwards. Each prompt is generated several times by each loop in turn, greedily, and the
call with the least time counts, which other load moves least.

The other loop is transformers' own for an `assistant_model`. It cannot run the head, so its assistant is a Llama of
one layer of the head's size that goes through all of `AssistedCandidateGenerator` and `generate()` and computes all of
its forwards, but whose logits name the tokens that the head proposed in the same round of our chain. So both loops
accept the same tokens in as many rounds, which is checked, along with the texts. Its first round, which proposes
before the prompt was read, proposes nothing right, like our prefill, and is not counted. What the two drafts' forwards
cost differs a little and does not enter the rest. Trees have nothing to be compared with: transformers has none.

    python benchmarks/host_share.py --target <target> --draft <head> --prompts <held-out.jsonl>
"""

import time
from dataclasses import dataclass, field
from itertools import accumulate
from unittest.mock import patch

import torch
from harness import write_table
from held_out import CHAIN, Shape, load_models, make_parser, read_prompts, set_shape
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from eagle3_mla.generation import decoder
from eagle3_mla.modeling_eagle3_mla import Eagle3MLADraftModel

TREE = (60, 10, 7)
OURS, THEIRS, OUR_TREE = "ours, chain of 7", "transformers, the same chains", "ours, tree of 60"
# The tokens that the head proposed in a round, by the length of the text that it continued.
Script = dict[int, list[int]]


@dataclass
class Seconds:
    """What the rounds of one or many calls took."""

    draft: float = 0.0
    target: float = 0.0
    all: float = 0.0
    num_rounds: int = 0
    num_tokens: int = 0

    @property
    def rest(self) -> float:
        return self.all - self.draft - self.target

    def add(self, other: "Seconds") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Forwards:
    """Begin and end of every forward of a model, on the host's clock, while it is a context."""

    model: PreTrainedModel
    spans: list[list[float]] = field(default_factory=list)

    def __enter__(self) -> "Forwards":
        self.hooks = [
            self.model.register_forward_pre_hook(lambda *_: self.spans.append([time.perf_counter()])),
            self.model.register_forward_hook(lambda *_: self.spans[-1].append(time.perf_counter())),
        ]
        return self

    def __exit__(self, *exception) -> None:
        for hook in self.hooks:
            hook.remove()

    def seconds_after(self, begin: float) -> float:
        return sum(stop - start for start, stop in self.spans if start >= begin)


class ScriptedAssistant(LlamaForCausalLM):
    """A model of one layer that computes everything and then says what `script` says."""

    def __init__(self, config: LlamaConfig, script: Script, wrong_token_id: int):
        super().__init__(config)
        self.script, self.wrong_token_id, self.text_length = script, wrong_token_id, 0
        # Not a `forward` of its own: `generate()` reads off the signature what a model takes.
        self.register_forward_hook(self.replace_logits, with_kwargs=True)

    def generate(self, *arguments, **settings):
        self.text_length = settings["input_ids"].shape[1]
        return super().generate(*arguments, **settings)

    @staticmethod
    def replace_logits(self: "ScriptedAssistant", arguments: tuple, inputs: dict, outputs) -> None:
        proposals = self.script.get(self.text_length, [])
        step = inputs["past_key_values"].get_seq_length() - self.text_length
        token = proposals[step] if step < len(proposals) else self.wrong_token_id
        outputs.logits[:, -1].zero_()
        outputs.logits[:, -1, token] = 100.0


def make_assistant(draft: Eagle3MLADraftModel, script: Script, wrong_token_id: int) -> ScriptedAssistant:
    """An assistant whose one layer and output head have the sizes of the draft's, with random weights."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(draft.config, name) for name in (*names, "head_dim", "max_position_embeddings")}
    config = LlamaConfig(num_hidden_layers=1, bos_token_id=None, eos_token_id=None, **sizes)
    assistant = ScriptedAssistant(config, script, wrong_token_id).eval()
    assistant.generation_config.num_assistant_tokens = CHAIN[0]
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


def generate(target, input_ids: torch.Tensor, max_new_tokens: int, assistant) -> tuple[list[int], Seconds]:
    """One text, and what its rounds took."""
    with Forwards(target) as of_target, Forwards(assistant) as of_draft:
        text = target.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            assistant_model=assistant,
        )
        ended = time.perf_counter()
    began, num_rounds = of_target.spans[0][1], len(of_target.spans) - 1
    new_tokens = text[0, input_ids.shape[1] :].tolist()
    seconds = Seconds(of_draft.seconds_after(began), of_target.seconds_after(began), ended - began)
    seconds.num_rounds, seconds.num_tokens = num_rounds, len(new_tokens) - 1
    return new_tokens, seconds


def record_script(target, draft, input_ids: torch.Tensor, max_new_tokens: int) -> tuple[list[int], Script]:
    """The text, and what our chain proposed in each round."""
    proposals, draft_tree = [], decoder.draft_tree

    def recording(*arguments):
        tree = draft_tree(*arguments)
        proposals.append(tree.token_ids[0, 1:].tolist())
        return tree

    set_shape(draft, CHAIN)
    with patch.object(decoder, "draft_tree", recording):
        text, _ = generate(target, input_ids, max_new_tokens, draft)
    lengths = accumulate(draft.speculation_stats.acceptance_lengths, initial=input_ids.shape[1] + 1)
    return text, dict(zip(lengths, proposals, strict=False))


@dataclass(frozen=True)
class Case:
    """One prompt, continued by each loop."""

    target: PreTrainedModel
    draft: Eagle3MLADraftModel
    input_ids: torch.Tensor
    max_new_tokens: int

    def ours(self, shape: Shape) -> tuple[list[int], Seconds]:
        set_shape(self.draft, shape)
        # What is tried once of a target is not part of a round.
        self.target.generate(self.input_ids, do_sample=False, max_new_tokens=1, assistant_model=self.draft)
        return generate(self.target, self.input_ids, self.max_new_tokens, self.draft)

    def fastest(self, num_repeats: int) -> dict[str, Seconds]:
        """Of each loop the call that took least, all loops in turn."""
        text, script = record_script(self.target, self.draft, self.input_ids, self.max_new_tokens)
        assistant = make_assistant(self.draft, script, wrong_token_id=int(text[0] == 0))
        calls = {
            OURS: lambda: self.ours(CHAIN),
            THEIRS: lambda: generate(self.target, self.input_ids, self.max_new_tokens, assistant),
            OUR_TREE: lambda: self.ours(TREE),
        }
        found: dict[str, list[Seconds]] = {name: [] for name in calls}
        for _ in range(num_repeats):
            for name, call in calls.items():
                new_tokens, seconds = call()
                if new_tokens != text:
                    raise RuntimeError(f"The text of the loop {name!r} is not that of the others.")
                found[name].append(seconds)
        num_rounds = {found[name][0].num_rounds for name in (OURS, THEIRS)}
        if len(num_rounds) > 1:
            raise RuntimeError(f"Both loops must have as many rounds, got {sorted(num_rounds)}.")
        return {name: min(each, key=lambda seconds: seconds.all) for name, each in found.items()}


def table_row(name: str, seconds: Seconds) -> list[str]:
    def milliseconds(value: float) -> str:
        return f"{1000 * value / seconds.num_rounds:.2f}"

    return [
        name,
        str(seconds.num_rounds),
        f"{seconds.num_tokens / seconds.num_rounds:.2f}",
        f"{seconds.num_rounds / seconds.all:.1f}",
        *map(milliseconds, (seconds.all, seconds.draft, seconds.target, seconds.rest)),
        f"**{seconds.rest / seconds.all:.1%}**",
    ]


def main() -> None:
    parser = make_parser(__doc__, "benchmarks/results/host_share.md", num_samples=2, max_new_tokens=128)
    parser.add_argument("--repeats", type=int, default=5, help="calls of each loop for each prompt")
    arguments = parser.parse_args()
    target, draft = load_models(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    by_source = read_prompts(arguments.prompts, tokenizer, arguments.num_samples)
    prompts = [input_ids for rows in by_source.values() for input_ids in rows]
    totals = {name: Seconds() for name in (OURS, THEIRS, OUR_TREE)}
    for input_ids in prompts:
        case = Case(target, draft, input_ids, arguments.max_new_tokens)
        for name, seconds in case.fastest(arguments.repeats).items():
            totals[name].add(seconds)
    columns = ["loop", "rounds", "acceptance length", "rounds per second", "ms per round", "draft forwards"]
    columns += ["target forward", "rest", "share of the rest"]
    rows = [table_row(name, seconds) for name, seconds in totals.items()]
    note = "\n\n".join([*__doc__.split("\n\n")[1:3], f"Torch threads: {torch.get_num_threads()}; fp32."])
    write_table(arguments.output, "The share of the host in a round", columns, rows, note)
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
