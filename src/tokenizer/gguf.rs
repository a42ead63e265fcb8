//! Builds a tokenizer from the metadata of a GGUF file.

use std::collections::{BTreeMap, HashMap};

use super::Tokenizer;
use super::added_tokens::AddedTokens;
use super::bpe::BytePairEncoder;
use super::byte_level;
use super::chat_template::TemplateSources;
use super::encoder::{Encoder, EncoderKind};
use super::error::TokenizerError;
use super::pieces::{PieceKind, Pieces};
use super::pre_tokenizer::PreTokenizer;
use super::recommended;
use super::special_tokens::{SpecialTokens, is_control_end, is_unmistakable_end};
use super::spm::{self, SentencePieceEncoder};
use crate::formats::gguf::Value;
use crate::types::TokenId;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
const TOOL_USE_TEMPLATE: &str = "tokenizer.chat_template.tool_use";
/// SentencePiece's default ids for the beginning and the end of a text, used if the file gives none.
const SENTENCE_PIECE_ENDS: [(&str, TokenId); 2] = [("bos", 1), ("eos", 2)];

type Metadata = BTreeMap<String, Value>;

/// `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

struct Vocabulary<'a> {
    texts: Vec<&'a str>,
    types: Vec<TokenType>,
}

pub(super) fn load(metadata: &Metadata) -> Result<Tokenizer, TokenizerError> {
    let vocabulary = Vocabulary::read(metadata)?;
    match string(metadata, MODEL)?.ok_or(TokenizerError::MissingKey(MODEL))? {
        "gpt2" => byte_level(metadata, &vocabulary),
        "llama" => sentence_piece(metadata, &vocabulary),
        other => Err(TokenizerError::UnsupportedModel(other.to_owned())),
    }
}

