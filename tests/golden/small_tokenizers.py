"""Writes small_tokenizers.json: small tokenizers, trained here, and what the reference libraries make of some texts.

Written with tokenizers 0.23.3 and sentencepiece 0.2.3: python small_tokenizers.py > small_tokenizers.json
"""

import io
import json
import random

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind at all.",
    "It's what they'll say: we've seen 1234 foxes in 2024, I'd guess. You're right!",
    "def reverse(text):\n    return text[::-1]\n\n\nprint(reverse('abc'))\n\tif x == 10:\n        pass\n",
    "Größe, Straße, café, naïve, résumé, Ελληνικά, Русский язык, 日本語の文章です。東京は大きい。",
    "HTTPServer XMLHttpRequest camelCase snake_case_name; a/b/c //comment http://example.org/?q=1&r=2",
    "the theory of the thermal theatre; there, then, these, those, that, this, thus, though, through",
] * 8

TEXTS = [
    "",
    " ",
    "  ",
    "the",
    " the dog",
    "The dog's fox isn't lazy; WE'LL see, I'D say 'tis.",
    "x  y   z\n\n\n  indented\n\ttab \r\n end  ",
    "1 12 123 1234 12345 3.14159 ½ ٣٤ v2",
    "def f(x):\n    return x**2  # no!!\n",
    "XMLHttpRequest'll HTTPServer iPhone's McDonald",
    "日本語の文章 東京 and Ελληνικά Größe, e\u0301 re\u0301sume\u0301 \ufb01n",
    "emoji 🦙🦙 👩\u200d👩\u200d👧 ok",
    "a<|end|>b <|end|><tool> c<tool>",
    "<|end|> the <tool>the",
    "\u00a0nbsp\u3000ideographic\u2028line",
    "a/b//c ///\n/ {}[]()!? ~!@#$%^&*",
    "under_score __init__ \\n \"quoted\" 'single'",
    "thethethe" * 12,
    "=" * 70 + "\n" + " " * 40 + "x",
]

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|{REST}"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{REST}"
)
DEEPSEEK_V3 = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
]


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(*patterns):
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, byte_level(False)])


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)])

# Name, pre-tokenizer, Unicode normalization, whole words stay whole.
BYTE_LEVEL = [
    ("gpt-2", byte_level(True), None, False),
    ("olmo", byte_level(True), normalizers.NFC(), False),
    ("smollm", DIGITS, None, False),
    ("command-r", DIGITS, normalizers.NFC(), False),
    ("llama-bpe", split(LLAMA3), None, True),
    ("qwen2", split(QWEN2), normalizers.NFC(), False),
    ("qwen35", split(QWEN35), normalizers.NFC(), False),
    ("tekken", split(TEKKEN), None, True),
    ("gpt-4o", split(GPT4O), None, False),
    ("deepseek-v3", split(*DEEPSEEK_V3), None, False),
]


def byte_level_cases():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = byte_level(True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    # A word that no merge makes, to tell whether whole words are looked up.
    vocab[" lazy".replace(" ", "Ġ") + "dog"] = len(vocab)
    vocab["doesn"] = vocab.get("doesn", len(vocab))
    cases = []
    for name, pre_tokenizer, normalizer, ignore_merges in BYTE_LEVEL:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
        tokenizer.add_tokens([AddedToken("<tool>", special=False)])
        definition = json.loads(tokenizer.to_str())
        definition["model"]["vocab"] = definition["model"]["merges"] = None
        cases.append(
            {
                "pre": name,
                "tokenizer": definition,
                "ids": [tokenizer.encode(text + " lazydog doesn", add_special_tokens=False).ids for text in TEXTS],
            }
        )
    tokens = [token for token, _ in sorted(vocab.items(), key=lambda item: item[1])]
    return {"suffix": " lazydog doesn", "tokens": tokens, "merges": [" ".join(merge) for merge in merges], "cases": cases}


def sentence_piece_case(add_dummy_prefix):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = processor.vocab_size()

    def kind(token):
        if processor.is_unknown(token):
            return 2
        if processor.is_control(token):
            return 3
        if processor.is_byte(token):
            return 6
        return 4 if processor.id_to_piece(token) == "<tool>" else 1

    # Texts with symbols in them are cut differently: after a symbol the prefix is put again, as transformers does.
    texts = [text for text in TEXTS if "<tool>" not in text]
    generator = random.Random(1)
    shown = [token for token in range(size) if kind(token) in (1, 6)]
    decoded = [[generator.choice(shown) for _ in range(generator.randrange(1, 12))] for _ in range(60)]
    decoded += [processor.encode(text) for text in texts]
    return {
        "add_space_prefix": add_dummy_prefix,
        "tokens": [processor.id_to_piece(token) for token in range(size)],
        "scores": [processor.get_score(token) for token in range(size)],
        "types": [kind(token) for token in range(size)],
        "encoded": [{"text": text, "ids": processor.encode(text)} for text in texts],
        "decoded": [{"ids": ids, "text": processor.decode(ids)} for ids in decoded],
    }


def main():
    document = {
        "texts": TEXTS,
        "byte_level": byte_level_cases(),
        "sentence_piece": [sentence_piece_case(True), sentence_piece_case(False)],
    }
    print(json.dumps(document, ensure_ascii=False, separators=(",", ":")))


if __name__ == "__main__":
    main()
