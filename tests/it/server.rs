//! A real server process on a free port. It is killed when dropped. Its log is shown if the test fails.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Time limit for every wait, long enough for a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Server {
    child: Child,
    stdout: BufReader<ChildStdout>,
    log: Arc<Mutex<String>>,
    /// `http://127.0.0.1:PORT`
    pub base_url: String,
}

/// The path of a fixture.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/fixtures").join(name)
}

/// The program, with an environment that contains none of the developer's settings.
pub fn outrigger() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OUTRIGGER_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

impl Server {
    /// Starts a server with `--port 0` and these arguments. Returns as soon as it listens, before the model is loaded.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_as(outrigger(), arguments)
    }

    /// As `start`, with this command, whose standard output must be piped. The log is kept only if standard error is piped.
    pub fn start_as(mut program: Command, arguments: &[&str]) -> Self {
        let mut child = program.args(["serve", "--port", "0"]).args(arguments).spawn().expect("the program starts");
        let log = Arc::new(Mutex::new(String::new()));
        if let Some(mut stderr) = child.stderr.take() {
            let log = log.clone();
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(read @ 1..) = stderr.read(&mut buffer) {
                    log.lock().push_str(&String::from_utf8_lossy(&buffer[..read]));
                }
            });
        }
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut server = Self { child, stdout, log, base_url: String::new() };
        let line = server.next_line();
        let url = line.trim_end().strip_prefix("Listening on ");
        server.base_url = url.unwrap_or_else(|| panic!("unexpected first line {line:?}")).to_owned();
        server
    }

    /// Starts a server and waits until it is ready.
    pub async fn ready(arguments: &[&str]) -> Self {
        let server = Self::start(arguments);
        server.wait_until("ready", async |server: &Self| server.status("/readyz").await == Some(200)).await;
        server
    }

    /// The next line of the standard output; empty at the end.
    pub fn next_line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("its output is text");
        line
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base_url)
    }

    /// The status of a GET. `None` if nobody answers.
    pub async fn status(&self, path: &str) -> Option<u16> {
        Some(reqwest::get(self.url(path)).await.ok()?.status().as_u16())
    }

    pub async fn wait_until(&self, what: &str, holds: impl AsyncFn(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self).await {
            assert!(start.elapsed() < PATIENCE, "not {what} after {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The sum of a metric's series.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = reqwest::get(self.url("/metrics")).await.expect("an answer").text().await.expect("text");
        let lines = text.lines().filter_map(|line| line.rsplit_once(' '));
        let of_metric = lines.filter(|(series, _)| series.split('{').next() == Some(name));
        of_metric.map(|(_, value)| value.parse::<f64>().expect("a number")).sum()
    }

    pub fn signal(&self, signal: i32) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a process id");
        // SAFETY: kill has no memory effects here; the child has not been waited for, so the id is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits until the process exits.
    pub async fn exit(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("waits") {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "still running after {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn log(&self) -> String {
        self.log.lock().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- log of the server\n{}\n---", self.log());
        }
    }
}
