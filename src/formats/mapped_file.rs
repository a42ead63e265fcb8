//! A read-only memory map of a whole file.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;

/// The bytes of a file, paged in as they are read. An empty file has no bytes.
#[derive(Debug)]
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    #[expect(unsafe_code, reason = "a map of a file may change under its reader")]
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        // SAFETY: the map is read-only and private to this process. Model files are replaced by renaming a new file
        // into place, never rewritten, so the bytes behind the map do not change; somebody who truncates the file by
        // hand while it is being loaded ends the process with SIGBUS, as for every program that maps its input.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self { map })
    }

    /// Asks the system to read these bytes ahead from the disk.
    pub fn read_ahead(&self, range: Range<usize>) {
        // Only advice: if it is ignored, the bytes are read when they are needed.
        #[cfg(unix)]
        let _ = self.map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
