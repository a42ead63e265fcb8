//! Splits text into words before merging, by the rule that GGUF files name (`tokenizer.ggml.pre`). The patterns are those of
//! the models' published `tokenizer.json`. Unknown names are refused: a wrong split would silently produce tokens that the
//! model has never seen.

use fancy_regex::Regex;

use super::error::TokenizerError;
use super::split::{split_gpt2, split_llama3, split_single_digits};

/// The splitting rule and the settings of a name.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    split: Split,
    /// Whether text is normalized to Unicode form C first.
    pub normalizes: bool,
    /// Whether a word that is a token as a whole skips merging.
    pub ignores_merges: bool,
    /// Whether a text begins with the beginning-of-sequence token if the file does not say.
    pub adds_bos: bool,
}

#[derive(Debug)]
enum Split {
    Gpt2,
    /// Each digit is a word; the text in between is split by GPT-2's pattern.
    DigitsThenGpt2,
    Llama3 {
        max_digits: usize,
    },
    /// Applies one pattern after the other to each part. Matches become parts, and so does the text between matches.
    Patterns(Vec<Regex>),
    /// Splits off runs of punctuation, then applies GPT-2's pattern, then the patterns.
    Falcon(Vec<Regex>),
}

/// Mistral's Tekken: words with upper case before lower case, including the character before them.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GPT-4o and Llama 4: like Tekken, with contractions and up to three digits.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 3.5: like Qwen 2, with combining marks counted as letters.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const SEED_CODER: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The letters that have upper and lower case, in the Unicode version that the model's authors used. Written as numbers,
/// because some look like others and editors normalize them.
const CASED_LETTERS: &str = concat!(
    r"\s?[",
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}",
    r"\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}",
    r"\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}",
    r"\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}",
    r"\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}",
    r"\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}",
    r"\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}",
    r"\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}",
    r"\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}",
    r"\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}",
    r"\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}",
    r"\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}",
    r"\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}",
    r"]+",
);

const DEEPSEEK_LLM: [&str; 6] = [
    r"[\r\n]",
    CASED_LETTERS,
    r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
    r"\s+$",
    CJK,
    r"\p{N}+",
];

const DEEPSEEK_CODER: [&str; 5] = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"];

/// Han and more: these are the model's own ranges.
const CJK: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+";

const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

const FALCON_PUNCTUATION: &str = r"[\p{P}$+<=>^~|`]+";
const FALCON_DIGITS: &str = r"[0-9][0-9][0-9]";

impl PreTokenizer {
    pub fn by_name(name: &str) -> Result<Self, TokenizerError> {
        let plain = |split| Self { split, normalizes: false, ignores_merges: false, adds_bos: false };
        let composed = |split| Self { normalizes: true, ..plain(split) };
        Ok(match name {
            "gpt-2" | "phi-2" | "jais" | "gigachat" | "a.x-4.0" | "mellum" | "trillion" | "granite-docling" => {
                plain(Split::Gpt2)
            }
            "mpt" | "olmo" => composed(Split::Gpt2),
            "smollm" | "starcoder" | "refact" | "codeshell" | "minerva-7b" | "mellum2" => plain(Split::DigitsThenGpt2),
            "command-r" => composed(Split::DigitsThenGpt2),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "midm-2.0" | "lfm2" => {
                Self { ignores_merges: true, adds_bos: true, ..plain(Split::Llama3 { max_digits: 3 }) }
            }
            "glm4" => Self { ignores_merges: true, ..plain(Split::Llama3 { max_digits: 3 }) },
            "smaug-bpe" | "dbrx" | "chatglm-bpe" => plain(Split::Llama3 { max_digits: 3 }),
            "qwen2" | "deepseek-r1-qwen" | "megrez" | "stablelm2" => composed(Split::Llama3 { max_digits: 1 }),
            "hunyuan" | "grok-2" => plain(Split::Llama3 { max_digits: 1 }),
            "qwen35" => composed(patterns(&[QWEN35])),
            "tekken" => Self { ignores_merges: true, adds_bos: true, ..plain(patterns(&[TEKKEN])) },
            "gpt-4o" | "llama4" => plain(patterns(&[GPT4O])),
            "seed-coder" => plain(patterns(&[SEED_CODER])),
            "deepseek-llm" => plain(patterns(&DEEPSEEK_LLM)),
            "deepseek-coder" => plain(patterns(&DEEPSEEK_CODER)),
            "deepseek-v3" | "hunyuan-dense" => plain(patterns(&DEEPSEEK_V3)),
            "falcon" => plain(Split::Falcon(compile(&[FALCON_PUNCTUATION, FALCON_DIGITS]))),
            other => return Err(TokenizerError::UnsupportedPreTokenizer(other.to_owned())),
        })
    }

    /// Calls `word` for each word of a normalized text, in order. The words together are the text.
    pub fn split(&self, text: &str, word: &mut dyn FnMut(&str)) -> Result<(), TokenizerError> {
        match &self.split {
            Split::Gpt2 => split_gpt2(text, word),
            Split::DigitsThenGpt2 => split_single_digits(text, &mut |part, is_digit| match is_digit {
                true => word(part),
                false => split_gpt2(part, word),
            }),
            Split::Llama3 { max_digits } => split_llama3(text, *max_digits, word),
            Split::Patterns(patterns) => split_by_patterns(text, patterns, word)?,
            Split::Falcon(patterns) => return split_falcon(text, patterns, word),
        }
        Ok(())
    }
}

