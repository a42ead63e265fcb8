//! The transport of a node without peers.

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::cluster::{
    FollowCall, GenerateCall, JournalBatch, JournalRecord, JournalRefusal, Peer, PeerStream, PeerTransport,
};
use crate::types::{Failure, FailureKind, JournalKey};

pub(super) struct NoPeers;

impl NoPeers {
    fn refuse<T: Send + 'static>() -> BoxFuture<'static, Result<T, Failure>> {
        let failure = Failure::new(FailureKind::PeerUnreachable, "This node has no peers.");
        Box::pin(std::future::ready(Err(failure)))
    }
}

impl PeerTransport for NoPeers {
    fn generate(&self, _: &Peer, _: GenerateCall) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        Self::refuse()
    }

    fn follow(&self, _: &Peer, _: FollowCall) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        Self::refuse()
    }

    fn journal(&self, _: &Peer, _: JournalBatch) -> BoxFuture<'static, Result<Vec<JournalRefusal>, Failure>> {
        Self::refuse()
    }

    fn lookup(&self, _: &Peer, _: JournalKey) -> BoxFuture<'static, Result<Option<JournalRecord>, Failure>> {
        Self::refuse()
    }

    fn tokenizer(&self, _: &Peer, _: String) -> BoxFuture<'static, Result<Bytes, Failure>> {
        Self::refuse()
    }
}
