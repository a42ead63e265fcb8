//! Endpoints that talk to one another, and others that listen in.

use proptest::prelude::*;

use super::*;
use crate::cluster::ClusterKey;

const A: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)), 1);
const B: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2)), 2);

fn endpoint(secret: u8, cluster_id: &str, session: u8, now: Instant) -> SealedEndpoint {
    let key = ClusterKey::from_secret(&[secret; 32]).expect("long enough");
    endpoint_of(&key.into(), cluster_id, session, now)
}

fn endpoint_of(keys: &KeyRing, cluster_id: &str, session: u8, now: Instant) -> SealedEndpoint {
    let introduction = Introduction { cluster_id: cluster_id.into(), node_id: format!("n{session}") };
    SealedEndpoint::new(keys, introduction, [session; 16], [session; 32], now)
}

/// Carries datagrams to and fro until nobody answers, and returns the messages that arrived at `b` and `a`.
fn exchange(
    a: &mut SealedEndpoint,
    b: &mut SealedEndpoint,
    mut datagrams: Vec<Vec<u8>>,
    now: Instant,
) -> [Vec<Vec<u8>>; 2] {
    let mut arrived = [Vec::new(), Vec::new()];
    let mut is_at_b = true;
    for _ in 0..8 {
        let (receiver, from) = if is_at_b { (&mut *b, A) } else { (&mut *a, B) };
        let mut replies = Vec::new();
        for mut datagram in datagrams {
            let received = receiver.receive(from, &mut datagram, now);
            arrived[usize::from(!is_at_b)].extend(received.message);
            replies.extend(received.reply);
        }
        if replies.is_empty() {
            return arrived;
        }
        (datagrams, is_at_b) = (replies, !is_at_b);
    }
    panic!("they never stop");
}

/// Two that have met.
fn acquainted(now: Instant) -> (SealedEndpoint, SealedEndpoint) {
    let (mut a, mut b) = (endpoint(1, "c", 1, now), endpoint(1, "c", 2, now));
    let first = a.seal(B, b"hello").expect("short");
    assert_eq!(exchange(&mut a, &mut b, first, now), [Vec::<Vec<u8>>::new(), Vec::new()], "nobody is proven yet");
    (a, b)
}

fn hear(receiver: &mut SealedEndpoint, from: SocketAddr, datagram: &[u8], now: Instant) -> Received {
    receiver.receive(from, &mut datagram.to_vec(), now)
}

#[tokio::test]
async fn after_one_exchange_both_are_heard() {
    let now = Instant::now();
    let (mut a, mut b) = acquainted(now);
    let there = a.seal(B, b"to b").expect("short");
    assert_eq!(exchange(&mut a, &mut b, there, now)[0], [b"to b"]);
    let back = b.seal(A, b"to a").expect("short");
    assert_eq!(exchange(&mut b, &mut a, back, now)[0], [b"to a"]);
}

#[tokio::test]
async fn a_node_behind_another_address_is_heard_as_well() {
    let now = Instant::now();
    let (mut a, mut b) = (endpoint(1, "c", 1, now), endpoint(1, "c", 2, now));
    let service: SocketAddr = "10.9.9.9:9".parse().expect("an address");
    // `a` sends to the service's address; `exchange` lets the replies come from `B`.
    let first = a.seal(service, b"hello").expect("short");
    exchange(&mut a, &mut b, first, now);
    let second = a.seal(service, b"again").expect("short");
    assert_eq!(exchange(&mut a, &mut b, second, now)[0], [b"again"]);
}

#[tokio::test]
async fn long_messages_cross_in_datagrams_of_a_safe_size() {
    let now = Instant::now();
    let (mut a, mut b) = acquainted(now);
    let long: Vec<u8> = (0..65_507usize).map(|at| (at % 251) as u8).collect();
    let mut datagrams = a.seal(B, &long).expect("chitchat's largest message has to go through");
    assert!(datagrams.len() > 50 && datagrams.iter().all(|datagram| datagram.len() <= MAX_DATAGRAM_BYTES));
    datagrams.reverse();
    assert_eq!(exchange(&mut a, &mut b, datagrams, now)[0], [long]);
    assert!(a.seal(B, &vec![0; FRAGMENT_BYTES * fragments::MAX_FRAGMENTS + 1]).is_none());
}