fn patterns(patterns: &[&str]) -> Split {
    Split::Patterns(compile(patterns))
}

fn compile(patterns: &[&str]) -> Vec<Regex> {
    patterns.iter().map(|pattern| Regex::new(pattern).expect("the patterns above are valid, a test says")).collect()
}

/// Recurses once per pattern.
fn split_by_patterns(text: &str, patterns: &[Regex], word: &mut dyn FnMut(&str)) -> Result<(), TokenizerError> {
    let Some((pattern, rest)) = patterns.split_first() else {
        word(text);
        return Ok(());
    };
    let mut end = 0;
    for found in pattern.find_iter(text) {
        let found = found.map_err(|error| TokenizerError::Split(error.to_string()))?;
        for part in [&text[end..found.start()], found.as_str()] {
            if !part.is_empty() {
                split_by_patterns(part, rest, word)?;
            }
        }
        end = found.end();
    }
    if end < text.len() { split_by_patterns(&text[end..], rest, word) } else { Ok(()) }
}

fn split_falcon(text: &str, patterns: &[Regex], word: &mut dyn FnMut(&str)) -> Result<(), TokenizerError> {
    let (punctuation, rest) = patterns.split_at(1);
    let mut result = Ok(());
    split_by_patterns(text, punctuation, &mut |part| {
        split_gpt2(part, &mut |part| {
            if result.is_ok() {
                result = split_by_patterns(part, rest, word);
            }
        });
    })?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::sync::LazyLock;

    const NAMES: [&str; 43] = [
        "gpt-2",
        "phi-2",
        "jais",
        "gigachat",
        "a.x-4.0",
        "mellum",
        "trillion",
        "granite-docling",
        "mpt",
        "olmo",
        "smollm",
        "starcoder",
        "refact",
        "codeshell",
        "minerva-7b",
        "mellum2",
        "command-r",
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "midm-2.0",
        "lfm2",
        "glm4",
        "smaug-bpe",
        "dbrx",
        "chatglm-bpe",
        "qwen2",
        "deepseek-r1-qwen",
        "megrez",
        "stablelm2",
        "hunyuan",
        "grok-2",
        "qwen35",
        "tekken",
        "gpt-4o",
        "llama4",
        "seed-coder",
        "deepseek-llm",
        "deepseek-v3",
        "deepseek-coder",
        "falcon",
    ];

    fn words(name: &str, text: &str) -> Vec<String> {
        static ALL: LazyLock<HashMap<&str, PreTokenizer>> =
            LazyLock::new(|| NAMES.map(|name| (name, PreTokenizer::by_name(name).unwrap())).into());
        let mut words = Vec::new();
        ALL[name].split(text, &mut |word| words.push(word.to_owned())).unwrap();
        words
    }

    #[test]
    fn the_families_split_as_published() {
        let text = "I'll pay  $1234!\n OK";
        assert_eq!(words("gpt-2", text), ["I", "'ll", " pay", " ", " $", "1234", "!", "\n", " OK"]);
        assert_eq!(words("smollm", text), ["I", "'ll", " pay", " ", " $", "1", "2", "3", "4", "!", "\n", " OK"]);
        assert_eq!(words("llama-bpe", text), ["I", "'ll", " pay", " ", " $", "123", "4", "!\n", " OK"]);
        assert_eq!(words("qwen2", text), ["I", "'ll", " pay", " ", " $", "1", "2", "3", "4", "!\n", " OK"]);
        assert_eq!(words("tekken", "XMLHttp'll"), ["XMLHttp", "'ll"]);
        assert_eq!(words("gpt-4o", "XMLHttp'll a/b"), ["XMLHttp'll", " a", "/b"]);
        assert_eq!(words("deepseek-v3", "日本12345 a_b"), ["日本", "123", "45", " a", "_b"]);
        assert_eq!(words("falcon", "a, 12345"), ["a", ",", " ", "123", "45"]);
    }

    #[test]
    fn an_unknown_name_is_refused_by_name() {
        for name in ["", "default", "SmolLM", "bloom"] {
            let error = PreTokenizer::by_name(name).unwrap_err();
            assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
        }
    }

    /// Texts of 200 kB that repeat one thing. No pattern may hit a limit of the regular expression library, and with one that
    /// takes quadratic time this test would take hours.
    #[test]
    fn monotonous_texts_are_split() {
        for unit in ["a", "A", "日", " ", "\n", " \n", "'", "'s", "1", "Aa", "aA", "\u{301}", "! ", "😀"] {
            let text = format!("{}x", unit.repeat(200_000 / unit.len()));
            for name in NAMES {
                let length: usize = words(name, &text).iter().map(String::len).sum();
                assert_eq!(length, text.len(), "{name}: {unit:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn words_join_to_the_text(text in r"([ \n'a-zA-Zé日0-9.!]|\PC){0,40}") {
            for name in NAMES {
                prop_assert_eq!(words(name, &text).concat(), text.as_str(), "{}", name);
            }
        }
    }
}
