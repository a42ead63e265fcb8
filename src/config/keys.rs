//! The table of keys: one row gives a key its name, its aliases, its syntax, its place in the sections and its help.
//! The file, the environment, the flags, `--help`, `outrigger config` and the tables of docs/configuration.md all follow from it.
//!
//! Defaults are the sections' own; they are not repeated here.

use super::Config;
use super::process::GenerationConfig;
use super::syntax::{
    Address, Auto, Count, List, Location, Notation, Number, OneOf, Plain, Secrets, Size, Switch, Syntax, Text, Time,
    Token, one_of,
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

/// The tables of docs/configuration.md, one for each group.
pub fn markdown_tables() -> String {
    let defaults = Config::default();
    let (mut table, mut group) = (String::new(), "");
    for key in KEYS {
        if key.group != group {
            group = key.group;
            table += &format!("\n### {group}\n\n| key | value | default | meaning |\n|---|---|---|---|\n");
        }
        let names: Vec<String> = key.names().map(|name| format!("`{name}`")).collect();
        let default = match key.text(&defaults) {
            text if text.is_empty() => "none".to_owned(),
            text => format!("`{text}`"),
        };
        let hint = key.hint.replace('|', " \\| ");
        table += &format!("| {} | {hint} | {default} | {} |\n", names.join(", "), key.help);
    }
    table + "\n"
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

one_of!(LogFormat, "text|json" { Text: "text", Json: "json" });

one_of!(DType, "auto|float32|float16|bfloat16" {
    Auto: "auto",
    Float32: "float32" | "f32" | "float",
    Float16: "float16" | "f16" | "half",
    BFloat16: "bfloat16" | "bf16",
});

one_of!(KvCacheDType, "auto|float32|float16|bfloat16|fp8" {
    Auto: "auto",
    Float32: "float32" | "f32" | "float",
    Float16: "float16" | "f16" | "half",
    BFloat16: "bfloat16" | "bf16",
    Fp8: "fp8" | "fp8_e4m3",
});

one_of!(Quantization, "none|fp8" { None: "none", Fp8: "fp8" });

one_of!(Strategy, "balanced|least-request|least-latency|least-kv-cache|throughput|prefix-cache|random|power-of-two" {
    Balanced: "balanced",
    LeastRequest: "least-request",
    LeastLatency: "least-latency",
    LeastKvCache: "least-kv-cache",
    Throughput: "throughput",
    PrefixCache: "prefix-cache",
    Random: "random",
    PowerOfTwo: "power-of-two",
});

one_of!(LoadFormat, "auto|safetensors|gguf|dummy" {
    Auto: "auto",
    Safetensors: "safetensors",
    Gguf: "gguf",
    Dummy: "dummy",
});

one_of!(GenerationConfig, "auto|vllm" { Auto: "auto", Vllm: "vllm" | "none" });

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
            "Port to listen on; 0 picks a free port.";
        api_keys | api_key: Secrets => api.api_keys,
            "API keys that clients may present, in plain text or as `sha256:` and 64 hexadecimal digits. Without any, no key is asked for.";
        tenants_file: Auto<Location> => api.tenants_file,
            "TOML file with organizations, their users and the digests of their API keys; read again when it changes and on SIGHUP.";
        isolate_prefix_cache: Switch => api.isolate_prefix_cache,
            "Let different tenants never share cached prompts, so that nobody can tell from the time of an answer what others have asked.";
        max_connections: Count => api.max_connections,
            "Most connections served at once. When all are taken, the connection that has been idle longest is closed for a new one; when none is idle, new ones get 503, except for health and metrics.";
        max_body_bytes: Size => api.max_body_bytes,
            "Largest request body.";
        header_read_timeout | header_timeout: Time => api.header_read_timeout,
            "Close a connection that has not sent a request's headers after this long, or that is idle for this long.";
        body_read_timeout | body_timeout: Time => api.body_read_timeout,
            "Refuse a request whose body has not arrived after this long.";
        write_timeout: Time => api.write_timeout,
            "Disconnect a client that reads nothing for this long.";
        stream_keep_alive: Time => api.stream_keep_alive,
            "Send a comment line on a stream that has been silent for this long.";
        allowed_origins: List => api.allowed_origins,
            "Origins of web pages that may call the API from a browser (CORS), such as `https://chat.example.org`; `*` is any, an empty list turns CORS off.";
        allowed_methods: List => api.allowed_methods,
            "HTTP methods that these pages may use.";
        allowed_headers: List => api.allowed_headers,
            "Request headers that these pages may send.";
        allow_credentials: Switch => api.allow_credentials,
            "Let browsers send cookies with requests of these pages; `allowed_origins` must then name them.";
        max_input_tokens: Auto<Count> => api.max_input_tokens,
            "Longest prompt in tokens; `auto` is the model's context length.";
        max_output_tokens: Auto<Count> => api.max_output_tokens,
            "Most tokens generated per choice; `auto` is the model's context length.";
    }
    "Model" {
        model: Text => process.model,
            "Model to serve: a name from the catalog, a hub id (`owner/name`), a directory, or a `.gguf` file.";
        served_model_name: List => process.served_model_name,
            "Names under which the API serves the model; responses carry the first. Without any, the model's own name.";
        load_format: OneOf<LoadFormat> => process.load_format,
            "Which files to load. `dummy` fills the shapes of a `config.json` with random weights, for benchmarks.";
        generation_config: OneOf<GenerationConfig> => process.generation_config,
            "Sampling defaults for requests that give no value of their own. `auto` takes those of the model's authors \
             (`generation_config.json`, the GGUF file or the catalog), `vllm` the API's (temperature 1, nothing cut off).";
        chat_template: Auto<Location> => process.chat_template,
            "File with a Jinja chat template to use instead of the model's own; `auto` is the model's own.";
    }
    "Downloads" {
        home | download_dir: Auto<Location> => process.home,
            "Folder for downloads; `auto` is `outrigger` in the XDG cache folder.";
        revision: Text => hub.revision,
            "Branch, tag or commit of a hub model.";
        hub_endpoint: Auto<Text> => hub.endpoint,
            "URL of the model hub; `auto` is the public one. The variable HF_ENDPOINT also sets it.";
        hub_token | hf_token: Auto<Token> => hub.token,
            "Access token for gated models. The variable HF_TOKEN also sets it.";
    }
    "Engine" {
        max_model_len: Auto<Count> => engine.max_model_len,
            "Most tokens of prompt and output together; `auto` is the model's own limit.";
        max_num_seqs: Auto<Count> => compute.max_num_seqs,
            "Most sequences in a batch; `auto` is 64 on a CPU and 256 on a GPU.";
        max_num_batched_tokens: Auto<Count> => compute.max_num_batched_tokens,
            "Most tokens computed in one step. Less makes a long prompt delay other requests less. `auto` is 512 on a CPU and 8192 on a GPU.";
        max_num_requests: Count => engine.max_num_requests,
            "Most requests in the engine, running and waiting. A last bound on memory.";
        enable_prefix_caching: Switch => engine.enable_prefix_caching,
            "Keep the KV blocks of past prompts and reuse them for prompts that start with the same tokens.";
    }
    "Compute" {
        device: Device => compute.device,
            "Device that computes; `auto` is the first GPU if there is one, else the CPU.";
        gpu_memory_utilization: Number => compute.gpu_memory_utilization,
            "Fraction of the GPU's memory that this process may use for weights, activations and the KV cache.";
        dtype: OneOf<DType> => compute.dtype,
            "Number type of the weights in memory and of the arithmetic; `auto` is the type in the model's files.";
        quantization: OneOf<Quantization> => compute.quantization,
            "Quantize dense weights when loading them on a GPU. `fp8` is E4M3, with one scale per row, for weights and activations.";
        kv_cache_dtype: OneOf<KvCacheDType> => compute.kv_cache_dtype,
            "Number type of the KV cache. `auto` is the same as `dtype`, or float16 if `dtype` is `auto`.";
        kv_cache_memory | kv_cache_memory_bytes: Auto<Size> => compute.kv_cache_memory,
            "Size of the KV cache. `auto` is 1 GiB on a CPU (memory is taken as it is used), and what `gpu_memory_utilization` leaves on a GPU.";
        block_size: Count => compute.block_size,
            "Tokens in a KV block: 16, 32 or a multiple of 64.";
        threads: Auto<Count> => compute.threads,
            "Compute threads; `auto` is the number of CPUs that the process may use.";
    }
    "Queue" {
        max_num_queued_requests | max_num_queued_reqs: Count => admission.max_num_queued_requests,
            "Most sequences that may wait for a place in the batch; a request counts `n` for each prompt. Further requests get 429.";
        max_num_queued_tokens: Count => admission.max_num_queued_tokens,
            "Most prompt tokens that may wait. Further requests get 429.";
    }
    "Health" {
        probe_interval: Time => health.probe_interval,
            "Pause between two synthetic inferences.";
        probe_soft_limit: Time => health.probe_soft_limit,
            "Report the node degraded when a synthetic inference takes longer than this.";
        probe_hard_limit: Time => health.probe_hard_limit,
            "Report the node unready when a synthetic inference takes longer than this.";
        probe_max_tokens: Count => health.probe_max_tokens,
            "Tokens that a synthetic inference generates.";
        probe_recovery: Count => health.probe_recovery,
            "Successful synthetic inferences in a row that clear a bad result.";
        probe_failure_threshold: Count => health.probe_failure_threshold,
            "Fail the node (it exits, to be restarted) after this many synthetic inferences with wrong tokens and no right one between them. 0 disables this. The node repeats a wrong one at once.";
        stall_timeout: Time => health.stall_timeout,
            "Report the node unready when the engine has unanswered requests but makes no progress for this long. New requests then get 503, or go to other nodes.";
        liveness_timeout: Time => health.liveness_timeout,
            "Fail the node (it exits, to be restarted) when the engine has unanswered requests but makes no progress for this long, or when the HTTP server hangs for this long. A hang of an idle engine is noticed at most 3 s later.";
        memory_interval: Time => health.memory_interval,
            "Time between two readings of the memory use.";
        memory_warn_mark: Number => health.memory_warn_mark,
            "Log a warning when more than this fraction of the memory is in use.";
        memory_shrink_mark: Number => health.memory_shrink_mark,
            "Report the node degraded, and send it fewer requests, when more than this fraction of the memory is in use.";
        memory_removal_mark: Number => health.memory_removal_mark,
            "Report the node unready when more than this fraction of the memory is in use.";
        queue_saturation_mark: Number => health.queue_saturation_mark,
            "Report the node unready when its queue is fuller than this fraction and another ready node's is not.";
    }
    "Cluster" {
        node_id: Auto<Text> => cluster.node_id,
            "Name of this node in the cluster; `auto` is a random name.";
        cluster_id: Text => cluster.cluster_id,
            "Name of the cluster. Nodes with another name are ignored.";
        gossip_addr: Auto<Address> => cluster.gossip_addr,
            "UDP address for gossip between nodes; `auto` is none, and the node runs alone.";
        gossip_advertise_addr: Auto<Address> => cluster.gossip_advertise_addr,
            "Address at which other nodes reach `gossip_addr`; `auto` is `gossip_addr` itself.";
        peer_addr: Auto<Address> => cluster.peer_addr,
            "TCP address for calls from other nodes; `auto` is the same host and port as `gossip_addr`.";
        peer_advertise_addr: Auto<Address> => cluster.peer_advertise_addr,
            "Address at which other nodes reach `peer_addr`; `auto` is `peer_addr`, with the host of `gossip_advertise_addr` if that is set.";
        peers: List => cluster.peers,
            "Gossip addresses of other nodes, `host:port`. One is enough. Host names are resolved repeatedly.";
        cluster_key_file: Auto<Location> => cluster.cluster_key_file,
            "File with the secret that all nodes share (32 bytes or more), or a list of secrets: the first encrypts the traffic between nodes, any decrypts it. Read again when it changes.";
        zone: Plain => cluster.zone,
            "Name of this node's zone. Requests prefer nodes in the zone where they arrive.";
        gossip_interval: Time => cluster.gossip_interval,
            "Time between two rounds of gossip.";
        peer_connect_timeout: Time => cluster.peer_connect_timeout,
            "Give up connecting to another node after this long.";
        peer_tls_cert_file: Auto<Location> => cluster.peer_tls_cert_file,
            "Certificate chain (PEM) for calls between nodes; `auto` derives one from the cluster key. Read again when it changes.";
        peer_tls_key_file: Auto<Location> => cluster.peer_tls_key_file,
            "Private key (PEM) of `peer_tls_cert_file`.";
        peer_tls_ca_file: Auto<Location> => cluster.peer_tls_ca_file,
            "Certificate authority (PEM) that signs the nodes' certificates.";
        admin_addr: Auto<Address> => api.admin_addr,
            "Address for `/cluster`, `outrigger status` and metrics; `auto` is none.";
    }
    "Routing" {
        placement: OneOf<Strategy> => router.placement,
            "How to choose the replica for a request. A request can override it with the header `x-outrigger-placement`.";
        peer_stall_timeout: Time => router.peer_stall_timeout,
            "Continue a stream on another replica when its replica sends nothing for this long.";
        slow_node_factor: Number => router.slow_node_factor,
            "Treat a replica as slow when equal work takes it this many times as long as its siblings; 0 turns this off.";
        max_failovers: Count => router.max_failovers,
            "Most times that one stream may move to another replica after a failure.";
        failover_timeout: Time => router.failover_timeout,
            "End a stream with an error when no replica can continue it within this time, and refuse a request that a starting node has held for so long.";
        retry_budget: Number => router.retry_budget,
            "Most retries before the first token, as a fraction of the requests.";
        journal_ttl: Time => router.journal_ttl,
            "Keep the journal of a finished or broken stream for this long, so that its client can reconnect.";
        journal_memory: Size => router.journal_memory,
            "Most memory for all journals together.";
        journal_ack_timeout: Time => router.journal_ack_timeout,
            "Delay a stream's first token by at most this long while waiting for another node to hold its journal.";
    }
    "Log" {
        log_format: OneOf<LogFormat> => trace.log_format,
            "Format of the log on standard error: `text` for people, `json` for collectors.";
        log_level: Text => trace.log_level,
            "Lowest level to log, or filter directives such as `info,outrigger=debug`.";
    }
    "Shutdown and faults" {
        shutdown_timeout: Time => process.shutdown_timeout,
            "Compute running requests for at most this long after SIGTERM or SIGINT.";
        relay_timeout: Time => process.relay_timeout,
            "After `shutdown_timeout`, pass on streams that other nodes compute for at most this long. The node ends as soon as none is left.";
        drain_linger: Time => process.drain_linger,
            "Keep accepting connections, and pass their requests to peers, for this long after SIGTERM. Must be longer than a load balancer takes to notice.";
        failure_linger: Time => process.failure_linger,
            "Keep accepting connections and answering probes for this long after the engine has failed.";
        fault_injection: Switch => process.fault_injection,
            "Open `POST /debug/fault`, which makes the engine hang, panic or compute wrong numbers. For drills only.";
    }
}
