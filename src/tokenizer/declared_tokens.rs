//! Tokens that are declared outside `tokenizer.json`: in `added_tokens_decoder` of `tokenizer_config.json`, in
//! `added_tokens.json`, and as named special tokens. Like transformers, this module adds those that `tokenizer.json` lacks, so
//! that each becomes one token and is not split.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::error::TokenizerError;
use super::file_set::{ADDED_TOKENS, TokenizerFiles};
use crate::types::TokenId;

/// A token, and the id that it must have.
struct Declared {
    id: TokenId,
    token: AddedToken,
}

/// Adds the declared tokens to a `tokenizer.json` that lacks them. Returns the added tokens, and the ids that the finished
/// tokenizer must give them.
///
/// `named` are the texts of special tokens. If two files give a token different ids, `tokenizer.json` wins.
pub(super) fn complete(
    json: &mut Value,
    files: &TokenizerFiles,
    config: &Map<String, Value>,
    named: &BTreeSet<String>,
) -> Result<Vec<(String, TokenId)>, TokenizerError> {
    let mut missing: Vec<Declared> = Vec::new();
    let known = Known::of(json);
    for declared in declared(files, config, named)? {
        let content = &declared.token.content;
        if known.added.contains_key(content.as_str()) {
            continue;
        }
        let id = known.id(content).unwrap_or(declared.id);
        if id != declared.id {
            let expected = declared.id;
            tracing::warn!(token = content, id, expected, "tokenizer.json gives a token another id, which is used");
        }
        if let Some(other) = known.text(id).filter(|other| other != content) {
            return Err(TokenizerError::AddedToken { token: content.clone(), id, other: other.to_owned() });
        }
        missing.push(Declared { id, ..declared });
    }
    // Special tokens that are ordinary tokens in the vocabulary. Single characters stay text: some models use `!` for padding.
    for content in named.iter().filter(|content| content.chars().count() > 1) {
        let is_known = known.added.contains_key(content.as_str())
            || missing.iter().any(|declared| declared.token.content == *content);
        if let Some(id) = known.id(content).filter(|_| !is_known) {
            missing.push(Declared { id, token: AddedToken::from(content.clone(), true) });
        }
    }
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    let ids = missing.iter().map(|declared| (declared.token.content.clone(), declared.id)).collect();
    insert(json, missing);
    Ok(ids)
}

/// The tokens of a `tokenizer.json`.
struct Known<'a> {
    vocabulary: &'a Value,
    /// Tokens that are searched for in the raw text.
    added: BTreeMap<&'a str, TokenId>,
}

impl<'a> Known<'a> {
    fn of(json: &'a Value) -> Self {
        let added = json.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
        let added = added.filter_map(|token| Some((token.get("content")?.as_str()?, token.get("id").and_then(as_id)?)));
        Self { vocabulary: json.pointer("/model/vocab").unwrap_or(&Value::Null), added: added.collect() }
    }

    fn id(&self, content: &str) -> Option<TokenId> {
        let in_vocabulary = || match self.vocabulary {
            Value::Object(ids) => ids.get(content).and_then(as_id),
            // Unigram models have a list of texts and scores.
            Value::Array(pieces) => {
                pieces.iter().position(|piece| piece.get(0) == Some(&content.into()))?.try_into().ok()
            }
            _ => None,
        };
        self.added.get(content).copied().or_else(in_vocabulary)
    }

    fn text(&self, id: TokenId) -> Option<&'a str> {
        let added = self.added.iter().find(|(_, known)| **known == id).map(|(content, _)| *content);
        added.or_else(|| match self.vocabulary {
            Value::Object(ids) => ids.iter().find(|(_, known)| as_id(known) == Some(id)).map(|(text, _)| text.as_str()),
            Value::Array(pieces) => pieces.get(id as usize)?.get(0)?.as_str(),
            _ => None,
        })
    }
}

/// The declared tokens, by id. `added_tokens.json` is the older format, and counts only for tokens that the configuration does
/// not declare.
fn declared(
    files: &TokenizerFiles,
    config: &Map<String, Value>,
    named: &BTreeSet<String>,
) -> Result<Vec<Declared>, TokenizerError> {
    let mut tokens: BTreeMap<TokenId, AddedToken> = BTreeMap::new();
    let decoder = config.get("added_tokens_decoder").and_then(Value::as_object);
    for (id, token) in decoder.into_iter().flatten() {
        let content = token.get("content").and_then(Value::as_str);
        let (Ok(id), Some(content)) = (id.parse(), content) else {
            let (key, expected) = ("added_tokens_decoder", "token ids with an object that has a content");
            return Err(TokenizerError::WrongType { key, expected });
        };
        let flag = |name| token.get(name).and_then(Value::as_bool);
        let special = flag("special").unwrap_or(false);
        let token = AddedToken::from(content, special)
            .single_word(flag("single_word").unwrap_or(false))
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .normalized(flag("normalized").unwrap_or(!special));
        tokens.insert(id, token);
    }
    let contents: BTreeSet<String> = tokens.values().map(|token| token.content.clone()).collect();
    for (content, id) in files.object(ADDED_TOKENS)? {
        let expected = "token ids by the tokens' texts";
        let id = as_id(&id).ok_or(TokenizerError::WrongType { key: ADDED_TOKENS, expected })?;
        if !contents.contains(&content) {
            let special = named.contains(&content);
            tokens.entry(id).or_insert_with(|| AddedToken::from(content, special));
        }
    }
    Ok(tokens.into_iter().map(|(id, token)| Declared { id, token }).collect())
}

/// Adds the tokens to the list of added tokens.
///
/// The library numbers added tokens from the vocabulary's size on, unless the vocabulary contains them. So if the vocabulary is
/// a map with ids, all added tokens are put there as well.
fn insert(json: &mut Value, missing: Vec<Declared>) {
    let mut tokens = match json.get_mut("added_tokens") {
        Some(Value::Array(tokens)) => std::mem::take(tokens),
        _ => Vec::new(),
    };
    tokens.extend(missing.into_iter().map(|Declared { id, token }| {
        serde_json::json!({
            "id": id, "content": token.content, "single_word": token.single_word, "lstrip": token.lstrip,
            "rstrip": token.rstrip, "normalized": token.normalized, "special": token.special
        })
    }));
    tokens.sort_by_key(|token| token.get("id").and_then(Value::as_u64));
    if let Some(Value::Object(vocabulary)) = json.pointer_mut("/model/vocab") {
        for token in &tokens {
            if let (Some(content), Some(id)) = (token.get("content").and_then(Value::as_str), token.get("id")) {
                vocabulary.entry(content).or_insert_with(|| id.clone());
            }
        }
    }
    json["added_tokens"] = Value::Array(tokens);
}

fn as_id(value: &Value) -> Option<TokenId> {
    value.as_u64().and_then(|id| id.try_into().ok())
}

#[cfg(test)]
#[path = "declared_tokens_tests.rs"]
mod tests;
