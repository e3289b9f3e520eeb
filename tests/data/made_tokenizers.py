"""Small real tokenizers, trained on the spot: byte-level and byte-fallback BPE; and usual chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

CORPUS = [
    "SELECT name FROM employee WHERE age > 30 ORDER BY name LIMIT 3",
    "How many employees are older than thirty? List their names, please.",
    "CREATE TABLE employee (id INTEGER, name TEXT, age INTEGER)",
    "Below is an instruction that describes a task. ### Instruction: ### Response:",
] * 4
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3_LIKE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|stop|>\\n\\n" + "Today: " + strftime_now("%Y") + "\\n" + system_message + "</s>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception("unexpected role " + message.role) }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '<|stop|>\\n\\n' + message['content'] | trim + '</s>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|stop|>\\n\\n' }}
{%- endif %}
"""
ZEPHYR_LIKE = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endgeneration %}

{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""


def byte_fallback_backend() -> Backend:
    """Llama's kind: every text is pieces with ▁ for space, and unknown characters are <0xXX> tokens."""
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=SPECIALS[:3] + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.train_from_iterator(CORPUS, trainer)
    backend = Backend.from_str(_without_added(backend.to_str()))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def byte_level_backend() -> Backend:
    """GPT-2's kind: the alphabet is bytes."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _without_added(text: str) -> str:
    """The serialized tokenizer without the special tokens that training listed (the byte tokens must be plain)."""
    value = json.loads(text)
    value["added_tokens"] = []
    return json.dumps(value)


BACKENDS: dict[str, Callable[[], Backend]] = {"byte-fallback": byte_fallback_backend, "byte-level": byte_level_backend}

MakeFolder = Callable[..., Path]
