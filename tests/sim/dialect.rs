//! The bytes between nodes. Every message is encoded and decoded on its way, so that the simulated nodes speak the real wire format;
//! half of the processes write it as a later version would, with fields and frames that this version does not know.

use outrigger::cluster::PeerFrame;
use outrigger::cluster::wire::{
    FrameDecoder, WireMessage, decode_failure, decode_message, encode_failure, encode_frame, encode_message,
};
use outrigger::types::Failure;

use crate::net::Process;

/// A field with number 1000 and a few bytes: the later version's.
const LATER_FIELD: &[u8] = &[0xc2, 0x3e, 3, 1, 2, 3];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Own,
    Later,
}

impl Dialect {
    /// A node changes its version whenever it restarts, as in a rolling upgrade or its way back.
    pub fn of(process: &Process) -> Self {
        if (process.node as u64 + process.incarnation).is_multiple_of(2) { Dialect::Own } else { Dialect::Later }
    }

    /// The message as the other side reads it.
    pub fn message<T: WireMessage>(self, message: &T) -> T {
        let bytes = encode_message(message).expect("simulated messages are small");
        decode_message(&self.grown(&bytes)).expect("every version reads every other")
    }

    pub fn failure(self, failure: Failure) -> Failure {
        decode_failure(&self.grown(&encode_failure(failure))).expect("every version reads every other")
    }

    /// The frames as the other side reads them.
    pub fn frames(self, frame: PeerFrame) -> Vec<PeerFrame> {
        let mut bytes = Vec::new();
        if self == Dialect::Later {
            bytes.extend(framed(LATER_FIELD));
        }
        let mut sent = Vec::new();
        encode_frame(frame, &mut sent);
        bytes.extend(framed(&self.grown(&sent[4..])));
        let mut decoder = FrameDecoder::default();
        decoder.push(&bytes);
        let read = std::iter::from_fn(|| decoder.next_frame().expect("every version reads every other")).collect();
        decoder.finish().expect("whole frames");
        read
    }

    fn grown(self, bytes: &[u8]) -> Vec<u8> {
        let later = if self == Dialect::Later { LATER_FIELD } else { &[] };
        [bytes, later].concat()
    }
}

/// With its length before it.
fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u32).to_le_bytes()[..], message].concat()
}
