//! The sessions whose datagrams are accepted: those that have proved to be alive. Pure; time is passed in.
//!
//! A cookie is a keyed hash of the session and the receiver's time, so issuing one costs no memory.

use std::collections::HashMap;
use std::time::Duration;

use ring::hmac;
use subtle::ConstantTimeEq;
use tokio::time::Instant;

use super::keys::{SessionId, SessionKey};
use super::replay::ReplayWindow;
use crate::cluster::key::KeyId;

pub(super) type Cookie = [u8; 16];
/// Sent by a node that has no cookie yet.
pub(super) const NO_COOKIE: Cookie = [0; 16];

/// The most sessions that are known at one time.
const MAX_SESSIONS: usize = 1024;
/// A cookie is valid in the epoch in which it was issued, and in the next one.
const EPOCH: Duration = Duration::from_secs(30);
/// A session that is silent for this long is forgotten. This is longer than any cookie is valid; otherwise replayed
/// datagrams of a forgotten session would still carry a valid cookie.
const SESSION_IDLE: Duration = Duration::from_secs(300);
const _: () = assert!(SESSION_IDLE.as_secs() > 2 * EPOCH.as_secs());
/// A session that is silent for this long may be dropped to make room for another.
const CROWDED_IDLE: Duration = Duration::from_secs(2 * EPOCH.as_secs() + 1);

pub(super) struct Sessions {
    secret: hmac::Key,
    start: Instant,
    known: HashMap<SessionId, Session>,
}

struct Session {
    /// `None` when the cluster key that it was derived from counts no more.
    key: Option<SessionKey>,
    window: ReplayWindow,
    heard_at: Instant,
}

impl Sessions {
    /// `secret` is random and private to this process.
    pub(super) fn new(secret: [u8; 32], now: Instant) -> Self {
        Self { secret: hmac::Key::new(hmac::HMAC_SHA256, &secret), start: now, known: HashMap::new() }
    }

    pub(super) fn is_known(&self, id: &SessionId, now: Instant) -> bool {
        let is_recent = |session: &Session| now.saturating_duration_since(session.heard_at) <= SESSION_IDLE;
        self.known.get(id).is_some_and(is_recent)
    }

    /// The key with which a known session's last datagram was sealed.
    pub(super) fn key(&self, id: &SessionId) -> Option<&SessionKey> {
        self.known.get(id)?.key.as_ref()
    }

    /// The session seals with another cluster key from now on. Its window stays: its numbers go on.
    pub(super) fn change_key(&mut self, id: &SessionId, key: SessionKey) {
        if let Some(session) = self.known.get_mut(id) {
            session.key = Some(key);
        }
    }

    /// Cluster keys for which `counts` is false open nothing any more. Their sessions stay known, with their windows, so that
    /// nothing of them is heard a second time.
    #[expect(clippy::iter_over_hash_type, reason = "each session is treated by itself")]
    pub(super) fn drop_keys(&mut self, counts: impl Fn(KeyId) -> bool) {
        for session in self.known.values_mut() {
            session.key.take_if(|key| !counts(key.id));
        }
    }

    /// Returns whether an authentic datagram of a known session is new.
    pub(super) fn accept(&mut self, id: &SessionId, number: u64, now: Instant) -> bool {
        let Some(session) = self.known.get_mut(id) else { return false };
        let is_new = session.window.accept(number);
        if is_new {
            session.heard_at = now;
        }
        is_new
    }

    /// Adds a session whose datagram `number` carried a valid cookie. Returns false if there is no room.
    pub(super) fn admit(&mut self, id: SessionId, key: SessionKey, number: u64, now: Instant) -> bool {
        if self.known.len() >= MAX_SESSIONS && !self.known.contains_key(&id) && !self.make_room(now) {
            return false;
        }
        self.known.insert(id, Session { key: Some(key), window: ReplayWindow::starting_at(number), heard_at: now });
        true
    }

    fn make_room(&mut self, now: Instant) -> bool {
        let heard = self.known.iter().map(|(id, session)| (session.heard_at, *id));
        let Some((heard_at, id)) = heard.min() else { return true };
        let may_go = now.saturating_duration_since(heard_at) > CROWDED_IDLE;
        if may_go {
            self.known.remove(&id);
        }
        may_go
    }

