"""Writes tests/fixtures/tokenizer_cases.json: unusual texts with their token ids in transformers, for
the small vocabulary of the checkpoint "base" (made by make_fixtures.py; run that first).

One line for each text, `[text, ids]`, without the prompt template.

    python tests/reference/make_tokenizer_cases.py      # transformers 5.23.0, tokenizers 0.23.3
"""

import json
import random
import unicodedata
from pathlib import Path

from transformers import Qwen2Tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
COUNT = 100

FIXED = [
    "", " ", "   ", "\n", "\r\n", "\t\t", "Hello world, 你好世界! 12345", "a\r\nb\rc\n\n\n d", "  leading",
    "trailing   ", "tab\tand\ttabs\t\t", "I'm you're he'S WE'LL they'VE it'D don't 's", "’s ‘t", "can'ſ x'S'T'RE",
    "e\u0301 \u00e9 s\u0323\u0307", "\u212b \u2126 ﬁ", "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 ❄️", "🇩🇪🇫🇷", "١٢٣ ४५६ ⅷ ½ ² ㊿ 𝟘𝟙",
    "مرحبا بالعالم שלום", "a\u200bb\u200c\u200d\ufeff\u2060c", "<|im_end|>", "<|im_start|>user\nhi<|im_end|>",
    "<|im_end", "a<|endoftext|>b <tool_call>{}</tool_call>", "{", "}", "{}", "{{0}}", "%s %d $x", " <|im_end|> ",
    "\u00a0\u3000\u2003x\u0085y\u2028z\u2029", "\u180e\u200e\u202eabc", "\x00\x01\x1f\x7f", "한국어 が か\u3099 ｶﾞ",
    "हिन्दी ไทย", "ﷺ", "!!!???...\n\n...", " \n \n x", "x \n\n y", "   \n", "\n   ", "红狐，水彩「括弧」。", "3.14 1,000",
    "C:\\path https://example.com/a?b=c#d", "a" * 40, " " * 40, "\n" * 12, "<|im_end|>\u0338", "ǅ ß ẞ İ ı", "\U0010ffff",
]  # fmt: skip
POOLS = [
    [*"abcdefgXYZ 012 '’.,!?-_()[]{}<>|\"\n\t "],
    [" ", "  ", "\n", "\r\n", "\r", "\t", "\u00a0", "\u3000", "\u2028", "\u0085", "\u200b", "\u001c", "\u000b"],
    ["'s", "'S", "'t", "'T", "'re", "'RE", "'Ll", "'ve", "'m", "'d", "'ſ", "’s", "''"],
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "<|im_end", "im_end|>", "<|", "|>"],
    [chr(c) for c in range(0x300, 0x345)],
    [*"雪中的红狐，水彩画，柔和的光线"],
    [chr(c) for c in [*range(0x5D0, 0x5EB), *range(0x620, 0x660)]],
    ["👩", "\u200d", "👧", "🏽", "\ufe0f", "❄", "🇩", "🇪"],
    [chr(c) for c in [*range(0xAC00, 0xAC20), *range(0x1100, 0x1120), *range(0x900, 0x930)]],
    ["٠", "१", "๓", "𝟜", "Ⅷ", "½", "²", "①", "〇"],
    ["the", " the", " image", " of", " red", "fox"],
]


def random_text(rng: random.Random) -> str:
    pools = rng.sample(POOLS, rng.randrange(1, 5))
    text = "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(2, 16)))
    return unicodedata.normalize("NFD", text) if rng.random() < 0.2 else text


def main() -> None:
    tokenizer = Qwen2Tokenizer.from_pretrained(FIXTURES / "checkpoints/base/tokenizer")
    rng = random.Random(0)
    texts = [*FIXED, *(random_text(rng) for _ in range(COUNT - len(FIXED)))]
    lines = [json.dumps([text, tokenizer(text).input_ids], separators=(",", ":")) for text in texts]
    (FIXTURES / "tokenizer_cases.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
