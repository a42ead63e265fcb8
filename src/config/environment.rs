//! `OUTRIGGER_<KEY>` variables, and the few of others that mean one of our keys. Pure: the variables are passed in.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{Assignment, Origin, keys, unknown};
use crate::hub::default_home;

const PREFIX: &str = "OUTRIGGER_";

/// Variables that the model hub's own tools read, and the keys that they mean.
const AMBIENT: &[(&str, &str)] = &[("HF_ENDPOINT", "hub_endpoint"), ("HF_TOKEN", "hub_token")];

#[derive(Default)]
pub(super) struct Variables {
    /// Of `OUTRIGGER_` variables.
    pub own: Vec<Assignment>,
    /// Of other programs' variables; anything we are told ourselves goes before.
    pub ambient: Vec<Assignment>,
    /// Where downloads go when nothing else is said.
    pub default_home: Option<PathBuf>,
    /// `OUTRIGGER_CONFIG`.
    pub file: Option<PathBuf>,
    pub warnings: Vec<String>,
}

pub(super) fn read(variables: impl IntoIterator<Item = (String, String)>, problems: &mut Vec<String>) -> Variables {
    let variables: BTreeMap<String, String> = variables.into_iter().collect();
    let mut read =
        Variables { default_home: default_home(|name| variables.get(name).map(Into::into)), ..Variables::default() };
    for (variable, name) in AMBIENT {
        let (text, key) = (variables.get(*variable), keys::find(name));
        if let (Some(text), Some(key)) = (text.filter(|text| !text.is_empty()), key) {
            read.ambient.push(Assignment { key, text: text.clone(), origin: Origin::Variable((*variable).to_owned()) });
        }
    }
    for (variable, text) in variables {
        if variable.starts_with(PREFIX) {
            read.take(variable, text, problems);
        }
    }
    read
}

impl Variables {
    /// Takes one of our own variables.
    fn take(&mut self, variable: String, text: String, problems: &mut Vec<String>) {
        let name = variable[PREFIX.len()..].to_ascii_lowercase();
        if is_service_link(&name, &text) {
            let advice = "describes a Kubernetes service and is ignored (set enableServiceLinks: false)";
            self.warnings.push(format!("${variable} {advice}"));
        } else if name == "config" {
            self.file = Some(PathBuf::from(text));
        } else if let Some(key) = keys::find(&name) {
            // Manifests set optional variables to nothing.
            if text.is_empty() {
                return;
            }
            self.own.push(Assignment { key, text, origin: Origin::Variable(variable) });
        } else {
            let rewrite = |known: &str| format!("{PREFIX}{}", known.to_ascii_uppercase());
            problems.push(unknown(&format!("${variable}"), &name, rewrite));
        }
    }
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
