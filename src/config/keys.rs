//! The table of keys: one row gives a key its name, its aliases, its syntax, its place in the sections and its help.
//! The file, the environment, the flags, `--help`, `outrigger config` and the README's table all follow from it.
//!
//! Defaults are the sections' own; they are not repeated here.

use super::Config;
use super::syntax::{
    Address, Auto, Choice, Count, List, Location, Notation, Number, Plain, Secrets, Size, Switch, Syntax, Text, Time,
    Token, choice,
};
use crate::engine::model::LoadFormat;
use crate::engine::model::decoder::DType;
use crate::engine::model::gpu_weights::Quantization;
use crate::engine::model_runner::{DeviceChoice, KvCacheDType};
use crate::observability::trace::LogFormat;
use crate::router::Strategy;

/// One row of the table.
pub struct Key {
    /// `max_num_seqs`; as a flag `--max-num-seqs`, as a variable `OUTRIGGER_MAX_NUM_SEQS`.
    pub name: &'static str,
    /// Other names that are understood, vLLM's where it has one.
    pub aliases: &'static [&'static str],
    pub group: &'static str,
    pub help: &'static str,
    /// Stands for the value in the help.
    pub hint: &'static str,
    pub is_switch: bool,
    pub is_list: bool,
    read: fn(&mut Config, &str) -> Result<(), String>,
    write: fn(&Config) -> toml::Value,
}

impl Key {
    /// Sets the key; the error completes "`key` …".
    pub fn set(&self, config: &mut Config, text: &str) -> Result<(), String> {
        (self.read)(config, text)
    }

    /// The value, secrets redacted.
    pub fn value(&self, config: &Config) -> toml::Value {
        (self.write)(config)
    }

    /// The value as one writes it in a flag, secrets redacted.
    pub fn text(&self, config: &Config) -> String {
        fn plain(value: toml::Value) -> String {
            match value {
                toml::Value::String(text) => text,
                toml::Value::Array(items) => items.into_iter().map(plain).collect::<Vec<_>>().join(","),
                value => value.to_string(),
            }
        }
        plain(self.value(config))
    }

    /// The name, then the aliases.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.name).chain(self.aliases.iter().copied())
    }
}

/// The key that a name or an alias stands for.
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.names().any(|known| known == name))
}

/// The known name nearest to a misspelt one, if any is near.
pub fn nearest(name: &str) -> Option<&'static str> {
    let names = KEYS.iter().flat_map(Key::names);
    let similarity = |known: &&str| strsim::jaro_winkler(known, name);
    names.filter(|known| similarity(known) > 0.85).max_by(|a, b| similarity(a).total_cmp(&similarity(b)))
}

/// The README's table.
pub fn markdown_table() -> String {
    let defaults = Config::default();
    let mut table = String::from("| key | value | default | meaning |\n|---|---|---|---|\n");
    for key in KEYS {
        let names: Vec<String> = key.names().map(|name| format!("`{name}`")).collect();
        let hint = key.hint.replace('|', " \\| ");
        table += &format!("| {} | {hint} | `{}` | {} |\n", names.join(", "), key.text(&defaults), key.help);
    }
    table
}

macro_rules! keys {
    ($($group:literal { $($name:ident $(| $alias:ident)* : $syntax:ty => $($section:ident).+, $help:literal;)+ })+) => {
        /// In the order of the help.
        pub static KEYS: &[Key] = &[$($(Key {
            name: stringify!($name),
            aliases: &[$(stringify!($alias)),*],
            group: $group,
            help: $help,
            hint: <$syntax as Notation>::HINT,
            is_switch: <$syntax as Notation>::IS_SWITCH,
            is_list: <$syntax as Notation>::IS_LIST,
            read: |config, text| {
                config.$($section).+ = <$syntax as Syntax<_>>::read(text)?;
                Ok(())
            },
            write: |config| <$syntax as Syntax<_>>::write(&config.$($section).+),
        },)+)+];
    };
}

choice!(LogFormat, "text|json" { Text: "text", Json: "json" });

