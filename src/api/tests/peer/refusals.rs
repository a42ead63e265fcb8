//! What the endpoint refuses: calls that are too large, and what is no call.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper::{Method, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use super::{Callee, Caller, FakeService, assert_counts, call, tls};
use crate::api::tests::sockets::in_time;
use crate::cluster::wire::{self, CallKind};
use crate::cluster::{GenerateCall, PROTOCOL};
use crate::types::{Failure, FailureKind};

#[tokio::test]
async fn a_call_that_is_too_large_is_refused_on_either_side() {
    let callee = Callee::start(1, FakeService::counting()).await;
    let (caller, peer) = (Caller::new(1, &[&callee.peer(1)]), callee.peer(1));
    let large = GenerateCall {
        envelope: call(1).envelope.with(|it| it.prompt = vec![u32::MAX; wire::MAX_MESSAGE_BYTES / 5 + 1].into()),
        ..call(1)
    };
    let refused = caller.generate(&peer, large).await.err().expect("refused");
    assert_eq!(refused.kind, FailureKind::InvalidRequest);

    let refused =
        post(&callee, &CallKind::Generate.path(PROTOCOL.newest), vec![0; wire::MAX_MESSAGE_BYTES + 1].into()).await;
    assert_eq!((refused.0, refused.1.kind), (413, FailureKind::InvalidRequest));
    for call in [CallKind::Follow, CallKind::Lookup, CallKind::Tokenizer] {
        let refused = post(&callee, &call.path(PROTOCOL.newest), vec![0; call.max_bytes() + 1].into()).await;
        assert_eq!((refused.0, refused.1.kind), (413, FailureKind::InvalidRequest), "{call:?}");
    }
    let large =
        GenerateCall { envelope: call(2).envelope.with(|it| it.prompt = vec![u32::MAX; 2_000_000].into()), ..call(2) };
    assert_counts(caller.accepted(&peer, large).await, 2).await;
}

#[tokio::test]
async fn what_is_no_call_is_refused() {
    let callee = Callee::start(1, FakeService::counting()).await;
    let noise = || Bytes::from_static(&[0xff; 100]);
    for path in CallKind::ALL.map(|call| call.path(PROTOCOL.newest)) {
        let (status, failure) = post(&callee, &path, noise()).await;
        assert_eq!((status, failure.kind), (400, FailureKind::Internal), "{path}");
    }
    let (status, failure) = post(&callee, "/outrigger/v2/nothing", noise()).await;
    assert_eq!((status, failure.kind), (404, FailureKind::Internal));
}

#[tokio::test]
async fn a_call_that_needs_what_only_a_later_version_knows_is_refused_by_name() {
    let callee = Callee::start(1, FakeService::counting()).await;
    // A second envelope is merged into the first: this one needs feature 4711.
    let needs = [0x0a, 4, 0x7a, 2, 0xe7, 0x24];
    let message = [&wire::encode_message(&call(1)).expect("small")[..], &needs].concat();
    let (status, failure) = post(&callee, &CallKind::Generate.path(PROTOCOL.newest), message.into()).await;
    assert_eq!((status, failure.kind, failure.code), (409, FailureKind::VersionTooOld, None));
}

/// What a client that is not ours may send: the answer's status and failure.
async fn post(callee: &Callee, path: &str, body: Bytes) -> (u16, Failure) {
    let stream = TcpStream::connect(callee.addr).await.expect("a connection");
    let stream = TokioIo::new(tls(1).connect(stream).await.expect("a peer"));
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.expect("HTTP/2");
    let driver = tokio::spawn(connection);
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = format!("https://x{path}").parse().expect("a URI");
    let response = in_time("an answer", sender.send_request(request)).await.expect("answered");
    let status = response.status().as_u16();
    let body = in_time("a body", response.into_body().collect()).await.expect("a body").to_bytes();
    driver.abort();
    (status, wire::decode_failure(&body).expect("a failure"))
}
