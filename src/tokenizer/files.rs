//! A tokenizer from a directory as Hugging Face publishes them. `tokenizer.json` is read by the library that defines
//! it; what stands around it follows transformers: `tokenizer_config.json` may override how texts are framed.

use std::path::Path;

use serde_json::{Map, Value};

use super::Tokenizer;
use super::byte_level;
use super::chat_template::TemplateSources;
use super::encoder::{Encoder, EncoderKind};
use super::error::TokenizerError;
use super::pieces::{PieceKind, Pieces};
use super::special_tokens::{SpecialTokens, TURN_ENDS};
use super::spm::SPACE;
use crate::types::TokenId;

const TOKENIZER: &str = "tokenizer.json";
/// The largest in use are some 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// The largest in use have 262,144 tokens.
const MAX_VOCABULARY: usize = 1 << 22;

/// The names under which transformers passes special tokens to templates.
const NAMED_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

type Object = Map<String, Value>;

pub(super) fn load(directory: &Path) -> Result<Tokenizer, TokenizerError> {
    let path = directory.join(TOKENIZER);
    let text =
        read(&path, MAX_TOKENIZER_BYTES)?.ok_or_else(|| TokenizerError::NoTokenizerFile(directory.to_owned()))?;
    let json = parse(&path, &text)?;
    let mut tokenizer: tokenizers::Tokenizer =
        text.parse().map_err(|error: tokenizers::Error| TokenizerError::Library(error.to_string()))?;
    // These are for training batches; a prompt is never cut or padded silently.
    tokenizer.with_truncation(None).map_err(|error| TokenizerError::Library(error.to_string()))?;
    tokenizer.with_padding(None);

    let config = read_object(&directory.join("tokenizer_config.json"))?;
    let named = named_tokens(directory, &config)?;
    let special = special_tokens(directory, &tokenizer, named)?;
    let decoder = Decoder::from_json(json.get("decoder").unwrap_or(&Value::Null))?;
    let pieces = pieces(&tokenizer, &decoder)?;
    let encoder = encoder(tokenizer, &config, &special);
    Ok(Tokenizer::assemble(encoder, pieces, special, templates(directory, &config)?))
}

/// The framing is the file's own, unless `tokenizer_config.json` says which tokens to add.
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

/// How the tokens of a `tokenizer.json` become bytes.
#[derive(Debug, PartialEq, Eq)]
enum Decoder {
    ByteLevel,
    SentencePiece { strips_leading_space: bool, byte_fallback: bool },
}

impl Decoder {
    /// Accepts what language models use. Others (WordPiece, CTC) join tokens by rules of their own.
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

fn pieces(tokenizer: &tokenizers::Tokenizer, decoder: &Decoder) -> Result<Pieces, TokenizerError> {
    let vocabulary = tokenizer.get_vocab(true);
    let size = vocabulary.values().max().map_or(0, |&highest| highest as usize + 1);
    if size > MAX_VOCABULARY {
        return Err(TokenizerError::Library(format!("token {} is beyond {MAX_VOCABULARY}", size - 1)));
    }
    let mut texts = vec![""; size];
    for (text, &token) in &vocabulary {
        // The same whatever the order of the map, should two texts have one id.
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
        decoder.push_bytes(added.map_or(text, |added| added.content.as_str()), &mut bytes);
        let special = added.is_some_and(|added| added.special);
        pieces.push(&bytes, if special { PieceKind::Special } else { PieceKind::Text });
    }
    Ok(pieces.build())
}

/// The texts of the named tokens; `tokenizer_config.json` goes before the older `special_tokens_map.json`.
fn named_tokens(directory: &Path, config: &Object) -> Result<Vec<(&'static str, String)>, TokenizerError> {
    let map = read_object(&directory.join("special_tokens_map.json"))?;
    let text = |value: &Value| {
        let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
        text.map(str::to_owned)
    };
    let named = NAMED_TOKENS.into_iter().filter_map(|name| {
        let token = config.get(name).and_then(text).or_else(|| map.get(name).and_then(text))?;
        Some((name, token))
    });
    Ok(named.collect())
}

fn special_tokens(
    directory: &Path,
    tokenizer: &tokenizers::Tokenizer,
    named: Vec<(&'static str, String)>,
) -> Result<SpecialTokens, TokenizerError> {
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
    let generation = read_object(&directory.join("generation_config.json"))?;
    let ends = match generation.get("eos_token_id") {
        Some(Value::Array(ends)) => ends.as_slice(),
        Some(end) => std::slice::from_ref(end),
        None => &[],
    };
    ends.iter().filter_map(Value::as_u64).filter_map(|end| end.try_into().ok()).for_each(|end| special.add_eos(end));
    let added = tokenizer.get_added_tokens_decoder();
    let mut turn_ends: Vec<TokenId> = added
        .iter()
        .filter(|(_, token)| token.special && TURN_ENDS.contains(&token.content.as_str()))
        .map(|(&id, _)| id)
        .collect();
    turn_ends.sort_unstable();
    turn_ends.into_iter().for_each(|token| special.add_eos(token));
    Ok(special)
}

/// A file of its own goes before what `tokenizer_config.json` holds: one template, or a list of named ones.
fn templates(directory: &Path, config: &Object) -> Result<TemplateSources, TokenizerError> {
    let mut sources = TemplateSources::default();
    match config.get("chat_template") {
        Some(Value::String(template)) => sources.default = Some(template.clone()),
        Some(Value::Array(templates)) => {
            for template in templates {
                let field = |name| template.get(name).and_then(Value::as_str);
                match field("name") {
                    Some("default") => sources.default = field("template").map(str::to_owned),
                    Some("tool_use") => sources.tool_use = field("template").map(str::to_owned),
                    _ => {}
                }
            }
        }
        _ => {}
    }
    let json = read_object(&directory.join("chat_template.json"))?;
    if let Some(template) = json.get("chat_template").and_then(Value::as_str) {
        sources.default = Some(template.to_owned());
    }
    if let Some(template) = read(&directory.join("chat_template.jinja"), MAX_CONFIG_BYTES)? {
        sources.default = Some(template);
    }
    if let Some(template) = read(&directory.join("additional_chat_templates/tool_use.jinja"), MAX_CONFIG_BYTES)? {
        sources.tool_use = Some(template);
    }
    Ok(sources)
}

/// Empty when there is no such file.
fn read_object(path: &Path) -> Result<Object, TokenizerError> {
    let Some(text) = read(path, MAX_CONFIG_BYTES)? else { return Ok(Object::new()) };
    match parse(path, &text)? {
        Value::Object(object) => Ok(object),
        _ => Err(TokenizerError::Json { path: path.to_owned(), reason: "it is not an object".to_owned() }),
    }
}

fn parse(path: &Path, text: &str) -> Result<Value, TokenizerError> {
    serde_json::from_str(text)
        .map_err(|error| TokenizerError::Json { path: path.to_owned(), reason: error.to_string() })
}

/// `None` when there is no such file.
fn read(path: &Path, limit: u64) -> Result<Option<String>, TokenizerError> {
    let io = |source| TokenizerError::Io { path: path.to_owned(), source };
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    if length > limit {
        return Err(TokenizerError::TooLarge { path: path.to_owned(), limit });
    }
    std::fs::read_to_string(path).map(Some).map_err(io)
}
