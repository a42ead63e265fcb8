//! A client's trace id is in the log lines of every node that works on its requests.

use std::fs;
use std::time::Duration;

use serde_json::json;
use tokio::time::sleep;

use crate::cluster::{Cluster, Reader};
use crate::real_server::{COMPLETIONS, within};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const MAX_STREAMS: usize = 32;

/// How many lines of the node's log have the trace id and this text.
fn count(cluster: &Cluster, node: usize, text: &str) -> usize {
    let log = fs::read_to_string(cluster.folder().join(format!("n{node}.log"))).expect("a log");
    let trace_id = format!("trace_id={TRACE}");
    log.lines().filter(|line| line.contains(&trace_id) && line.contains(text)).count()
}

async fn until_told(cluster: &Cluster, node: usize, text: &str) {
    within(&format!("told by n{node}: {text:?}"), async {
        while count(cluster, node, text) == 0 {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn one_trace_id_shows_a_streams_life_on_all_nodes_also_when_one_dies() {
    // The first node has a place for one stream, so the others must go elsewhere, also when they lose their replica.
    let mut cluster = Cluster::slow_each(3, &["--log-level=info,outrigger=debug"], |node| {
        let only_one = ["--max-num-seqs=1", "--max-num-queued-requests=0"].map(Into::into);
        only_one.into_iter().filter(|_| node == 0).collect()
    })
    .await;
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let headers = [("traceparent", parent.as_str()), ("x-outrigger-placement", "least-request")];
    // So long that no stream ends before the test does.
    let body = json!({"model": "slow", "prompt": "The sea is", "max_tokens": 2000, "ignore_eos": true, "stream": true});
    let mut streams = Vec::new();
    let computes = |node| count(&cluster, node, "computes a stream for a peer");
    // Until each node computes one.
    while computes(1) == 0 || computes(2) == 0 || computes(1) + computes(2) >= streams.len() {
        assert!(streams.len() < MAX_STREAMS, "not every node says that it computes a stream");
        let mut stream = Reader::open(cluster.url(0), COMPLETIONS, &body, &headers).await;
        stream.next().await.expect("a token");
        streams.push(stream);
    }
    cluster.nodes[1].process().expect("its own").kill().expect("killed");
    until_told(&cluster, 0, "a stream lost its replica").await;
    until_told(&cluster, 2, "goes on with a stream for a peer").await;
    // What the handler says, and what goes on after it.
    for text in ["answered", "a stream begins"] {
        assert_eq!(count(&cluster, 0, text), streams.len(), "{text}");
    }
}
