"""Chat templates in the style of well-known models, shortened to what matters for finding answers, with tokenizers."""

# ruff: noqa: RUF001 - the markup of one family is written with such characters
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{% for tool in tools %}{{- tool | tojson + '\\n' }}\
{% endfor %}{{- '<|im_end|>\\n' }}{%- elif messages[0]['role'] != 'system' %}\
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Reasoning stays only behind the last request of the user; an answer without reasoning gets an empty block there.
QWEN3 = """{%- set ns = namespace(last_query=messages|length - 1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}{%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Strips contents; a call takes the place of the content and ends with another token than an answer.
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eom_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# No generation prompt; the tools stand before the last request only; roles must alternate.
MISTRAL = """{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == users[-1] %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '[TOOL_CALLS] [{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}]' }}
        {{- eos_token }}
    {%- elif message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
    {%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception('Only user, assistant and tool roles are supported') }}
    {%- endif %}
{%- endfor %}"""

LLAMA2 = """{%- for message in messages %}
    {%- if message.role == 'user' %}{{- bos_token + '[INST] ' + message.content | trim + ' [/INST]' }}
    {%- else %}{{- ' ' + message.content | trim + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

GEMMA = """{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# The end of the whole conversation has a token of its own.
PHI3 = """{%- for message in messages %}{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

# The prompt opens a block for reasoning that is not in what was said before.
DEEPSEEK = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'system' %}{{- message['content'] }}
    {%- else %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
        {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""

# No token ends a turn; the next header does.
GLM = """{{- '[gMASK]<sop>' }}
{%- for message in messages %}{{- '<|' + message.role + '|>\\n' + message.content }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

# Two tokens end a turn; the second of them ends generation.
COHERE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|START|><|CHATBOT|><|START_RESPONSE|>' + message.content + '<|END_RESPONSE|><|END|>' }}
    {%- else %}{{- '<|START|><|USER|>' + message.content + '<|END|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START|><|CHATBOT|><|START_RESPONSE|>' }}{%- endif %}"""

# Only words, and an end-of-text token behind the last answer.
ALPACA = """{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '### Instruction:\\n' + message.content + '\\n\\n' }}
    {%- else %}{{- '### Response:\\n' + message.content }}{{- eos_token if loop.last else '\\n\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"""

# Name -> template, special tokens, end-of-text token, beginning-of-text token.
TEMPLATES = {
    "chatml": (CHATML, ["<|im_start|>"], "<|im_end|>", None),
    "qwen3": (QWEN3, ["<|im_start|>"], "<|im_end|>", None),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"], "<|eot_id|>", "<|begin_of_text|>"),
    "mistral": (MISTRAL, ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"], "</s>", "<s>"),
    "llama2": (LLAMA2, [], "</s>", "<s>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<eos>", "<bos>"),
    "phi3": (PHI3, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<|endoftext|>", None),
    "deepseek": (DEEPSEEK, ["<｜User｜>", "<｜Assistant｜>"], "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    "glm": (GLM, ["<|user|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>"], "<|endoftext|>", None),
    "cohere": (
        COHERE,
        ["<|START|>", "<|CHATBOT|>", "<|USER|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"],
        "<|END|>",
        "<s>",
    ),
    "alpaca": (ALPACA, [], "</s>", None),
}
# Tokens that end generation by the generation config, where the tokenizer's own is not all.
END_TOKENS = {"llama3": ["<|eom_id|>"], "gemma": ["<end_of_turn>"], "phi3": ["<|end|>"], "glm": ["<|user|>"]}


def make_tokenizer(
    template: str, special_tokens: list[str], eos_token: str, bos_token: str | None = None, trim_offsets: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges across white space, and a beginning of text where there is one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    texts = ["\n\n a\n\n b\n\n c: the answer is four.\n\n", "the answer the answer  is\n\n  four"] * 4
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    named = [token for token in (bos_token, eos_token) if token is not None]
    backend.add_special_tokens([AddedToken(token, special=True) for token in [*special_tokens, *named]])
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos_token is not None:
        single = f"{bos_token} $A"
        begin = (bos_token, backend.token_to_id(bos_token))
        steps.append(processors.TemplateProcessing(single=single, special_tokens=[begin]))
    backend.post_processor = processors.Sequence(steps)
    tokens = {"eos_token": eos_token} | ({} if bos_token is None else {"bos_token": bos_token})
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)


def tokenizer_like(name: str, **kwargs) -> PreTrainedTokenizerFast:
    """A small tokenizer with the template of a model family."""
    return make_tokenizer(*TEMPLATES[name], **kwargs)