#[tokio::test]
async fn another_key_or_cluster_is_neither_heard_nor_answered() {
    let now = Instant::now();
    let (_, mut b) = acquainted(now);
    for mut stranger in [endpoint(2, "c", 7, now), endpoint(1, "other", 7, now)] {
        for datagram in stranger.seal(B, b"let me in").expect("short") {
            assert_eq!(hear(&mut b, A, &datagram, now), Received::dropped(DropReason::Unauthenticated));
        }
    }
    assert_eq!(b.sessions.len(), 1);
}

#[tokio::test]
async fn a_node_with_the_key_and_another_cluster_is_told_who_is_there_and_tells() {
    let now = Instant::now();
    let (mut a, mut b) = (endpoint(1, "mine", 1, now), endpoint(1, "other", 2, now));
    let request = a.introduce(B);
    let heard = hear(&mut b, A, &request, now);
    let stranger =
        |cluster_id: &str, node_id: &str| Introduction { cluster_id: cluster_id.into(), node_id: node_id.into() };
    assert_eq!((heard.dropped, heard.stranger), (Some(DropReason::ForeignCluster), Some(stranger("mine", "n1"))));
    let reply = heard.reply.expect("it answers");
    assert!(reply.len() <= request.len() + 1, "it does not amplify");
    let answer = hear(&mut a, B, &reply, now);
    assert_eq!((answer.stranger, answer.reply), (Some(stranger("other", "n2")), None));
    // Its own cluster has nothing to say to it, and strangers learn nothing.
    assert_eq!(hear(&mut endpoint(1, "mine", 3, now), A, &request, now), Received::default());
    let unknown = hear(&mut endpoint(2, "other", 4, now), A, &request, now);
    assert_eq!(unknown, Received::dropped(DropReason::Unauthenticated));
    assert_eq!(hear(&mut a, B, &request, now), Received::dropped(DropReason::Own));
}

#[tokio::test]
async fn a_flood_of_introductions_is_answered_sparingly() {
    let now = Instant::now();
    let (mut a, mut b) = (endpoint(1, "mine", 1, now), endpoint(1, "other", 2, now));
    let request = a.introduce(B);
    let answers = (0..2000).filter(|_| hear(&mut b, A, &request, now).reply.is_some()).count();
    assert_eq!(answers, MAX_CHALLENGES_PER_SECOND as usize);
}

fn ring(secrets: &[u8]) -> KeyRing {
    use base64::Engine;
    let line = |secret: &u8| base64::engine::general_purpose::STANDARD.encode([*secret; 32]);
    let lines: Vec<String> = secrets.iter().map(line).collect();
    KeyRing::parse(format!("{}\n{}", crate::cluster::key::LIST_HEAD, lines.join("\n")).as_bytes()).expect("a list")
}

/// Every order in which two nodes may take the steps, one step apart at most.
#[tokio::test]
async fn no_message_is_lost_while_the_keys_change() {
    let steps = [ring(&[1]), ring(&[1, 2]), ring(&[2, 1]), ring(&[2])];
    for first_mover in 0..2 {
        let now = Instant::now();
        let (mut a, mut b) = acquainted(now);
        let greeting = b.seal(A, b"hello").expect("short");
        exchange(&mut b, &mut a, greeting, now);
        for step in &steps[1..] {
            for mover in [first_mover, 1 - first_mover] {
                if mover == 0 {
                    a.set_keys(step)
                } else {
                    b.set_keys(step)
                };
                let there = a.seal(B, b"to b").expect("short");
                assert_eq!(exchange(&mut a, &mut b, there, now)[0], [b"to b"]);
                let back = b.seal(A, b"to a").expect("short");
                assert_eq!(exchange(&mut b, &mut a, back, now)[0], [b"to a"]);
            }
        }
        assert_eq!((a.sessions.len(), b.sessions.len()), (1, 1), "nobody had to be met anew");
    }
}

