//! A value that one side changes and others watch, with the part of tokio's `watch` interface that is used here. The one
//! difference: waiters are woken in the order in which they began to wait, where tokio wakes them in random order. The
//! simulator needs this so that a seed always gives the same run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::{RwLock, RwLockReadGuard};
use thiserror::Error;
use tokio::sync::Notify;

/// Every sender has been dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the value does not change any more")]
pub struct Closed;

#[derive(Debug)]
struct Watched<T> {
    value: RwLock<T>,
    /// Grows with each change, while the value is locked.
    version: AtomicU64,
    changes: Notify,
    senders: AtomicUsize,
}

/// Changes the value.
#[derive(Debug)]
pub struct Sender<T>(Arc<Watched<T>>);

/// Watches the value. A clone has seen as much as its original.
#[derive(Debug)]
pub struct Receiver<T> {
    shared: Arc<Watched<T>>,
    seen: u64,
}

pub fn channel<T>(value: T) -> (Sender<T>, Receiver<T>) {
    let sender = Sender::new(value);
    let receiver = sender.subscribe();
    (sender, receiver)
}

impl<T> Sender<T> {
    pub fn new(value: T) -> Self {
        let (value, version) = (RwLock::new(value), AtomicU64::new(0));
        Self(Arc::new(Watched { value, version, changes: Notify::new(), senders: AtomicUsize::new(1) }))
    }

    /// A receiver that has seen the current value.
    pub fn subscribe(&self) -> Receiver<T> {
        Receiver { shared: self.0.clone(), seen: self.0.version.load(Ordering::Acquire) }
    }

    pub fn borrow(&self) -> RwLockReadGuard<'_, T> {
        self.0.value.read()
    }

    /// Sets the value and returns the previous one.
    pub fn send_replace(&self, value: T) -> T {
        let mut value = value;
        self.send_modify(|current| std::mem::swap(current, &mut value));
        value
    }

    pub fn send_modify(&self, modify: impl FnOnce(&mut T)) {
        self.send_if_modified(|value| {
            modify(value);
            true
        });
    }

    /// Notifies receivers if `modify` returns true, and returns the same.
    pub fn send_if_modified(&self, modify: impl FnOnce(&mut T) -> bool) -> bool {
        {
            let mut value = self.0.value.write();
            if !modify(&mut value) {
                return false;
            }
            self.0.version.fetch_add(1, Ordering::Release);
        }
        self.0.changes.notify_waiters();
        true
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.fetch_add(1, Ordering::Relaxed);
        Self(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.0.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.changes.notify_waiters();
        }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), seen: self.seen }
    }
}

impl<T> Receiver<T> {
    pub fn borrow(&self) -> RwLockReadGuard<'_, T> {
        self.shared.value.read()
    }

    /// Counts the value as seen.
    pub fn borrow_and_update(&mut self) -> RwLockReadGuard<'_, T> {
        let value = self.shared.value.read();
        self.seen = self.shared.version.load(Ordering::Acquire);
        value
    }

    pub fn has_changed(&self) -> Result<bool, Closed> {
        let has_changed = self.shared.version.load(Ordering::Acquire) != self.seen;
        if has_changed || self.shared.senders.load(Ordering::Acquire) > 0 { Ok(has_changed) } else { Err(Closed) }
    }

    /// Returns once there is a value that was not seen yet, and counts it as seen. Cancel-safe.
    pub async fn changed(&mut self) -> Result<(), Closed> {
        let before = self.seen;
        self.wait(|_, version| version != before).await.map(drop)
    }

    /// Returns once the value meets the condition, at once if it already does. Cancel-safe.
    pub async fn wait_for(&mut self, mut is_wanted: impl FnMut(&T) -> bool) -> Result<RwLockReadGuard<'_, T>, Closed> {
        self.wait(move |value, _| is_wanted(value)).await
    }

    async fn wait(&mut self, mut is_over: impl FnMut(&T, u64) -> bool) -> Result<RwLockReadGuard<'_, T>, Closed> {
        let Self { shared, seen } = self;
        loop {
            // Registered before the check, so neither a change nor the end is missed.
            let change = shared.changes.notified();
            let is_closed = shared.senders.load(Ordering::Acquire) == 0;
            {
                let value = shared.value.read();
                *seen = shared.version.load(Ordering::Acquire);
                if is_over(&value, *seen) {
                    return Ok(value);
                }
            }
            if is_closed {
                return Err(Closed);
            }
            change.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_change_is_seen_once_by_everyone() {
        let (sender, mut first) = channel(1);
        let mut second = first.clone();
        assert_eq!(first.has_changed(), Ok(false));
        assert_eq!(sender.send_replace(2), 1);
        for receiver in [&mut first, &mut second] {
            receiver.changed().await.expect("changed");
            assert_eq!((*receiver.borrow(), receiver.has_changed()), (2, Ok(false)));
        }
        assert!(!sender.send_if_modified(|_| false));
        assert_eq!(first.has_changed(), Ok(false));
        assert_eq!(sender.subscribe().has_changed(), Ok(false), "a new one has seen what is");
    }

    #[tokio::test]
    async fn the_last_value_is_seen_before_the_end() {
        let (sender, mut receiver) = channel(1);
        let other = sender.clone();
        drop(sender);
        other.send_modify(|value| *value += 1);
        drop(other);
        assert_eq!(receiver.changed().await, Ok(()));
        assert_eq!(receiver.changed().await, Err(Closed));
        assert_eq!(receiver.wait_for(|value| *value == 2).await.map(|value| *value), Ok(2));
        assert_eq!(receiver.wait_for(|value| *value == 3).await.map(|value| *value), Err(Closed));
    }

    #[tokio::test]
    async fn waiters_are_woken_in_the_order_in_which_they_came() {
        let sender = Sender::new(0);
        let (order, mut woken) = tokio::sync::mpsc::unbounded_channel();
        for index in 0..50 {
            let (mut receiver, order) = (sender.subscribe(), order.clone());
            tokio::spawn(async move {
                receiver.changed().await.expect("changed");
                order.send(index).expect("listened to");
            });
        }
        tokio::task::yield_now().await;
        sender.send_replace(1);
        for index in 0..50 {
            assert_eq!(woken.recv().await, Some(index));
        }
    }
}
