//! Rehearses the GPU suite's measurement of a whole server (benches/gpu/end_to_end.py) on the CPU, with tiny shapes.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::fixtures;

#[test]
fn the_suite_gets_through_its_measurements() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let shape = folder.path().join("shapes/tiny");
    fs::create_dir_all(&shape).unwrap();
    fs::copy(root.join("benches/gpu/tiny/config.json"), shape.join("config.json")).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixtures::path("llama-gqa-tied-bf16").join(file), shape.join(file)).unwrap();
    }
    let output = Command::new("python3")
        .arg(root.join("benches/gpu/end_to_end.py"))
        .args(["--tiny", "--device", "cpu", "--server", env!("CARGO_BIN_EXE_outrigger"), "--shapes"])
        .arg(folder.path().join("shapes"))
        .arg("--out")
        .arg(folder.path().join("table.md"))
        .stdin(Stdio::null())
        .output()
        .expect("python3 runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let table = fs::read_to_string(folder.path().join("table.md")).unwrap();
    assert!(table.contains("| streams that differ alone and among 3 others | 0 of 3 |"), "{table}");
    for figure in ["tok/s (", "output tok/s", "prefill 2 × 30", "prefix hit", "KV slots unused"] {
        assert!(table.contains(figure), "no `{figure}` in\n{table}");
    }
}
