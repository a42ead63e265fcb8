//! The name and the bytes of each token, in one table. Decoding needs nothing else of the vocabulary.

use crate::types::TokenId;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceKind {
    Text,
    /// Control tokens, which clients usually do not want to see.
    Special,
}

#[derive(Debug)]
pub(super) struct Pieces {
    names: PackedPieces,
    bytes: PackedPieces,
    special: Vec<bool>,
    strips_leading_space: bool,
    replaces_bytewise: bool,
}

impl Pieces {
    /// `strips_leading_space`: encoding puts a space before the text, and decoding removes it. `replaces_bytewise`: each byte
    /// of an invalid sequence becomes one U+FFFD, as in SentencePiece.
    pub fn builder(strips_leading_space: bool, replaces_bytewise: bool) -> PiecesBuilder {
        PiecesBuilder(Pieces {
            names: PackedPieces::default(),
            bytes: PackedPieces::default(),
            special: Vec::new(),
            strips_leading_space,
            replaces_bytewise,
        })
    }

    pub fn len(&self) -> usize {
        self.special.len()
    }

    /// Empty for ids outside the vocabulary.
    pub fn bytes(&self, token: TokenId) -> &[u8] {
        self.bytes.get(token)
    }

    /// The token as written in the vocabulary; empty outside it.
    pub fn name(&self, token: TokenId) -> &str {
        std::str::from_utf8(self.names.get(token)).expect("names are pushed as text")
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

/// Pieces are added in the order of their ids.
pub(super) struct PiecesBuilder(Pieces);

impl PiecesBuilder {
    /// `name` is the token as written in the vocabulary.
    pub fn push(&mut self, name: &str, bytes: &[u8], kind: PieceKind) {
        self.0.names.push(name.as_bytes());
        self.0.bytes.push(bytes);
        self.0.special.push(kind == PieceKind::Special);
    }

    pub fn build(self) -> Pieces {
        self.0
    }
}

/// Many short pieces in one allocation.
#[derive(Debug, Default)]
struct PackedPieces {
    bytes: Vec<u8>,
    /// Piece `i` is `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
}

impl PackedPieces {
    fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        self.ends.push(u32::try_from(self.bytes.len()).expect("a vocabulary's text is far below 4 GiB"));
    }

    /// Empty if there is no such piece.
    fn get(&self, token: TokenId) -> &[u8] {
        let index = token as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start as usize..end as usize]
    }
}
