//! A tokenizer from a directory in Hugging Face's layout. `tokenizer.json` is read by Hugging Face's library; the other files
//! are treated as in transformers: `tokenizer_config.json` may change which special tokens are added.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::Tokenizer;
use super::byte_level;
use super::chat_template::TemplateSources;
use super::declared_tokens;
use super::encoder::{Encoder, EncoderKind};
use super::error::TokenizerError;
use super::file_set::{
    CHAT_TEMPLATE, CHAT_TEMPLATE_JSON, GENERATION_CONFIG, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, TOKENIZER_FILE,
    TOOL_USE_TEMPLATE, TokenizerFiles,
};
use super::pieces::{PieceKind, Pieces};
use super::recommended;
use super::special_tokens::{SpecialTokens, is_turn_end};
use super::spm::SPACE;
use crate::types::TokenId;

/// The largest in use have 262,144 tokens.
const MAX_VOCABULARY: usize = 1 << 22;

/// The names under which transformers passes special tokens to templates.
const NAMED_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

type Object = Map<String, Value>;

pub(super) fn load(files: &TokenizerFiles) -> Result<Tokenizer, TokenizerError> {
    let text = files.text(TOKENIZER_FILE)?;
    let text = text.ok_or_else(|| TokenizerError::NoTokenizerFile(files.directory().to_owned()))?;
    let mut json = files.json(TOKENIZER_FILE)?.unwrap_or_default();
    let config = files.object(TOKENIZER_CONFIG)?;
    let map = files.object(SPECIAL_TOKENS_MAP)?;
    let named = named_tokens(&config, &map);
    let declared = declared_tokens::complete(&mut json, files, &config, &special_texts(&config, &map, &named))?;
    let tokenizer = match declared.is_empty() {
        true => text.parse(),
        false => json.to_string().parse(),
    };
    let mut tokenizer: tokenizers::Tokenizer =
        tokenizer.map_err(|error: tokenizers::Error| TokenizerError::Library(error.to_string()))?;
    for (token, id) in declared {
        if tokenizer.token_to_id(&token) != Some(id) {
            return Err(TokenizerError::AddedTokenPlace { token, id });
        }
    }
    // Truncation and padding are for training. A prompt is never cut or padded silently.
    tokenizer.with_truncation(None).map_err(|error| TokenizerError::Library(error.to_string()))?;
    tokenizer.with_padding(None);

    let generation = files.object(GENERATION_CONFIG)?;
    let special = special_tokens(&tokenizer, named, &generation);
    let decoder = Decoder::from_json(json.get("decoder").unwrap_or(&Value::Null))?;
    let pieces = pieces(&tokenizer, &decoder)?;
    let encoder = encoder(tokenizer, &config, &special);
    let defaults = recommended::of_generation_config(&generation);
    Ok(Tokenizer::assemble(encoder, pieces, special, templates(files, &config)?, defaults))
}

/// Special tokens are added as `tokenizer.json` says, unless `tokenizer_config.json` says which ones to add.
fn encoder(tokenizer: tokenizers::Tokenizer, config: &Object, special: &SpecialTokens) -> Encoder {
    let flag = |name| config.get(name).and_then(Value::as_bool);
    let (add_bos, add_eos) = (flag("add_bos_token"), flag("add_eos_token"));
    let eos = special.texts.get("eos_token").and_then(|text| tokenizer.token_to_id(text));
    Encoder {
        prefix: special.bos.filter(|_| add_bos == Some(true)),
        suffix: eos.filter(|_| add_eos == Some(true)),
        kind: EncoderKind::Json { frames: add_bos.is_none() && add_eos.is_none(), tokenizer: Box::new(tokenizer) },
    }
}

/// How tokens of a `tokenizer.json` are converted to bytes.
#[derive(Debug, PartialEq, Eq)]
enum Decoder {
    ByteLevel,
    SentencePiece { strips_leading_space: bool, byte_fallback: bool },
}

