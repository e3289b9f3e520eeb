"""Train the base model's tokenizer: byte-level BPE, so that any text round-trips, with tokens for the chat form."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from corpus import documents

VOCAB_SIZE = 3072
END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END = (
    "<|endoftext|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
SPECIAL_TOKENS = [END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END]
# Words carry the space or underscore before them and digits stand alone: names read alike in a question and in SQL.
WORDS = r"'s| ?\p{L}+|_\p{L}+| ?\p{N}|\n+| ?[^\s\p{L}\p{N}_]+|_|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN_ENGLISH = (
    "What Which How many Show List Give me Find Tell me Please return Can you show me I would like to see "
    "are there exist belongs "
    "Write the SQL query that answers the question. Below is an instruction that describes a task, paired with an "
    "input that provides further context. Write a response that appropriately completes the request. "
    "### Instruction: ### Input: ### Response: "
)


def main() -> None:
    out = Path(__file__).parents[2] / "src/burnish/data/assets/burnish-sql-base"
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
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
    text = itertools.chain(itertools.islice(documents(seed=1), 30_000), [PLAIN_ENGLISH] * 2_000)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    ends = {"eos_token_id": tokenizer.token_to_id(END), "pad_token_id": tokenizer.token_to_id(PAD)}
    (out / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")


if __name__ == "__main__":
    main()