    /// The cookie that the session must send.
    pub(super) fn cookie(&self, id: &SessionId, now: Instant) -> Cookie {
        self.cookie_of(id, self.epoch(now))
    }

    pub(super) fn is_good(&self, cookie: &Cookie, id: &SessionId, now: Instant) -> bool {
        let epoch = self.epoch(now);
        let matches = |epoch| bool::from(cookie.ct_eq(&self.cookie_of(id, epoch)));
        *cookie != NO_COOKIE && (matches(epoch) || matches(epoch.saturating_sub(1)))
    }

    fn epoch(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_secs() / EPOCH.as_secs()
    }

    fn cookie_of(&self, id: &SessionId, epoch: u64) -> Cookie {
        let mut context = hmac::Context::with_key(&self.secret);
        context.update(id);
        context.update(&epoch.to_le_bytes());
        let tag = context.sign();
        std::array::from_fn(|index| tag.as_ref()[index])
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::{Keys, Purpose};
    use super::*;
    use crate::cluster::ClusterKey;

    const ID: SessionId = [3; 16];

    fn key(id: &SessionId) -> SessionKey {
        let key = ClusterKey::from_secret(&[1; 32]).expect("long enough");
        Keys::new(&key.into(), "c").sealing(id, Purpose::Gossip)
    }

    fn numbered(number: u64) -> SessionId {
        std::array::from_fn(|index| if index < 8 { number.to_le_bytes()[index] } else { 0 })
    }

    #[tokio::test]
    async fn a_cookie_is_good_for_its_session_and_for_a_while() {
        let start = Instant::now();
        let sessions = Sessions::new([1; 32], start);
        let cookie = sessions.cookie(&ID, start);
        assert!(sessions.is_good(&cookie, &ID, start));
        assert!(sessions.is_good(&cookie, &ID, start + EPOCH));
        assert!(!sessions.is_good(&cookie, &ID, start + 2 * EPOCH));
        assert!(!sessions.is_good(&cookie, &[4; 16], start));
        assert!(!sessions.is_good(&NO_COOKIE, &ID, start));
        assert!(!Sessions::new([2; 32], start).is_good(&cookie, &ID, start), "another process gave it");
    }

    #[tokio::test]
    async fn a_cookie_is_bad_by_the_time_that_its_session_is_forgotten() {
        let start = Instant::now();
        for wait in [0, 7, 29] {
            let mut sessions = Sessions::new([1; 32], start);
            let heard = start + Duration::from_secs(wait);
            let cookie = sessions.cookie(&ID, heard);
            assert!(sessions.admit(ID, key(&ID), 0, heard));
            assert!(sessions.is_known(&ID, heard + SESSION_IDLE));
            let forgotten = heard + SESSION_IDLE + Duration::from_secs(1);
            assert!(!sessions.is_known(&ID, forgotten));
            assert!(!sessions.is_good(&cookie, &ID, forgotten));
            assert!(!sessions.is_good(&cookie, &ID, heard + CROWDED_IDLE));
        }
    }

    #[tokio::test]
    async fn a_full_table_takes_nobody_in_until_somebody_is_silent() {
        let start = Instant::now();
        let mut sessions = Sessions::new([1; 32], start);
        for number in 0..MAX_SESSIONS as u64 {
            assert!(sessions.admit(numbered(number), key(&ID), 0, start));
        }
        assert!(!sessions.admit([9; 16], key(&ID), 0, start + CROWDED_IDLE));
        let later = start + CROWDED_IDLE + Duration::from_secs(1);
        assert!((1..MAX_SESSIONS as u64).all(|number| sessions.accept(&numbered(number), 1, later)));
        assert!(sessions.admit([9; 16], key(&ID), 0, later));
        assert_eq!(sessions.len(), MAX_SESSIONS);
        assert!(!sessions.is_known(&numbered(0), later), "the silent one went");
        assert!(!sessions.admit([10; 16], key(&ID), 0, later));
    }
}