choice!(DType, "auto|float32|float16|bfloat16" {
    Auto: "auto",
    Float32: "float32" | "f32" | "float",
    Float16: "float16" | "f16" | "half",
    BFloat16: "bfloat16" | "bf16",
});

choice!(KvCacheDType, "auto|float32|float16|bfloat16|fp8" {
    Auto: "auto",
    Float32: "float32" | "f32" | "float",
    Float16: "float16" | "f16" | "half",
    BFloat16: "bfloat16" | "bf16",
    Fp8: "fp8" | "fp8_e4m3",
});

choice!(Quantization, "none|fp8" { None: "none", Fp8: "fp8" });

choice!(Strategy, "balanced|least-request|least-latency|least-kv-cache|throughput|prefix-cache|random|power-of-two" {
    Balanced: "balanced",
    LeastRequest: "least-request",
    LeastLatency: "least-latency",
    LeastKvCache: "least-kv-cache",
    Throughput: "throughput",
    PrefixCache: "prefix-cache",
    Random: "random",
    PowerOfTwo: "power-of-two",
});

choice!(LoadFormat, "auto|safetensors|gguf|dummy" {
    Auto: "auto",
    Safetensors: "safetensors",
    Gguf: "gguf",
    Dummy: "dummy",
});

/// `cuda:1` among them, which no list of choices can name.
struct Device;

impl Notation for Device {
    const HINT: &'static str = "auto|cpu|cuda|cuda:N";
}

impl Syntax<DeviceChoice> for Device {
    fn read(text: &str) -> Result<DeviceChoice, String> {
        text.trim().parse()
    }

    fn write(value: &DeviceChoice) -> toml::Value {
        toml::Value::String(value.to_string())
    }
}

