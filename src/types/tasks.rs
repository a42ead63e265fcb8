//! Every task of the process is spawned here, under a name: the end of the process waits for those that do work, and names
//! those that do not end.

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

static TASKS: LazyLock<Tasks> = LazyLock::new(Tasks::default);

#[derive(Default)]
struct Tasks {
    tracker: TaskTracker,
    /// How many run, by name.
    running: Mutex<BTreeMap<&'static str, usize>>,
}

/// Counts a task for as long as it lives, however it ends.
struct Running {
    tasks: &'static Tasks,
    name: &'static str,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut running = self.tasks.running.lock();
        if let Some(count) = running.get_mut(self.name) {
            *count -= 1;
        }
        running.retain(|_, count| *count > 0);
    }
}

impl Tasks {
    fn spawn<F>(&'static self, name: &'static str, work: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        *self.running.lock().entry(name).or_default() += 1;
        let running = Running { tasks: self, name };
        self.tracker.spawn(async move {
            let _running = running;
            work.await
        })
    }

    async fn ended(&self, limit: Duration) -> Vec<&'static str> {
        self.tracker.close();
        let _ = timeout(limit, self.tracker.wait()).await;
        self.running.lock().keys().copied().collect()
    }
}

/// Spawns work that the end of the process waits for. `name` says what it does.
pub fn spawn<F>(name: &'static str, work: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    TASKS.spawn(name, work)
}

/// Spawns what the end of the process need not wait for: a watch that goes on for as long as the process lives, or a task
/// whose end its owner waits for.
#[expect(clippy::disallowed_methods, reason = "the ban sends everybody here")]
pub fn spawn_background<F>(task: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    tokio::spawn(task)
}

/// Waits until all work has ended, but not longer than `limit`; gives the names of what still runs.
pub async fn ended(limit: Duration) -> Vec<&'static str> {
    TASKS.ended(limit).await
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn the_end_waits_for_work_and_names_what_does_not_end() {
        let tasks: &'static Tasks = Box::leak(Box::default());
        let (release, released) = oneshot::channel::<()>();
        let one = tasks.spawn("relays", async { released.await.is_ok() });
        let hangs = tasks.spawn("hangs", std::future::pending::<()>());
        assert_eq!(tasks.ended(Duration::from_millis(10)).await, ["hangs", "relays"]);
        release.send(()).expect("it waits");
        assert!(one.await.expect("no panic"));
        hangs.abort();
        assert_eq!(tasks.ended(PATIENCE).await, Vec::<&str>::new());
    }

    #[tokio::test]
    async fn a_task_that_panics_has_ended() {
        let tasks: &'static Tasks = Box::leak(Box::default());
        let panics = tasks.spawn("panics", async { panic!("on purpose") });
        assert!(panics.await.is_err());
        assert_eq!(tasks.ended(PATIENCE).await, Vec::<&str>::new());
    }
}