impl Decoder {
    /// Accepts the decoders of language models. Others (WordPiece, CTC) join tokens by other rules.
    fn from_json(decoder: &Value) -> Result<Self, TokenizerError> {
        let steps = match kind(decoder) {
            "Sequence" => decoder.get("decoders").and_then(Value::as_array).map_or(&[][..], Vec::as_slice),
            _ => std::slice::from_ref(decoder),
        };
        match steps.iter().map(kind).collect::<Vec<_>>().as_slice() {
            ["ByteLevel"] => Ok(Decoder::ByteLevel),
            ["Metaspace"] => {
                Ok(Decoder::SentencePiece { strips_leading_space: prepends(&steps[0]), byte_fallback: false })
            }
            ["Replace", "ByteFallback", "Fuse"] if replaces_space(&steps[0]) => {
                Ok(Decoder::SentencePiece { strips_leading_space: false, byte_fallback: true })
            }
            ["Replace", "ByteFallback", "Fuse", "Strip"] if replaces_space(&steps[0]) && strips_one(&steps[3]) => {
                Ok(Decoder::SentencePiece { strips_leading_space: true, byte_fallback: true })
            }
            kinds => {
                let kind = if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") };
                Err(TokenizerError::Unsupported { what: "the decoder", kind })
            }
        }
    }

    fn push_bytes(&self, token: &str, bytes: &mut Vec<u8>) {
        match self {
            Decoder::ByteLevel => byte_level::decode(token, bytes),
            Decoder::SentencePiece { byte_fallback, .. } => match super::spm::parse_byte(token) {
                Some(byte) if *byte_fallback => bytes.push(byte),
                _ => bytes.extend_from_slice(token.replace(SPACE, " ").as_bytes()),
            },
        }
    }
}

fn kind(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or("none")
}

fn prepends(metaspace: &Value) -> bool {
    let scheme = metaspace.get("prepend_scheme").and_then(Value::as_str);
    let flag = metaspace.get("add_prefix_space").and_then(Value::as_bool);
    scheme.map_or(flag.unwrap_or(true), |scheme| scheme != "never")
}

fn replaces_space(step: &Value) -> bool {
    let pattern = step.pointer("/pattern/String").and_then(Value::as_str);
    pattern == Some("▁") && step.get("content").and_then(Value::as_str) == Some(" ")
}

fn strips_one(step: &Value) -> bool {
    let number = |name| step.get(name).and_then(Value::as_u64);
    step.get("content").and_then(Value::as_str) == Some(" ") && number("start") == Some(1) && number("stop") == Some(0)
}

#[expect(clippy::iter_over_hash_type, reason = "of two texts with one id the lesser one is taken, in any order")]
fn pieces(tokenizer: &tokenizers::Tokenizer, decoder: &Decoder) -> Result<Pieces, TokenizerError> {
    let vocabulary = tokenizer.get_vocab(true);
    let size = vocabulary.values().max().map_or(0, |&highest| highest as usize + 1);
    if size > MAX_VOCABULARY {
        return Err(TokenizerError::Library(format!("token {} is beyond {MAX_VOCABULARY}", size - 1)));
    }
    let mut texts = vec![""; size];
    for (text, &token) in &vocabulary {
        // If two texts have the same id, the choice must not depend on the order of the map.
        let place = &mut texts[token as usize];
        *place = if place.is_empty() { text } else { (*place).min(text) };
    }
    let added = tokenizer.get_added_tokens_decoder();
    let (strips, bytewise) = match decoder {
        Decoder::ByteLevel => (false, false),
        Decoder::SentencePiece { strips_leading_space, .. } => (*strips_leading_space, true),
    };
    let mut pieces = Pieces::builder(strips, bytewise);
    let mut bytes = Vec::new();
    for (index, text) in texts.into_iter().enumerate() {
        let added = added.get(&(index as TokenId));
        bytes.clear();
        let text = added.map_or(text, |added| added.content.as_str());
        decoder.push_bytes(text, &mut bytes);
        let special = added.is_some_and(|added| added.special);
        pieces.push(text, &bytes, if special { PieceKind::Special } else { PieceKind::Text });
    }
    Ok(pieces.build())
}