#[tokio::test]
async fn a_change_of_keys_lets_nothing_be_heard_twice() {
    let now = Instant::now();
    let (mut a, mut b) = acquainted(now);
    let old = a.seal(B, b"old").expect("short").remove(0);
    hear(&mut b, A, &old, now);
    b.set_keys(&ring(&[1, 2]));
    a.set_keys(&ring(&[1, 2]));
    a.set_keys(&ring(&[2, 1]));
    let new = a.seal(B, b"new").expect("short").remove(0);
    assert_eq!(hear(&mut b, A, &new, now).message.as_deref(), Some(b"new".as_slice()));
    for recorded in [&old, &new] {
        assert_eq!(hear(&mut b, A, recorded, now), Received::dropped(DropReason::Replayed));
    }
    b.set_keys(&ring(&[2, 1]));
    b.set_keys(&ring(&[2]));
    assert_eq!(hear(&mut b, A, &old, now), Received::dropped(DropReason::Unauthenticated));
    assert_eq!(hear(&mut b, A, &new, now), Received::dropped(DropReason::Replayed));
}

#[tokio::test]
async fn a_datagram_is_delivered_once() {
    let now = Instant::now();
    let (mut a, mut b) = acquainted(now);
    let datagram = a.seal(B, b"once").expect("short").remove(0);
    assert_eq!(hear(&mut b, A, &datagram, now).message.as_deref(), Some(b"once".as_slice()));
    assert_eq!(hear(&mut b, A, &datagram, now), Received::dropped(DropReason::Replayed));
    assert_eq!(hear(&mut a, B, &datagram, now), Received::dropped(DropReason::Own), "reflected");
}

/// Records everything, and plays it to the same process after it has forgotten the session, and to a later process.
#[tokio::test]
async fn a_recording_is_not_heard_after_its_session_was_forgotten() {
    let start = Instant::now();
    let (mut a, mut b) = (endpoint(1, "c", 1, start), endpoint(1, "c", 2, start));
    let mut recording = Vec::new();
    for second in 0..100 {
        let now = start + Duration::from_secs(second);
        let datagrams = a.seal(B, format!("at {second}").as_bytes()).expect("short");
        recording.extend(datagrams.clone());
        exchange(&mut a, &mut b, datagrams, now);
    }
    assert!(b.sessions.is_known(&[1; 16], start + Duration::from_secs(100)));
    // `a` is gone: its answer to the challenge does not come.
    let forgotten = start + Duration::from_secs(99 + 301);
    let mut later = endpoint(1, "c", 3, forgotten);
    for datagram in &recording {
        for receiver in [&mut b, &mut later] {
            let received = hear(receiver, A, datagram, forgotten);
            assert_eq!((received.message, received.dropped), (None, Some(DropReason::Unproven)));
        }
    }
    // `a` was only paused: it meets the challenge, and what it says then is heard, the recording still not.
    let anew = a.seal(B, b"back").expect("short");
    exchange(&mut a, &mut b, anew, forgotten);
    let anew = a.seal(B, b"back again").expect("short");
    assert_eq!(exchange(&mut a, &mut b, anew, forgotten)[0], [b"back again"]);
    for datagram in &recording {
        assert_eq!(hear(&mut b, A, datagram, forgotten), Received::dropped(DropReason::Replayed));
    }
}

#[tokio::test]
async fn an_old_challenge_changes_nothing() {
    let now = Instant::now();
    let (mut a, mut b) = (endpoint(1, "c", 1, now), endpoint(1, "c", 2, now));
    let datagram = a.seal(B, b"hello").expect("short").remove(0);
    let challenge = hear(&mut b, A, &datagram, now).reply.expect("a challenge");
    let mut later = endpoint(1, "c", 5, now);
    later.seal(B, b"hello").expect("short");
    hear(&mut later, B, &challenge, now);
    assert!(later.cookies.is_empty(), "it was meant for an earlier process");
    for _ in 0..MAX_RECENT {
        a.seal(B, b"more").expect("short");
    }
    hear(&mut a, B, &challenge, now);
    assert!(a.cookies.is_empty(), "it answers nothing recent");
}

