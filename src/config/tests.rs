//! The promises of the configuration: precedence, aliases, every problem at once, no secret in the open.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::Duration;

use super::*;
use crate::engine::model::decoder::DType;
use crate::engine::model_runner::KvCacheDType;

fn read(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Invocation, ConfigError> {
    let variables = [("HOME", "/home/somebody")].iter().chain(variables);
    let variables = variables.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Invocation::read(arguments.iter().map(|&argument| argument.to_owned()), variables)
}

fn problems(arguments: &[&str], variables: &[(&str, &str)]) -> Vec<String> {
    match read(arguments, variables) {
        Err(ConfigError::Problems(problems)) => problems,
        other => panic!("expected problems, got {other:?}"),
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn flags_win_over_variables_and_variables_over_the_file() {
    let file = file("model = 'file'\nshutdown_timeout = 3\nlog_level = 'warn'\n");
    let path = file.path().to_str().unwrap();
    let variables = [("OUTRIGGER_MODEL", "variable"), ("OUTRIGGER_SHUTDOWN_TIMEOUT", "2s")];
    let invocation = read(&["--config", path, "--model", "flag"], &variables).unwrap();
    assert_eq!(invocation.config.process.model, "flag");
    assert_eq!(invocation.config.process.shutdown_timeout, Duration::from_secs(2));
    assert_eq!(invocation.config.trace.log_level, "warn");
    assert_eq!(invocation.origins["model"], Origin::Flag("model".into()));
    assert_eq!(invocation.origins["shutdown_timeout"], Origin::Variable("OUTRIGGER_SHUTDOWN_TIMEOUT".into()));
    assert_eq!(invocation.origins["log_level"], Origin::File(path.into()));
}

#[test]
fn the_file_may_be_named_by_a_variable_and_a_flag_names_another() {
    let (by_variable, by_flag) = (file("model = 'variable'"), file("model = 'flag'"));
    let variables = [("OUTRIGGER_CONFIG", by_variable.path().to_str().unwrap())];
    assert_eq!(read(&[], &variables).unwrap().config.process.model, "variable");
    let invocation = read(&["--config", by_flag.path().to_str().unwrap()], &variables).unwrap();
    assert_eq!(invocation.config.process.model, "flag");
}

#[test]
fn serve_is_the_default_and_takes_the_model_as_an_argument() {
    assert_eq!(read(&[], &[]).unwrap().command, Command::Serve);
    assert_eq!(read(&["--model", "m"], &[]).unwrap().command, Command::Serve);
    assert_eq!(read(&["config", "m"], &[]).unwrap().command, Command::ShowConfig);
    assert_eq!(read(&["serve", "owner/name"], &[]).unwrap().config.process.model, "owner/name");
    assert!(matches!(read(&["serve", "a", "--model", "b"], &[]), Err(ConfigError::Usage(_))));
}

#[test]
fn every_problem_is_reported_at_once_with_its_key_and_origin() {
    let file = file("modle = 'x'\nshutdown_timeout = 'soon'\nmodel = { a = 1 }\n");
    let arguments = ["--config", file.path().to_str().unwrap(), "--fault-injection=perhaps"];
    let problems = problems(&arguments, &[("OUTRIGGER_LOG_FORMAT", "xml"), ("OUTRIGGER_LOG_LEVLE", "info")]);
    let expected = [
        "did you mean `model`",
        "model must be one value",
        "shutdown_timeout",
        "fault_injection",
        "log_format",
        "did you mean `OUTRIGGER_LOG_LEVEL`",
    ];
    for expected in expected {
        assert!(problems.iter().any(|problem| problem.contains(expected)), "{expected}: {problems:#?}");
    }
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    assert!(problems.iter().any(|problem| problem.contains("(from --fault-injection)")), "{problems:#?}");
    assert!(problems.iter().any(|problem| problem.contains("(from $OUTRIGGER_LOG_FORMAT)")), "{problems:#?}");
}

#[test]
fn a_broken_or_missing_file_is_a_problem() {
    let file = file("model = ");
    assert!(problems(&["--config", file.path().to_str().unwrap()], &[])[0].starts_with("config file"));
    assert!(problems(&["--config", "/nonexistent/outrigger.toml"], &[])[0].contains("/nonexistent/outrigger.toml"));
}

#[test]
fn vllm_spellings_are_understood() {
    let arguments = [
        "--max-num-queued-reqs",
        "3",
        "--dtype",
        "half",
        "--kv-cache-dtype",
        "f32",
        "--api-key",
        "a",
        "--api-key",
        "b",
        "--served-model-name",
        "x,y",
        "--max-model-len",
        "4K",
        "--kv-cache-memory",
        "2GiB",
        "--no-enable-prefix-caching",
    ];
    let config = read(&arguments, &[]).unwrap().config;
    assert_eq!(config.admission.max_num_queued_requests, 3);
    assert_eq!(config.compute.dtype, DType::Float16);
    assert_eq!(config.compute.kv_cache_dtype, KvCacheDType::Float32);
    assert_eq!(config.api.api_keys, ["a", "b"]);
    assert_eq!(config.process.served_model_name, ["x", "y"]);
    assert_eq!(config.engine.max_model_len, Some(4096));
    assert_eq!(config.compute.kv_cache_memory, Some(2 << 30));
    assert!(!config.engine.enable_prefix_caching);
    for (spelling, dtype) in [("float32", DType::Float32), ("bf16", DType::BFloat16), ("auto", DType::Auto)] {
        assert_eq!(read(&["--dtype", spelling], &[]).unwrap().config.compute.dtype, dtype);
    }
}

#[test]
fn an_unknown_flag_is_refused() {
    assert!(matches!(read(&["--max-num-sequences", "3"], &[]), Err(ConfigError::Usage(_))));
}

#[test]
fn a_switch_is_set_alone_or_with_a_value_and_negated() {
    let fault_injection = |arguments: &[&str]| {
        read(arguments, &[("OUTRIGGER_FAULT_INJECTION", "true")]).unwrap().config.process.fault_injection
    };
    assert!(fault_injection(&["--fault-injection"]));
    assert!(!fault_injection(&["--fault-injection=false"]));
    assert!(!fault_injection(&["--no-fault-injection"]));
    assert!(fault_injection(&["--no-fault-injection", "--fault-injection"]));
    assert!(fault_injection(&[]));
}

#[test]
fn the_word_behind_a_switch_is_its_value_and_never_the_model() {
    for (value, expected) in [("true", true), ("FALSE", false), ("1", true), ("off", false)] {
        let config = read(&["serve", "--fault-injection", value, "owner/name"], &[]).unwrap().config;
        assert_eq!(
            (config.process.fault_injection, config.process.model.as_str()),
            (expected, "owner/name"),
            "{value}"
        );
        let config = read(&["--fault-injection", value], &[]).unwrap().config;
        assert_eq!(config.process.fault_injection, expected, "{value}");
    }
    let config = read(&["serve", "--fault-injection", "owner/name"], &[]).unwrap().config;
    assert_eq!((config.process.fault_injection, config.process.model.as_str()), (true, "owner/name"));
    for arguments in [
        &["serve", "--no-fault-injection", "true"][..],
        &["drill", "--json", "true"],
        &["serve", "--fault-injection=perhaps"],
        &["serve", "--fault-injection", "true", "true", "false"],
    ] {
        assert!(read(arguments, &[]).is_err(), "{arguments:?}");
    }
    // Values of other flags, and whatever stands behind `--`, are left alone.
    assert_eq!(read(&["--model", "true"], &[]).unwrap().config.process.model, "true");
    assert_eq!(read(&["serve", "--", "on"], &[]).unwrap().config.process.model, "on");
}

#[test]
fn lists_are_understood_as_vllm_writes_them() {
    let origins = |arguments: &[&str]| read(arguments, &[]).unwrap().config.api.allowed_origins;
    assert_eq!(origins(&[]), ["*"]);
    let two = ["https://a.example", "http://localhost:3000"];
    assert_eq!(origins(&["--allowed-origins", "https://a.example,http://localhost:3000"]), two);
    assert_eq!(origins(&["--allowed-origins", r#"["https://a.example", "http://localhost:3000"]"#]), two);
    assert_eq!(origins(&["--allowed-origins", two[0], "--allowed-origins", two[1]]), two);
    assert!(origins(&["--allowed-origins", "[]"]).is_empty());
    assert!(problems(&["--allowed-origins", "[1]"], &[])[0].starts_with("allowed_origins: `[1]` is not an origin"));
    assert_eq!(<syntax::List as syntax::Syntax<Vec<String>>>::read("[::1]:7946"), Ok(vec!["[::1]:7946".into()]));
    assert!(problems(&["--allow-credentials"], &[])[0].starts_with("allow_credentials"));
    let file = file("allowed_origins = []\n");
    assert!(origins(&["--config", file.path().to_str().unwrap()]).is_empty());
}

#[test]
fn kubernetes_service_links_are_not_taken_for_keys() {
    let links = [
        ("OUTRIGGER_PORT", "tcp://10.96.0.7:8000"),
        ("OUTRIGGER_PORT_8000_TCP", "tcp://10.96.0.7:8000"),
        ("OUTRIGGER_PORT_8000_TCP_ADDR", "10.96.0.7"),
        ("OUTRIGGER_SERVICE_HOST", "10.96.0.7"),
        ("OUTRIGGER_SERVICE_PORT", "8000"),
        ("OUTRIGGER_SERVICE_PORT_HTTP", "8000"),
        ("OUTRIGGER_HEADLESS_SERVICE_HOST", "10.96.0.8"),
        ("OUTRIGGER_HEADLESS_PORT", "tcp://10.96.0.8:8000"),
    ];
    assert_eq!(read(&[], &links).unwrap().warnings.len(), links.len());
}

#[test]
fn other_programs_variables_are_left_alone() {
    assert!(
        read(&[], &[("PATH", "/bin"), ("MODEL", "x"), ("OUTRIGGERS_MODEL", "x"), ("HF_TOKEN", "")])
            .unwrap()
            .origins
            .is_empty()
    );
}

#[test]
fn the_home_follows_from_the_environment_unless_it_is_said() {
    let home = |arguments: &[&str], variables: &[(&str, &str)]| read(arguments, variables).unwrap().config.hub.home;
    assert_eq!(home(&[], &[]), PathBuf::from("/home/somebody/.cache/outrigger"));
    assert_eq!(home(&[], &[("XDG_CACHE_HOME", "/cache")]), PathBuf::from("/cache/outrigger"));
    assert_eq!(home(&[], &[("OUTRIGGER_HOME", "/models")]), PathBuf::from("/models"));
    assert_eq!(home(&["--download-dir", "/flag"], &[("OUTRIGGER_HOME", "/models")]), PathBuf::from("/flag"));
    let nowhere = Invocation::read([], []).unwrap_err().to_string();
    assert!(nowhere.contains("home"), "{nowhere}");
}

#[test]
fn the_hubs_own_variables_count_least() {
    let token = |arguments: &[&str], variables: &[(&str, &str)]| read(arguments, variables).unwrap().config.hub.token;
    assert_eq!(token(&[], &[("HF_TOKEN", "ambient")]).as_deref(), Some("ambient"));
    assert_eq!(token(&[], &[("HF_TOKEN", "ambient"), ("OUTRIGGER_HUB_TOKEN", "own")]).as_deref(), Some("own"));
    let file = file("hf_token = 'file'");
    let arguments = ["--config", file.path().to_str().unwrap()];
    assert_eq!(token(&arguments, &[("HF_TOKEN", "ambient")]).as_deref(), Some("file"));
}

#[test]
fn no_secret_is_shown() {
    let invocation = read(&["--hub-token", "hush-hush"], &[]).unwrap();
    assert_eq!(invocation.config.hub.token.as_deref(), Some("hush-hush"));
    let shown = invocation.effective()
        + &format!("{invocation:?}")
        + &KEYS.iter().map(|key| key.text(&invocation.config)).collect::<String>();
    assert!(!shown.contains("hush"), "{shown}");
    assert!(shown.contains("# hub_token = \"<redacted>\""), "{shown}");
    let problems = problems(&["--hub-token", "<redacted>"], &[]);
    assert!(problems[0].starts_with("hub_token"), "{problems:?}");
}

#[test]
fn the_table_is_in_order() {
    let mut names = BTreeSet::from(["config", "help", "version", "no_config"]);
    for key in KEYS {
        for name in key.names() {
            assert!(names.insert(name), "{name} stands twice");
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'), "{name}");
            assert!(!key.is_switch || names.insert(Box::leak(format!("no_{name}").into_boxed_str())));
        }
        assert!(key.help.ends_with('.'), "{}: the help is a sentence", key.name);
    }
}

#[test]
fn the_help_documents_every_key_and_its_default() {
    for arguments in [&["--help"][..], &["-h"], &["serve", "--help"], &["config", "--help"]] {
        let Err(ConfigError::Usage(help)) = read(arguments, &[]) else { panic!("no help for {arguments:?}") };
        let help: String = help.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        for key in KEYS {
            assert!(help.contains(&format!("--{}", key.name.replace('_', "-"))), "{arguments:?}: {}", key.name);
            assert!(help.contains(key.help), "{arguments:?}: {}", key.name);
        }
    }
}

#[test]
fn the_effective_configuration_can_be_given_back() {
    let invocation =
        read(&["--shutdown-timeout", "90s", "--log-format", "json"], &[("OUTRIGGER_MODEL", "a \"b\"")]).unwrap();
    let text = invocation.effective();
    let file = file(&text);
    let again = read(&["config", "--config", file.path().to_str().unwrap()], &[]).unwrap();
    assert_eq!(again.command, Command::ShowConfig);
    for key in KEYS {
        assert_eq!(key.text(&invocation.config), key.text(&again.config), "{}", key.name);
    }
    assert!(text.contains("from $OUTRIGGER_MODEL") && text.contains("from --log-format"), "{text}");
}
