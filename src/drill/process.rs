//! Nodes as processes on this machine: each has its own addresses, can be signalled and waited for, and is killed when its
//! owner drops it. Knows nothing of requests.

use std::fs::OpenOptions;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub use nix::sys::signal::Signal;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

/// The first port to try. Ports are below the range that kernels use for outgoing connections, so that a node's port is still
/// free when the node restarts.
const FIRST_PORT: u32 = 11_000;
const PORTS: u32 = 19_000;
const MAX_PORT_ATTEMPTS: u32 = 2_000;
/// Polling interval while waiting for a process to exit.
const EXIT_POLL: Duration = Duration::from_millis(5);
/// How much of the end of a log is shown.
const LOG_TAIL_BYTES: usize = 4 << 10;
const KEY_BYTES: usize = 32;

/// The settings that all nodes of a cluster share.
#[derive(Clone, Debug)]
pub struct ClusterPlan {
    /// The server's executable.
    pub program: PathBuf,
    /// The folder for the cluster key and the logs. Must exist.
    pub folder: PathBuf,
    /// Command-line flags for every node.
    pub flags: Vec<String>,
    /// Environment variables that nodes do not inherit.
    pub hidden_variables: Vec<String>,
    /// A command that is put before the program's command line, e.g. to enter a network namespace. `{node}` is replaced by the
    /// node's name.
    pub wrapper: Vec<String>,
}

/// The addresses that a node listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeAddresses {
    pub api: SocketAddr,
    /// The address for gossip (UDP) and calls (TCP) from peers.
    pub peer: SocketAddr,
    pub admin: SocketAddr,
}

/// A node of a cluster that this process started. Killed when dropped.
pub struct NodeProcess {
    pub name: String,
    pub addresses: NodeAddresses,
    plan: ClusterPlan,
    /// Flags in addition to those of the plan.
    flags: Vec<String>,
    peers: Vec<SocketAddr>,
    child: Option<Child>,
    log: PathBuf,
}

impl NodeAddresses {
    /// Chooses free ports on the loopback interface.
    pub fn free() -> io::Result<Self> {
        Ok(Self { api: free_address()?, peer: free_address()?, admin: free_address()? })
    }
}

/// Prepares the nodes of a new cluster, named `n0`, `n1`, …, without starting them.
pub fn plan_nodes(plan: &ClusterPlan, addresses: &[NodeAddresses]) -> io::Result<Vec<NodeProcess>> {
    write_key(&plan.folder.join("cluster.key"))?;
    let peers: Vec<SocketAddr> = addresses.iter().map(|node| node.peer).collect();
    let node = |(index, addresses): (usize, &NodeAddresses)| {
        let others = peers.iter().copied().filter(|peer| *peer != addresses.peer).collect();
        NodeProcess::new(plan.clone(), format!("n{index}"), *addresses, others)
    };
    Ok(addresses.iter().enumerate().map(node).collect())
}

/// Writes a new random cluster key.
fn write_key(path: &Path) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut key = [0; KEY_BYTES];
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut key)
        .map_err(|_| io::Error::other("cannot read random bytes from the system"))?;
    OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?.write_all(&key)
}

impl NodeProcess {
    /// Prepares a node. `peers` are the gossip addresses of the other nodes.
    pub fn new(plan: ClusterPlan, name: String, addresses: NodeAddresses, peers: Vec<SocketAddr>) -> Self {
        let log = plan.folder.join(format!("{name}.log"));
        Self { name, addresses, plan, flags: Vec::new(), peers, child: None, log }
    }

    /// Adds flags for this node only. The plan must not contain any of them.
    pub fn with_flags(mut self, flags: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.flags.extend(flags.into_iter().map(Into::into));
        self
    }

    /// Starts the process. The node may still be loading when this returns.
    ///
    /// # Panics
    /// If the process is already running.
    pub fn start(&mut self) -> io::Result<()> {
        assert!(!self.is_running(), "{} is already running", self.name);
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let arguments = self.command_line();
        let mut command = Command::new(&arguments[0]);
        command.args(&arguments[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        for name in &self.plan.hidden_variables {
            command.env_remove(name);
        }
        self.child = Some(command.spawn()?);
        Ok(())
    }

    fn command_line(&self) -> Vec<String> {
        let NodeAddresses { api, peer, admin } = self.addresses;
        let wrapper = self.plan.wrapper.iter().map(|part| part.replace("{node}", &self.name));
        let mut line: Vec<String> = wrapper.collect();
        line.push(self.plan.program.display().to_string());
        line.push("serve".into());
        line.extend([
            format!("--host={}", api.ip()),
            format!("--port={}", api.port()),
            format!("--node-id={}", self.name),
            format!("--gossip-addr={peer}"),
            format!("--admin-addr={admin}"),
        ]);
        if !self.flags.iter().any(|flag| flag.starts_with("--cluster-key-file")) {
            line.push(format!("--cluster-key-file={}", self.plan.folder.join("cluster.key").display()));
        }
        line.extend(self.peers.iter().map(|peer| format!("--peers={peer}")));
        line.extend(self.plan.flags.iter().chain(&self.flags).cloned());
        line
    }

    /// The id of the process, if it is running.
    pub fn id(&mut self) -> Option<u32> {
        self.is_running().then(|| self.child.as_ref().map(Child::id)).flatten()
    }

    pub fn is_running(&mut self) -> bool {
        self.ended().is_none() && self.child.is_some()
    }

    /// Its exit status, if it has exited.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().ok().flatten()
    }

    /// Sends a signal to the process.
    pub fn signal(&mut self, signal: Signal) -> io::Result<()> {
        if !self.is_running() {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("{} is not running", self.name)));
        }
        let id = self.child.as_ref().map_or(0, Child::id);
        // The child has not been waited for, so the id is still its own.
        send_signal(id, signal)
    }

    /// Kills the process (`kill -9`) and waits until it has ended.
    pub fn kill(&mut self) -> io::Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.child.as_mut().map_or(Ok(()), |child| child.wait().map(drop))
    }

    /// Waits until the process ends. `None` if it has not ended within `patience`.
    pub async fn exit(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.ended() {
                None if self.child.is_some() && Instant::now() < deadline => sleep(EXIT_POLL).await,
                ended => return ended,
            }
        }
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(LOG_TAIL_BYTES)..]).into_owned()
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // Fails only if the process has already ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends a signal to one process, never to a process group.
pub fn send_signal(id: u32, signal: Signal) -> io::Result<()> {
    let id = i32::try_from(id).ok().filter(|id| *id > 0);
    let id = id.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a process id"))?;
    Ok(kill(Pid::from_raw(id), signal)?)
}