/// The texts of the named tokens. `tokenizer_config.json` takes precedence over the older `special_tokens_map.json`.
fn named_tokens(config: &Object, map: &Object) -> Vec<(&'static str, String)> {
    let named = NAMED_TOKENS.into_iter().filter_map(|name| {
        let token = config.get(name).and_then(token_text).or_else(|| map.get(name).and_then(token_text))?;
        Some((name, token.to_owned()))
    });
    named.collect()
}

/// The text of a token, which is given as a string or as an object that contains it.
fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content").and_then(Value::as_str))
}

/// The texts of all special tokens, including those without a name.
fn special_texts(config: &Object, map: &Object, named: &[(&'static str, String)]) -> BTreeSet<String> {
    let mut texts: BTreeSet<String> = named.iter().map(|(_, text)| text.clone()).collect();
    for list in ["additional_special_tokens", "extra_special_tokens"] {
        for tokens in [config.get(list), map.get(list)].into_iter().flatten() {
            match tokens {
                Value::Array(tokens) => texts.extend(tokens.iter().filter_map(token_text).map(str::to_owned)),
                Value::Object(tokens) => texts.extend(tokens.values().filter_map(token_text).map(str::to_owned)),
                _ => {}
            }
        }
    }
    texts.remove("");
    texts
}

fn special_tokens(
    tokenizer: &tokenizers::Tokenizer,
    named: Vec<(&'static str, String)>,
    generation: &Object,
) -> SpecialTokens {
    let mut special = SpecialTokens::default();
    for (name, text) in named {
        let token = tokenizer.token_to_id(&text);
        match name {
            "bos_token" => special.bos = token,
            "eos_token" => token.into_iter().for_each(|token| special.add_eos(token)),
            _ => {}
        }
        special.texts.insert(name.to_owned(), text);
    }
    let ends = match generation.get("eos_token_id") {
        Some(Value::Array(ends)) => ends.as_slice(),
        Some(end) => std::slice::from_ref(end),
        None => &[],
    };
    ends.iter().filter_map(Value::as_u64).filter_map(|end| end.try_into().ok()).for_each(|end| special.add_eos(end));
    let added = tokenizer.get_added_tokens_decoder();
    let mut turn_ends: Vec<TokenId> = added
        .iter()
        .filter(|(_, token)| token.special && is_turn_end(&token.content, |text| tokenizer.token_to_id(text).is_some()))
        .map(|(&id, _)| id)
        .collect();
    turn_ends.sort_unstable();
    turn_ends.into_iter().for_each(|token| special.add_eos(token));
    special
}

/// A template file takes precedence over `tokenizer_config.json`, which holds one template or a list of named ones.
fn templates(files: &TokenizerFiles, config: &Object) -> Result<TemplateSources, TokenizerError> {
    let mut sources = TemplateSources::default();
    read_templates(config.get("chat_template"), &mut sources);
    read_templates(files.object(CHAT_TEMPLATE_JSON)?.get("chat_template"), &mut sources);
    if let Some(template) = files.text(CHAT_TEMPLATE)? {
        sources.default = Some(template.to_owned());
    }
    if let Some(template) = files.text(TOOL_USE_TEMPLATE)? {
        sources.tool_use = Some(template.to_owned());
    }
    Ok(sources)
}

/// Reads one template, a list of objects with name and template, or a map of templates by name.
fn read_templates(templates: Option<&Value>, sources: &mut TemplateSources) {
    let mut put = |name: Option<&str>, template: Option<&str>| match (name, template) {
        (Some("default"), Some(template)) => sources.default = Some(template.to_owned()),
        (Some("tool_use"), Some(template)) => sources.tool_use = Some(template.to_owned()),
        _ => {}
    };
    match templates {
        Some(Value::String(template)) => put(Some("default"), Some(template)),
        Some(Value::Array(templates)) => {
            for template in templates {
                let field = |name| template.get(name).and_then(Value::as_str);
                put(field("name"), field("template"));
            }
        }
        Some(Value::Object(templates)) => {
            templates.iter().for_each(|(name, template)| put(Some(name), template.as_str()));
        }
        _ => {}
    }
}