#[tokio::test]
async fn a_flood_of_recorded_datagrams_is_answered_sparingly_and_costs_no_memory() {
    let now = Instant::now();
    let mut b = endpoint(1, "c", 2, now);
    let answers = (0..2000u64)
        .filter(|number| {
            let mut sender = endpoint(1, "c", (number % 200) as u8 + 10, now);
            let datagram = sender.seal(B, b"hello").expect("short").remove(0);
            hear(&mut b, A, &datagram, now).reply.is_some()
        })
        .count();
    assert_eq!(answers, MAX_CHALLENGES_PER_SECOND as usize);
    assert_eq!((b.sessions.len(), b.cookies.len()), (0, 0));
    assert!(b.recent.len() <= MAX_RECENT);
}

#[test]
fn reasons_have_labels_of_their_own() {
    let labels: std::collections::HashSet<_> = DropReason::ALL.iter().map(|reason| reason.label()).collect();
    assert_eq!(labels.len(), DropReason::ALL.len());
}

proptest! {
    /// Neither does any of it arrive, nor does it leave a trace.
    #[test]
    fn garbage_is_dropped(
        datagrams in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..1400), any::<bool>(), any::<bool>()), 1..50)
    ) {
        let now = Instant::now();
        let (mut a, mut b) = acquainted(now);
        for (mut datagram, has_version, has_session) in datagrams {
            if has_version && let Some(version) = datagram.first_mut() {
                *version = 1;
            }
            if has_session && datagram.len() > 17 {
                datagram[1..17].copy_from_slice(&[1; 16]);
            }
            let received = b.receive(A, &mut datagram, now);
            prop_assert!(received.message.is_none() && received.reply.is_none());
            prop_assert!(matches!(received.dropped, Some(DropReason::Malformed | DropReason::Unauthenticated)));
        }
        prop_assert_eq!((b.sessions.len(), b.cookies.len()), (1, 1));
        let still = a.seal(B, b"still heard").expect("short");
        prop_assert_eq!(&exchange(&mut a, &mut b, still, now)[0], &[b"still heard"]);
    }

    /// Loss, reordering and duplication: what arrives was sent, and arrives once.
    #[test]
    fn a_bad_network_only_loses(
        lens in prop::collection::vec(0usize..4000, 1..20), fates in prop::collection::vec((0u8..10, any::<prop::sample::Index>()), 100)
    ) {
        let now = Instant::now();
        let (mut a, mut b) = acquainted(now);
        let messages: Vec<Vec<u8>> = lens.iter().enumerate().map(|(at, &len)| {
            (0..len + 1).map(|byte| (at * 31 + byte) as u8).collect()
        }).collect();
        let mut wire: Vec<Vec<u8>> = messages.iter().flat_map(|message| a.seal(B, message).expect("short")).collect();
        let mut fates = fates.into_iter().cycle();
        for at in 0..wire.len() {
            match fates.next().expect("endless") {
                (0, _) => wire[at].clear(),
                (1..4, other) => { let other = other.index(wire.len()); wire.swap(at, other); }
                (4..6, other) => { let copy = wire[other.index(wire.len())].clone(); wire.push(copy); }
                _ => {}
            }
        }
        let mut arrived: Vec<Vec<u8>> = wire.iter_mut().filter_map(|datagram| b.receive(A, datagram, now).message).collect();
        arrived.sort();
        let mut expected = messages;
        expected.sort();
        let mut rest = expected.into_iter();
        for message in &arrived {
            prop_assert!(rest.any(|sent| sent == *message), "{} bytes were not sent, or arrived twice", message.len());
        }
    }
}