keys! {
    "Server" {
        host: Text => api.host,
            "Address to listen on.";
        port: Count => api.port,
            "Port to listen on; 0 takes a free one.";
        api_keys | api_key: Secrets => api.api_keys,
            "Keys that clients present, plain or as `sha256:` and 64 hexadecimal digits; without any, everybody may come in.";
        max_connections: Count => api.max_connections,
            "Connections served at once; more get 503, but for health and metrics.";
        max_body_bytes: Size => api.max_body_bytes,
            "Longest body of a request.";
        header_read_timeout | header_timeout: Time => api.header_read_timeout,
            "Time in which the head of a request has to arrive, and for which an idle connection is kept.";
        body_read_timeout | body_timeout: Time => api.body_read_timeout,
            "Time in which the body of a request has to arrive.";
        write_timeout: Time => api.write_timeout,
            "Time for which a client may take nothing of what is sent to it; then its connection is cut.";
        stream_keep_alive: Time => api.stream_keep_alive,
            "Silence on a stream after which a comment line is sent.";
        max_input_tokens: Auto<Count> => api.max_input_tokens,
            "Longest prompt, in tokens; `auto` is what the model's context holds.";
        max_output_tokens: Auto<Count> => api.max_output_tokens,
            "Tokens generated per choice at most; `auto` is what the model's context holds.";
    }
    "Model" {
        model: Text => process.model,
            "What to serve: a name of the catalog, a hub id (`owner/name`), a directory, or a `.gguf` file.";
        served_model_name: List => process.served_model_name,
            "Names under which the API serves the model, the first in its answers; without any, the model's own name.";
        load_format: Choice<LoadFormat> => process.load_format,
            "Which files to load; `dummy` makes random weights in the shapes of a `config.json`, for measuring.";
    }
    "Downloads" {
        home | download_dir: Auto<Location> => process.home,
            "Where downloads are kept; `auto` is `outrigger` in the XDG cache folder.";
        revision: Text => hub.revision,
            "Branch, tag or commit of a hub id.";
        hub_endpoint: Auto<Text> => hub.endpoint,
            "Address of the model hub; `auto` is the public one. HF_ENDPOINT is understood as well.";
        hub_token | hf_token: Auto<Token> => hub.token,
            "Access token for models that ask for one. HF_TOKEN is understood as well.";
    }
    "Engine" {
        max_model_len: Auto<Count> => engine.max_model_len,
            "Longest prompt and output together, in tokens; `auto` is the model's own limit.";
        max_num_seqs: Auto<Count> => compute.max_num_seqs,
            "Sequences that are computed at one time; `auto` is 64, and 256 on a GPU.";
        max_num_batched_tokens: Auto<Count> => compute.max_num_batched_tokens,
            "Tokens in one step; bounds the pause that a long prompt causes to others. `auto` is 512, and 8192 on a GPU.";
        max_num_requests: Count => engine.max_num_requests,
            "Requests in the engine, running and waiting: a last bound on memory.";
        enable_prefix_caching: Switch => engine.enable_prefix_caching,
            "Keeps the KV blocks of past prompts, and reuses them for prompts that begin alike.";
    }
    "Compute" {
        device: Device => compute.device,
            "What computes; `auto` is the first GPU where there is one, else the processors.";
        gpu_memory_utilization: Number => compute.gpu_memory_utilization,
            "Fraction of the GPU's memory that this process may use: weights, activations, and the KV pool with what is left.";
        dtype: Choice<DType> => compute.dtype,
            "Number type of the weights in memory, and so of the arithmetic; `auto` is as the file has them.";
        quantization: Choice<Quantization> => compute.quantization,
            "What dense projections become on a GPU; `fp8` is E4M3 for weights (a scale a row) and for what they multiply.";
        kv_cache_dtype: Choice<KvCacheDType> => compute.kv_cache_dtype,
            "Number type of the KV cache; `auto` follows `dtype`, and is float16 where that is `auto`.";
        kv_cache_memory | kv_cache_memory_bytes: Auto<Size> => compute.kv_cache_memory,
            "Size of the KV pool; `auto` is 1 GiB (pages never used cost nothing), on a GPU what `gpu_memory_utilization` leaves.";
        block_size: Count => compute.block_size,
            "Tokens of a KV block: 16, 32 or a multiple of 64.";
        threads: Auto<Count> => compute.threads,
            "Threads that compute; `auto` is as many as the process may use.";
    }
    "Queue" {
        max_num_queued_requests | max_num_queued_reqs: Count => admission.max_num_queued_requests,
            "Choices (a request has `n` for each prompt) that may wait beyond those for which the batch has room; over it requests get 429.";
        max_num_queued_tokens: Count => admission.max_num_queued_tokens,
            "Prompt tokens that may wait; over it requests get 429.";
    }
    "Health" {
        probe_interval: Time => health.probe_interval,
            "From the end of one synthetic inference to the next.";
        probe_soft_limit: Time => health.probe_soft_limit,
            "A slower synthetic inference degrades the node.";
        probe_hard_limit: Time => health.probe_hard_limit,
            "Without an answer for this long the node is unready.";
        probe_max_tokens: Count => health.probe_max_tokens,
            "Tokens of a synthetic inference.";
        probe_recovery: Count => health.probe_recovery,
            "Good synthetic inferences in a row that lift a bad verdict.";
        probe_failure_threshold: Count => health.probe_failure_threshold,
            "Synthetic inferences with wrong numbers, and no right one between them, that make the node failed: restart it; 0 is never. The second follows the first at once.";
        stall_timeout: Time => health.stall_timeout,
            "An engine with work and without progress for this long makes the node unready.";
        liveness_timeout: Time => health.liveness_timeout,
            "An engine with work and without progress for this long makes the node failed: restart it.";
        memory_interval: Time => health.memory_interval,
            "From one reading of the memory to the next.";
        memory_warn_mark: Number => health.memory_warn_mark,
            "Fraction of the memory in use from which it is logged.";
        memory_shrink_mark: Number => health.memory_shrink_mark,
            "Fraction of the memory in use from which the node is degraded.";
        memory_removal_mark: Number => health.memory_removal_mark,
            "Fraction of the memory in use from which the node is unready.";
        queue_saturation_mark: Number => health.queue_saturation_mark,
            "Fullness of the queue from which a node is unready, while another ready node is below it.";
    }
    "Cluster" {
        node_id: Auto<Text> => cluster.node_id,
            "Names this node among the others; `auto` is a random name.";
        cluster_id: Text => cluster.cluster_id,
            "Names the cluster; nodes of another name are not heard.";
        gossip_addr: Auto<Address> => cluster.gossip_addr,
            "UDP address to gossip on; `auto` is none: a cluster of one.";
        gossip_advertise_addr: Auto<Address> => cluster.gossip_advertise_addr,
            "Where others reach it; `auto` is `gossip_addr`.";
        peer_addr: Auto<Address> => cluster.peer_addr,
            "TCP address on which other nodes call; `auto` is `gossip_addr`, host and port.";
        peer_advertise_addr: Auto<Address> => cluster.peer_advertise_addr,
            "Where others reach it; `auto` is `peer_addr`, with the host of `gossip_advertise_addr` where that is given.";
        peers: List => cluster.peers,
            "Gossip addresses of other nodes, `host:port`; one is enough, and names are resolved again and again.";
        cluster_key_file: Auto<Location> => cluster.cluster_key_file,
            "File with the secret that all nodes share, 32 bytes or more; all traffic between nodes is sealed with it.";
        zone: Plain => cluster.zone,
            "Requests prefer nodes of their own zone.";
        gossip_interval: Time => cluster.gossip_interval,
            "From one round of gossip to the next.";
        peer_connect_timeout: Time => cluster.peer_connect_timeout,
            "Time in which a connection to another node has to stand.";
        peer_tls_cert_file: Auto<Location> => cluster.peer_tls_cert_file,
            "Certificate chain (PEM) for calls between nodes; `auto` derives one from the cluster key.";
        peer_tls_key_file: Auto<Location> => cluster.peer_tls_key_file,
            "Its private key (PEM).";
        peer_tls_ca_file: Auto<Location> => cluster.peer_tls_ca_file,
            "The authority (PEM) that signs the nodes' certificates.";
        admin_addr: Auto<Address> => api.admin_addr,
            "Address for `/cluster`, `outrigger status` and metrics; `auto` is none.";
    }
    "Routing" {
        placement: Choice<Strategy> => router.placement,
            "How a replica is chosen; a request may say otherwise in `x-outrigger-placement`.";
        peer_stall_timeout: Time => router.peer_stall_timeout,
            "Silence of a replica after which a stream continues on another.";
        max_failovers: Count => router.max_failovers,
            "Replicas that one stream may lose.";
        failover_timeout: Time => router.failover_timeout,
            "How long a stream waits for a replica that could continue it.";
        retry_budget: Number => router.retry_budget,
            "Retries before the first token, as a fraction of the requests.";
        journal_ttl: Time => router.journal_ttl,
            "How long the journal of an ended or broken stream is kept, for clients that reconnect.";
        journal_memory: Size => router.journal_memory,
            "Memory for all journals together.";
        journal_ack_timeout: Time => router.journal_ack_timeout,
            "How long a stream's first token waits for another node to hold its journal.";
    }
    "Log" {
        log_format: Choice<LogFormat> => trace.log_format,
            "Form of the log on standard error: `text` for people, `json` for collectors.";
        log_level: Text => trace.log_level,
            "Least severe level to log, or directives such as `info,outrigger=debug`.";
    }
    "Shutdown and faults" {
        shutdown_timeout: Time => process.shutdown_timeout,
            "After SIGTERM or SIGINT, how long running requests may go on.";
        drain_linger: Time => process.drain_linger,
            "After SIGTERM, how long a node with peers still takes requests, for them; longer than a load balancer needs.";
        failure_linger: Time => process.failure_linger,
            "After the engine has failed, how long the front still answers probes before the process ends.";
        fault_injection: Switch => process.fault_injection,
            "Opens `POST /debug/fault`, which hangs, panics or corrupts the engine. For drills only.";
    }
}