fn byte_level(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Tokenizer, TokenizerError> {
    let name = string(metadata, PRE)?.ok_or(TokenizerError::MissingPreTokenizer)?;
    let pre_tokenizer = PreTokenizer::by_name(name)?;
    let merges = required_array(metadata, MERGES)?;
    let by_text = vocabulary.by_text();
    let mut bpe = BytePairEncoder::new(&by_text, merges.iter().map(Value::as_str))?;
    if pre_tokenizer.ignores_merges {
        let words = (0..).zip(vocabulary.iter()).filter(|(_, (_, ty))| *ty == TokenType::Normal);
        bpe = bpe.with_whole_words(words.map(|(token, (text, _))| (text, token)));
    }
    let mut pieces = Pieces::builder(false, false);
    let mut bytes = Vec::new();
    for (text, ty) in vocabulary.iter() {
        bytes.clear();
        byte_level::decode(text, &mut bytes);
        pieces.push(text, &bytes, piece_kind(ty));
    }
    let adds_bos = pre_tokenizer.adds_bos;
    let added = vocabulary.added(|text| vec![text.to_owned()]);
    let kind = EncoderKind::ByteLevel { added: AddedTokens::new(added)?, pre_tokenizer, bpe };
    finish(metadata, vocabulary, kind, pieces.build(), adds_bos)
}

fn sentence_piece(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Tokenizer, TokenizerError> {
    let scores = required_array(metadata, SCORES)?;
    if scores.len() != vocabulary.texts.len() {
        return Err(TokenizerError::WrongType { key: SCORES, expected: "one score for each token" });
    }
    let add_space_prefix = boolean(metadata, ADD_SPACE_PREFIX)?.unwrap_or(true);
    let mut merged = HashMap::with_capacity_and_hasher(scores.len(), Default::default());
    let mut bytes = [None; 256];
    let mut pieces = Pieces::builder(add_space_prefix, true);
    for (index, ((text, ty), score)) in vocabulary.iter().zip(scores).enumerate() {
        let token = index as TokenId;
        let score = score.as_f64().ok_or(TokenizerError::WrongType { key: SCORES, expected: "an array of numbers" })?;
        match ty {
            TokenType::Byte => {
                let byte = spm::parse_byte(text)
                    .ok_or_else(|| TokenizerError::InvalidByteToken { token: index, text: text.to_owned() })?;
                bytes[usize::from(byte)] = Some(token);
                pieces.push(text, &[byte], PieceKind::Text);
                continue;
            }
            TokenType::Normal | TokenType::UserDefined | TokenType::Unused => {
                let piece = spm::Piece { token, score: score as f32, unused: ty == TokenType::Unused };
                merged.entry(text.into()).or_insert(piece);
            }
            TokenType::Control | TokenType::Unknown => {}
        }
        pieces.push(text, text.replace(spm::SPACE, " ").as_bytes(), piece_kind(ty));
    }
    let unknown = vocabulary.types.iter().position(|&ty| ty == TokenType::Unknown).map(|index| index as TokenId);
    let bytes = bytes.iter().copied().collect::<Option<Vec<_>>>().and_then(|bytes| Box::try_from(bytes).ok());
    let spm = SentencePieceEncoder::new(merged, bytes, unknown, add_space_prefix);
    // Pieces write a space as U+2581; in the text that is searched for added tokens it is a space.
    let added = vocabulary.added(|text| vec![text.to_owned(), text.replace(spm::SPACE, " ")]);
    let kind = EncoderKind::SentencePiece { added: AddedTokens::new(added)?, spm };
    finish(metadata, vocabulary, kind, pieces.build(), true)
}

fn finish(
    metadata: &Metadata,
    vocabulary: &Vocabulary<'_>,
    kind: EncoderKind,
    pieces: Pieces,
    adds_bos: bool,
) -> Result<Tokenizer, TokenizerError> {
    let defaults = match kind {
        EncoderKind::SentencePiece { .. } => &SENTENCE_PIECE_ENDS[..],
        EncoderKind::ByteLevel { .. } | EncoderKind::Json { .. } => &[],
    };
    let special = special_tokens(metadata, vocabulary, defaults)?;
    let add_bos = boolean(metadata, ADD_BOS)?.unwrap_or(adds_bos);
    let add_eos = boolean(metadata, ADD_EOS)?.unwrap_or(false);
    let prefix = special.bos.filter(|_| add_bos);
    let suffix = special.eos.first().copied().filter(|_| add_eos);
    let encoder = Encoder { kind, prefix, suffix };
    Ok(Tokenizer::assemble(encoder, pieces, special, templates(metadata)?, recommended::of_gguf(metadata)))
}

fn special_tokens(
    metadata: &Metadata,
    vocabulary: &Vocabulary<'_>,
    defaults: &[(&str, TokenId)],
) -> Result<SpecialTokens, TokenizerError> {
    let default = |name: &str| {
        let token = defaults.iter().find(|(known, _)| *known == name).map(|&(_, token)| token);
        token.filter(|&token| vocabulary.types.get(token as usize) == Some(&TokenType::Control))
    };
    let id = |name: &str| match token_id(metadata, name, vocabulary.texts.len())? {
        NamedToken::Absent => Ok(default(name)),
        NamedToken::None => Ok(None),
        NamedToken::Id(token) => Ok(Some(token)),
    };
    let mut special = SpecialTokens { bos: id("bos")?, ..SpecialTokens::default() };
    let eos = id("eos")?;
    for token in [eos, id("eot")?, id("eom")?].into_iter().flatten() {
        special.add_eos(token);
    }
    for (index, (text, ty)) in vocabulary.iter().enumerate() {
        if ty == TokenType::Control && is_control_end(text, |text| vocabulary.has(text)) {
            special.add_eos(index as TokenId);
        }
    }
    let named = [
        ("bos_token", special.bos),
        ("eos_token", eos),
        ("unk_token", id("unknown")?),
        ("pad_token", id("padding")?),
        ("sep_token", id("seperator")?),
    ];
    for (name, token) in named {
        if let Some(token) = token {
            special.texts.insert(name.to_owned(), vocabulary.texts[token as usize].to_owned());
        }
    }
    Ok(special)
}

fn templates(metadata: &Metadata) -> Result<TemplateSources, TokenizerError> {
    let default = string(metadata, CHAT_TEMPLATE)?.map(str::to_owned);
    let tool_use = string(metadata, TOOL_USE_TEMPLATE)?.map(str::to_owned);
    Ok(TemplateSources { default, tool_use })
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self, TokenizerError> {
        let texts = required_array(metadata, TOKENS)?.iter().map(Value::as_str).collect::<Option<Vec<_>>>();
        let texts = texts.ok_or(TokenizerError::WrongType { key: TOKENS, expected: "an array of strings" })?;
        if texts.is_empty() || TokenId::try_from(texts.len()).is_err() {
            return Err(TokenizerError::WrongType { key: TOKENS, expected: "a vocabulary of 1 to 2^32 tokens" });
        }
        let types = required_array(metadata, TOKEN_TYPES)?;
        if types.len() != texts.len() {
            return Err(TokenizerError::WrongType { key: TOKEN_TYPES, expected: "one type for each token" });
        }
        let types = types.iter().enumerate().map(|(token, ty)| token_type(token, ty)).collect::<Result<_, _>>()?;
        let mut vocabulary = Self { texts, types };
        vocabulary.correct_types();
        Ok(vocabulary)
    }

    /// Converters often give end-of-turn tokens a wrong type. Tokens with a known text are corrected.
    fn correct_types(&mut self) {
        let is_end = |text: &&str| is_unmistakable_end(text, |text| self.has(text));
        let ends: Vec<usize> = (0..self.texts.len()).filter(|&index| is_end(&self.texts[index])).collect();
        for index in ends {
            if self.types[index] != TokenType::Control {
                let (text, ty) = (self.texts[index], self.types[index]);
                tracing::info!(token = text, ?ty, "treating an end-of-turn token as a control token");
                self.types[index] = TokenType::Control;
            }
        }
    }

    /// Whether a token has this text. Searches the whole vocabulary.
    fn has(&self, text: &str) -> bool {
        self.texts.contains(&text)
    }

    fn iter(&self) -> impl Iterator<Item = (&'a str, TokenType)> {
        self.texts.iter().copied().zip(self.types.iter().copied())
    }

    /// If two tokens have the same text, the one that merging can produce comes first, then the lower id.
    fn by_text(&self) -> HashMap<&'a str, TokenId, ahash::RandomState> {
        let mut by_text = HashMap::with_capacity_and_hasher(self.texts.len(), Default::default());
        for normal in [true, false] {
            for (index, (text, ty)) in self.iter().enumerate() {
                if (ty == TokenType::Normal) == normal {
                    by_text.entry(text).or_insert(index as TokenId);
                }
            }
        }
        by_text
    }

    /// The tokens that are searched for in the raw text, in each of their spellings.
    fn added(&self, spellings: impl Fn(&str) -> Vec<String>) -> Vec<(String, TokenId)> {
        let is_added = |ty| matches!(ty, TokenType::Control | TokenType::UserDefined | TokenType::Unknown);
        let added = self.iter().enumerate().filter(|&(_, (_, ty))| is_added(ty));
        added
            .flat_map(|(index, (text, _))| spellings(text).into_iter().map(move |text| (text, index as TokenId)))
            .collect()
    }
}

fn token_type(token: usize, ty: &Value) -> Result<TokenType, TokenizerError> {
    let id = ty.as_u64().ok_or(TokenizerError::WrongType { key: TOKEN_TYPES, expected: "an array of integers" })?;
    Ok(match id {
        1 => TokenType::Normal,
        2 => TokenType::Unknown,
        3 => TokenType::Control,
        4 => TokenType::UserDefined,
        5 => TokenType::Unused,
        6 => TokenType::Byte,
        _ => return Err(TokenizerError::UnknownTokenType { token, id }),
    })
}

fn piece_kind(ty: TokenType) -> PieceKind {
    match ty {
        TokenType::Control | TokenType::Unknown => PieceKind::Special,
        TokenType::Normal | TokenType::UserDefined | TokenType::Unused | TokenType::Byte => PieceKind::Text,
    }
}

enum NamedToken {
    /// The key is missing.
    Absent,
    /// The file says that there is no such token.
    None,
    Id(TokenId),
}

fn token_id(metadata: &Metadata, name: &str, size: usize) -> Result<NamedToken, TokenizerError> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let Some(value) = metadata.get(&key) else { return Ok(NamedToken::Absent) };
    let id = value.as_u64().unwrap_or(u64::MAX);
    // Converters write the largest integer for "no such token".
    if id == u64::from(u32::MAX) {
        return Ok(NamedToken::None);
    }
    match TokenId::try_from(id) {
        Ok(token) if (token as usize) < size => Ok(NamedToken::Id(token)),
        _ => Err(TokenizerError::TokenOutOfRange { key, id, size }),
    }
}

fn required_array<'a>(metadata: &'a Metadata, key: &'static str) -> Result<&'a [Value], TokenizerError> {
    let value = metadata.get(key).ok_or(TokenizerError::MissingKey(key))?;
    value.as_array().ok_or(TokenizerError::WrongType { key, expected: "an array" })
}

fn string<'a>(metadata: &'a Metadata, key: &'static str) -> Result<Option<&'a str>, TokenizerError> {
    let read = |value: &'a Value| value.as_str().ok_or(TokenizerError::WrongType { key, expected: "a string" });
    metadata.get(key).map(read).transpose()
}

fn boolean(metadata: &Metadata, key: &'static str) -> Result<Option<bool>, TokenizerError> {
    let read = |value: &Value| value.as_bool().ok_or(TokenizerError::WrongType { key, expected: "true or false" });
    metadata.get(key).map(read).transpose()
}

#[cfg(test)]
#[path = "gguf_tests.rs"]
mod tests;
