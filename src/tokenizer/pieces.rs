//! The bytes that each token stands for, in one table. Decoding needs nothing else of the vocabulary.

use crate::types::TokenId;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceKind {
    Text,
    /// Control tokens, which a client usually does not want to see.
    Special,
}

#[derive(Debug)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// Piece `i` is `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
    special: Vec<bool>,
    strips_leading_space: bool,
    replaces_bytewise: bool,
}

impl Pieces {
    /// `strips_leading_space`: encoding puts a space before the text, decoding takes it away again.
    /// `replaces_bytewise`: every byte of an invalid sequence becomes a U+FFFD of its own, as SentencePiece does.
    pub fn builder(strips_leading_space: bool, replaces_bytewise: bool) -> PiecesBuilder {
        PiecesBuilder(Pieces {
            bytes: Vec::new(),
            ends: Vec::new(),
            special: Vec::new(),
            strips_leading_space,
            replaces_bytewise,
        })
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Empty for ids outside the vocabulary.
    pub fn bytes(&self, token: TokenId) -> &[u8] {
        let index = token as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start as usize..end as usize]
    }

    pub fn is_special(&self, token: TokenId) -> bool {
        self.special.get(token as usize).copied().unwrap_or(false)
    }

    pub fn strips_leading_space(&self) -> bool {
        self.strips_leading_space
    }

    pub fn replaces_bytewise(&self) -> bool {
        self.replaces_bytewise
    }
}

/// Pieces are pushed in the order of their ids.
pub(super) struct PiecesBuilder(Pieces);

impl PiecesBuilder {
    pub fn push(&mut self, bytes: &[u8], kind: PieceKind) {
        self.0.bytes.extend_from_slice(bytes);
        self.0.ends.push(u32::try_from(self.0.bytes.len()).expect("a vocabulary's text is far below 4 GiB"));
        self.0.special.push(kind == PieceKind::Special);
    }

    pub fn build(self) -> Pieces {
        self.0
    }
}
