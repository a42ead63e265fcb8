//! SHA-256 and size of a file, to verify downloads.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const BUFFER_BYTES: usize = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checksum {
    /// Lower-case hexadecimal.
    pub sha256: String,
    /// In bytes.
    pub size: u64,
}

impl Checksum {
    /// The checksum of everything that `reader` gives.
    pub fn of(mut reader: impl Read) -> io::Result<Self> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut running = RunningChecksum::default();
        loop {
            match reader.read(&mut buffer)? {
                0 => return Ok(running.finish()),
                len => running.update(&buffer[..len]),
            }
        }
    }
}

/// Computes a checksum while the bytes are copied.
#[derive(Clone, Default)]
pub(super) struct RunningChecksum {
    hasher: Sha256,
    size: u64,
}

impl RunningChecksum {
    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn finish(self) -> Checksum {
        let digest = self.hasher.finalize();
        let sha256 = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Checksum { sha256, size: self.size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standards_own_example() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Checksum::of(&b"abc"[..]).unwrap(), Checksum { sha256: expected.to_owned(), size: 3 });
    }
}
