//! GPT-2's byte-level alphabet: one printable character per byte, so that vocabularies can be written as text.

use std::sync::LazyLock;

/// Bytes that are not printable Latin-1 characters are mapped to the characters from here on, in order.
const FIRST_SUBSTITUTE: u32 = 256;

static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = FIRST_SUBSTITUTE;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if stands_for_itself(byte) {
            return char::from(byte);
        }
        let substitute = char::from_u32(next).expect("at most 256 characters above U+0100");
        next += 1;
        substitute
    })
});

static BYTES: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let mut bytes = vec![None; 2 * FIRST_SUBSTITUTE as usize];
    for (byte, &character) in CHARS.iter().enumerate() {
        bytes[character as usize] = Some(byte as u8);
    }
    bytes
});

fn stands_for_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The character that stands for a byte.
pub(super) fn char_of(byte: u8) -> char {
    CHARS[usize::from(byte)]
}

/// The byte that a character stands for.
pub(super) fn byte_of(character: char) -> Option<u8> {
    BYTES.get(character as usize).copied().flatten()
}

/// Appends the bytes of a token. A token with a character outside the alphabet is taken literally.
pub(super) fn decode(token: &str, bytes: &mut Vec<u8>) {
    match token.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
        Some(decoded) => bytes.extend_from_slice(&decoded),
        None => bytes.extend_from_slice(token.as_bytes()),
    }
}

/// Whether all characters of a token are in the alphabet, so that merging can produce it.
pub(super) fn spells(token: &str) -> bool {
    token.chars().all(|character| byte_of(character).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_character_of_its_own() {
        for byte in 0..=255 {
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
        // Values from published vocabularies.
        assert_eq!((char_of(b' '), char_of(b'\n'), char_of(0xAD), char_of(b'a')), ('Ġ', 'Ċ', 'Ń', 'a'));
    }

    #[test]
    fn a_foreign_character_makes_the_token_stand_for_itself() {
        let mut bytes = Vec::new();
        decode("Ġa", &mut bytes);
        decode("Ġ日", &mut bytes);
        assert_eq!(bytes, [b" a".as_slice(), "Ġ日".as_bytes()].concat());
        assert!(spells("Ġa") && !spells("Ġ日"));
    }
}
