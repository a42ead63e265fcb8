//! Converts text to token ids and back; chat templates; stop strings. Knows nothing of requests, models or the engine.
//!
//! A tokenizer is read from a GGUF file's metadata or from a directory with a `tokenizer.json`. Formats that we do not support
//! are refused by name: a wrong guess would produce tokens that the model has never seen.

mod added_tokens;
mod bpe;
pub mod bundle;
mod byte_level;
mod char_class;
mod chat_template;
mod declared_tokens;
mod detokenizer;
mod encoder;
mod error;
mod file_set;
mod files;
mod gguf;
mod merge;
mod pieces;
mod pre_tokenizer;
mod python;
mod recommended;
mod special_tokens;
mod split;
mod spm;
mod stop_matcher;
mod strftime;
mod template_traits;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

pub use bundle::{BundleError, TokenizerBundle};
pub use chat_template::{ChatTemplate, ChatTemplateError};
pub use detokenizer::Detokenizer;
pub use error::TokenizerError;
pub use file_set::{TOKENIZER_FILE, TOKENIZER_FILES, TokenizerFiles};
pub use stop_matcher::{StopMatcher, StopOutcome};
pub use template_traits::{Arguments, Content, TemplateTraits};

use crate::formats::gguf::Value;
use crate::types::{SamplingDefaults, TokenId};
use chat_template::TemplateSources;
use encoder::Encoder;
use pieces::Pieces;
use special_tokens::SpecialTokens;

/// The tokenizer of one model. Cloning is cheap; all methods may be called from any thread.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    shared: Arc<LoadedTokenizer>,
    templates: Arc<TemplateSources>,
}

#[derive(Debug)]
struct LoadedTokenizer {
    encoder: Encoder,
    pieces: Arc<Pieces>,
    special: SpecialTokens,
    sampling_defaults: SamplingDefaults,
}

impl Tokenizer {
    /// Builds the tokenizer from the metadata of a GGUF file.
    pub fn from_gguf(metadata: &BTreeMap<String, Value>) -> Result<Self, TokenizerError> {
        gguf::load(metadata)
    }

    /// Builds the tokenizer from a directory with a `tokenizer.json` and, if present, the other [`TOKENIZER_FILES`].
    pub fn from_dir(directory: &Path) -> Result<Self, TokenizerError> {
        Self::from_files(&TokenizerFiles::read(directory)?)
    }

    /// Builds the tokenizer from these files.
    pub fn from_files(files: &TokenizerFiles) -> Result<Self, TokenizerError> {
        files::load(files)
    }

    fn assemble(
        encoder: Encoder,
        pieces: Pieces,
        special: SpecialTokens,
        templates: TemplateSources,
        sampling_defaults: SamplingDefaults,
    ) -> Self {
        let shared = LoadedTokenizer { encoder, pieces: Arc::new(pieces), special, sampling_defaults };
        Self { shared: Arc::new(shared), templates: Arc::new(templates) }
    }

    /// Replaces the chat templates of the model.
    pub fn with_chat_template(self, source: String) -> Self {
        Self { templates: Arc::new(TemplateSources { default: Some(source), tool_use: None }), ..self }
    }

    /// The ids of a text. Special tokens written in the text become those tokens, as rendered chat templates require.
    /// `add_special_tokens` adds the tokens that the model expects around a text (often one at the beginning). Rendered chat
    /// templates already contain them and pass `false`.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, TokenizerError> {
        self.shared.encoder.encode(text, add_special_tokens)
    }

    /// The text of the ids, as a complete text: a space that encoding puts before the first word is removed. Ids outside the
    /// vocabulary have no text.
    pub fn decode(&self, tokens: &[TokenId], skip_special_tokens: bool) -> String {
        let mut detokenizer = Detokenizer::new(self.shared.pieces.clone(), skip_special_tokens, true);
        let mut text = String::new();
        for &token in tokens {
            detokenizer.push_to(token, &mut text);
        }
        text.push_str(&detokenizer.finish());
        text
    }

    /// Where the text of each id begins in the output of [`Tokenizer::decode`], in characters. An id that continues an
    /// incomplete character begins where that character begins.
    pub fn offsets(&self, tokens: &[TokenId], skip_special_tokens: bool) -> Vec<usize> {
        let mut detokenizer = Detokenizer::new(self.shared.pieces.clone(), skip_special_tokens, true);
        let mut characters = 0;
        let offset = |&token: &TokenId| {
            let offset = characters;
            characters += detokenizer.push(token).chars().count();
            offset
        };
        tokens.iter().map(offset).collect()
    }

    /// A detokenizer for text that continues a prompt: a space at its beginning is kept. The pieces join to the output of
    /// [`Tokenizer::decode`]; with SentencePiece, to what it returns beyond the prompt.
    pub fn detokenizer(&self, skip_special_tokens: bool) -> Detokenizer {
        Detokenizer::new(self.shared.pieces.clone(), skip_special_tokens, false)
    }

    /// The highest id plus one.
    pub fn vocab_size(&self) -> usize {
        self.shared.pieces.len()
    }

    /// A token as written in the vocabulary, which differs from its text: `Ġsea` is ` sea`. `None` outside the vocabulary.
    pub fn token_name(&self, token: TokenId) -> Option<&str> {
        ((token as usize) < self.vocab_size()).then(|| self.shared.pieces.name(token))
    }

    /// The model's recommended values for sampling parameters that a request leaves out.
    pub fn sampling_defaults(&self) -> &SamplingDefaults {
        &self.shared.sampling_defaults
    }

    /// The text of a single token. Bytes that are not a complete character become U+FFFD. `None` outside the vocabulary.
    pub fn token_text(&self, token: TokenId) -> Option<String> {
        let known = (token as usize) < self.vocab_size();
        known.then(|| String::from_utf8_lossy(self.shared.pieces.bytes(token)).into_owned())
    }

    /// The bytes of a token; empty outside the vocabulary.
    pub fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        self.shared.pieces.bytes(token).to_vec()
    }

    /// Whether it is a control token, which `skip_special_tokens` removes from the text.
    pub fn is_special(&self, token: TokenId) -> bool {
        self.shared.pieces.is_special(token)
    }

    /// The token that `encode` puts before a text, if the model expects one.
    pub fn bos_token_id(&self) -> Option<TokenId> {
        self.shared.special.bos
    }

    /// The tokens that end a generation; those of the model's configuration come first. May be empty.
    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.shared.special.eos
    }

    /// The texts of the special tokens, by the names that chat templates use (`bos_token`, `eos_token`, …).
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.shared.special.texts
    }

    /// The model's compiled chat template. If it has none, every rendering fails with [`ChatTemplateError::Missing`].
    pub fn chat_template(&self) -> Result<ChatTemplate, ChatTemplateError> {
        ChatTemplate::from_sources(&self.templates, self.special_tokens())
    }
}
