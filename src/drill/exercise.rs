//! The exercises: which fault each causes, when, and which nodes its clients connect to.

use super::arena::NodeAction;

/// One fault scenario of a game day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exercise {
    /// No fault: measures the pauses that occur anyway.
    Calm,
    KillInDecode,
    KillInPrefill,
    Pause,
    SlowNode,
    EnginePanic,
    DeviceError,
    EngineHang,
    NanLogits,
    RollingRestart,
    KillEntry,
    EntryEnginePanic,
    AllButOne,
}

/// The fault that an exercise causes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injury {
    None,
    /// Acts on the generator: the node, other than the entry, that computes most streams.
    Generator(NodeAction),
    /// Pauses the generator repeatedly and lets it run briefly in between, so that it is slow but never silent for long.
    SlowGenerator,
    /// Injects a fault into the generator's engine; see `app::fault_injection`.
    GeneratorFault(&'static str),
    Entry(NodeAction),
    EntryFault(&'static str),
    /// Acts on all nodes but the entry at once.
    AllButEntry(NodeAction),
    /// Stops every node in turn with SIGTERM and restarts it.
    Rolling,
}

/// When the fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Half of the streams have some tokens.
    Decode,
    /// The victim has started long prompts.
    Prefill,
}

/// Where clients connect, and what they do when the connection breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// All clients connect to one node; a broken connection is a failure.
    OneEntry,
    /// All clients connect to one node, and to others when the connection breaks.
    Reconnecting,
    /// Clients connect to all nodes, and to another node when theirs is gone, as behind a load balancer.
    Spread,
}

impl Exercise {
    pub const ALL: [Exercise; 13] = [
        Exercise::Calm,
        Exercise::KillInDecode,
        Exercise::KillInPrefill,
        Exercise::Pause,
        Exercise::SlowNode,
        Exercise::EnginePanic,
        Exercise::DeviceError,
        Exercise::EngineHang,
        Exercise::NanLogits,
        Exercise::RollingRestart,
        Exercise::KillEntry,
        Exercise::EntryEnginePanic,
        Exercise::AllButOne,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Exercise::Calm => "calm",
            Exercise::KillInDecode => "kill-in-decode",
            Exercise::KillInPrefill => "kill-in-prefill",
            Exercise::Pause => "pause",
            Exercise::SlowNode => "slow-node",
            Exercise::EnginePanic => "engine-panic",
            Exercise::DeviceError => "device-error",
            Exercise::EngineHang => "engine-hang",
            Exercise::NanLogits => "nan-logits",
            Exercise::RollingRestart => "rolling-restart",
            Exercise::KillEntry => "kill-entry",
            Exercise::EntryEnginePanic => "entry-engine-panic",
            Exercise::AllButOne => "all-but-one",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|exercise| exercise.name() == name)
    }

    pub fn injury(self) -> Injury {
        match self {
            Exercise::Calm => Injury::None,
            Exercise::KillInDecode | Exercise::KillInPrefill => Injury::Generator(NodeAction::Kill),
            Exercise::Pause => Injury::Generator(NodeAction::Pause),
            Exercise::SlowNode => Injury::SlowGenerator,
            Exercise::EnginePanic => Injury::GeneratorFault("panic"),
            Exercise::DeviceError => Injury::GeneratorFault("device"),
            Exercise::EngineHang => Injury::GeneratorFault("hang"),
            Exercise::NanLogits => Injury::GeneratorFault("nan_logits"),
            Exercise::RollingRestart => Injury::Rolling,
            Exercise::KillEntry => Injury::Entry(NodeAction::Kill),
            Exercise::EntryEnginePanic => Injury::EntryFault("panic"),
            Exercise::AllButOne => Injury::AllButEntry(NodeAction::Kill),
        }
    }

    pub fn moment(self) -> Moment {
        match self {
            Exercise::KillInPrefill => Moment::Prefill,
            _ => Moment::Decode,
        }
    }

    pub fn clients(self) -> Clients {
        match self {
            Exercise::Calm | Exercise::RollingRestart => Clients::Spread,
            Exercise::KillEntry => Clients::Reconnecting,
            _ => Clients::OneEntry,
        }
    }

    /// The action that must be allowed on the nodes that the exercise may affect. `None` if it needs no permission.
    pub fn needs(self) -> Option<NodeAction> {
        match self.injury() {
            Injury::None | Injury::GeneratorFault(_) | Injury::EntryFault(_) => None,
            Injury::Generator(action) | Injury::Entry(action) | Injury::AllButEntry(action) => Some(action),
            Injury::SlowGenerator => Some(NodeAction::Pause),
            // A node that may be restarted may also be stopped.
            Injury::Rolling => Some(NodeAction::Restart),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_lead_back() {
        for exercise in Exercise::ALL {
            assert_eq!(Exercise::from_name(exercise.name()), Some(exercise));
        }
        assert_eq!(Exercise::from_name("picnic"), None);
    }

    #[test]
    fn clients_reconnect_where_their_own_node_goes() {
        for exercise in Exercise::ALL {
            let entry_goes = matches!(exercise.injury(), Injury::Entry(_) | Injury::Rolling);
            assert!(!entry_goes || exercise.clients() != Clients::OneEntry, "{exercise:?}");
        }
    }
}
