//! `OUTRIGGER_<KEY>` variables. Pure: the variables are passed in.

use std::path::PathBuf;

use super::{Assignment, Origin, keys, unknown};

const PREFIX: &str = "OUTRIGGER_";

#[derive(Default)]
pub(super) struct Variables {
    pub assignments: Vec<Assignment>,
    /// `OUTRIGGER_CONFIG`.
    pub file: Option<PathBuf>,
    pub warnings: Vec<String>,
}

pub(super) fn read(variables: impl IntoIterator<Item = (String, String)>, problems: &mut Vec<String>) -> Variables {
    let mut read = Variables::default();
    let mut variables: Vec<_> = variables.into_iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
    variables.sort();
    for (variable, text) in variables {
        let name = variable[PREFIX.len()..].to_ascii_lowercase();
        if is_service_link(&name, &text) {
            read.warnings.push(format!(
                "${variable} describes a Kubernetes service and is ignored (set enableServiceLinks: false)"
            ));
        } else if name == "config" {
            read.file = Some(PathBuf::from(text));
        } else if let Some(key) = keys::find(&name) {
            read.assignments.push(Assignment { key, text, origin: Origin::Variable(variable) });
        } else {
            let rewrite = |known: &str| format!("{PREFIX}{}", known.to_ascii_uppercase());
            problems.push(unknown(&format!("${variable}"), &name, rewrite));
        }
    }
    read
}

/// Kubernetes describes a service called `outrigger` (or `outrigger-…`) to every container beside it in variables such as
/// `OUTRIGGER_SERVICE_HOST` and `OUTRIGGER_PORT=tcp://10.0.0.7:8000`, which look like ours.
fn is_service_link(name: &str, text: &str) -> bool {
    let is_address = text.starts_with("tcp://") || text.starts_with("udp://");
    let has_protocol = |rest: &str| ["_tcp", "_udp"].iter().any(|protocol| rest.contains(protocol));
    let is_port = name == "port" || name.ends_with("_port");
    (is_port && is_address)
        || name.starts_with("service_host")
        || name.starts_with("service_port")
        || name.contains("_service_host")
        || name.contains("_service_port")
        || name
            .split_once("port_")
            .is_some_and(|(_, rest)| rest.starts_with(|c: char| c.is_ascii_digit()) && has_protocol(rest))
}
