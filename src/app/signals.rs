//! SIGTERM and SIGINT as events. The first one shuts the node down gracefully, a second one ends it at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Catches both signals; from its creation they no longer end the process by themselves.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// A signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caught {
    pub name: &'static str,
    number: u8,
}

impl Caught {
    /// Whether clients may still be sent here, because a load balancer needs time to notice. SIGINT comes from a terminal, so
    /// there is nothing to wait for.
    pub fn lingers(self) -> bool {
        self.name == "SIGTERM"
    }

    /// The exit code that shells report for a process ended by this signal.
    pub fn exit_code(self) -> u8 {
        128 + self.number
    }
}

impl Signals {
    /// Must be called inside the runtime.
    pub fn install() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    pub async fn next(&mut self) -> Caught {
        tokio::select! {
            _ = self.terminate.recv() => Caught { name: "SIGTERM", number: 15 },
            _ = self.interrupt.recv() => Caught { name: "SIGINT", number: 2 },
        }
    }
}
