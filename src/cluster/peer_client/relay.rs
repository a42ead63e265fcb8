//! Turns the body of a response into a stream of frames.

use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::mpsc;

use super::{CallError, disconnected};
use crate::cluster::transport::PeerFrame;
use crate::cluster::wire::FrameDecoder;
use crate::types::GenerationEvent;

/// Ends with the body, or as soon as the frames' receiver is dropped; then the body is dropped, which cancels the call at the
/// peer.
pub async fn relay(body: Incoming, frames: mpsc::Sender<PeerFrame>) {
    if let Err(error) = forward(body, &frames).await {
        // Fails if the receiver is gone, which needs no handling.
        let _ = frames.send(PeerFrame::Event(GenerationEvent::Failed(disconnected(error)))).await;
    }
}

async fn forward(mut body: Incoming, frames: &mpsc::Sender<PeerFrame>) -> Result<(), CallError> {
    let mut decoder = FrameDecoder::default();
    loop {
        let piece = tokio::select! {
            biased;
            () = frames.closed() => return Ok(()),
            piece = body.frame() => piece,
        };
        let Some(piece) = piece else { return Ok(decoder.finish()?) };
        let Ok(data) = piece.map_err(CallError::Read)?.into_data() else { continue };
        decoder.push(&data);
        while let Some(frame) = decoder.next_frame()? {
            if frames.send(frame).await.is_err() {
                return Ok(());
            }
        }
    }
}
