//! SIGTERM and SIGINT, as things to wait for. The first asks for an orderly end, a second for an end at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Catches both signals from its making on: they no longer end the process by themselves.
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
    /// Whether clients may still be sent here: a load balancer needs a while to notice. SIGINT comes from a terminal.
    pub fn lingers(self) -> bool {
        self.name == "SIGTERM"
    }

    /// What shells report of a process that a signal ended.
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