/// A loopback address whose port is free for both TCP and UDP.
fn free_address() -> io::Result<SocketAddr> {
    // Within one process, ports are tried in order; different processes start at different ports.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id().wrapping_mul(2_654_435_761) % PORTS;
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..MAX_PORT_ATTEMPTS {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST_PORT + start.wrapping_add(offset) % PORTS;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port as u16));
        match TcpListener::bind(address).and_then(|_| UdpSocket::bind(address)) {
            Ok(_) => return Ok(address),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A new folder that is removed with its contents when dropped.
pub struct ScratchFolder(PathBuf);

impl ScratchFolder {
    pub fn new(below: &Path) -> io::Result<Self> {
        let path = below.join(format!("outrigger-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ScratchFolder {
    fn drop(&mut self) {
        // A folder that cannot be removed is left behind.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(folder: &Path, program: &str) -> ClusterPlan {
        ClusterPlan {
            program: program.into(),
            folder: folder.into(),
            flags: vec!["--threads=1".into()],
            hidden_variables: Vec::new(),
            wrapper: Vec::new(),
        }
    }

    #[test]
    fn nodes_have_addresses_of_their_own_and_know_the_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let addresses: Vec<_> = (0..3).map(|_| NodeAddresses::free().expect("free ports")).collect();
        let nodes = plan_nodes(&plan(folder.path(), "p"), &addresses).expect("planned");
        let line = nodes[1].command_line();
        assert_eq!(line[..2], ["p", "serve"]);
        for flag in [
            format!("--gossip-addr={}", addresses[1].peer),
            format!("--peers={}", addresses[0].peer),
            format!("--peers={}", addresses[2].peer),
            "--node-id=n1".into(),
            "--threads=1".into(),
        ] {
            assert!(line.contains(&flag), "{flag}: {line:?}");
        }
        assert!(!line.contains(&format!("--peers={}", addresses[1].peer)), "a node must not be its own peer: {line:?}");
        let ports: std::collections::BTreeSet<u16> =
            addresses.iter().flat_map(|node| [node.api, node.peer, node.admin]).map(|address| address.port()).collect();
        assert_eq!(ports.len(), 9);
        assert_eq!(std::fs::read(folder.path().join("cluster.key")).expect("a key").len(), KEY_BYTES);
    }

    #[test]
    fn a_scratch_folder_takes_its_files_with_it() {
        let below = tempfile::tempdir().expect("a folder");
        let folder = ScratchFolder::new(below.path()).expect("a folder");
        std::fs::write(folder.path().join("file"), "x").expect("written");
        let path = folder.path().to_owned();
        drop(folder);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_process_is_signalled_waited_for_and_ends_with_its_owner() {
        let folder = tempfile::tempdir().expect("a folder");
        let script = folder.path().join("script");
        std::fs::write(&script, "#!/bin/sh\necho started >&2\nexec sleep 1000\n").expect("written");
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("executable");
        let addresses = [NodeAddresses::free().expect("free ports")];
        let plan = plan(folder.path(), script.to_str().expect("UTF-8"));
        let mut node = plan_nodes(&plan, &addresses).expect("planned").remove(0);
        assert!(node.signal(Signal::SIGTERM).is_err(), "it was not started");
        node.start().expect("starts");
        assert!(node.exit(Duration::from_millis(20)).await.is_none() && node.is_running());
        node.signal(Signal::SIGTERM).expect("it runs");
        let status = node.exit(Duration::from_secs(30)).await.expect("it ends");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(Signal::SIGTERM as i32));

        node.start().expect("starts again");
        let id = node.child.as_ref().expect("a child").id();
        drop(node);
        assert!(send_signal(id, Signal::SIGCONT).is_err(), "it has outlived its owner");
    }
}
