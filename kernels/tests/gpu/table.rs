//! The table of kernels, and the ceilings that it is judged by.

use std::fmt::Write as _;
use std::path::Path;

/// What this very device reaches, in the same run.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes a second, read and written, of a copy within its memory.
    pub copy: f64,
    /// Floating-point operations a second of a large bf16 product by the vendor's library, where that was measured.
    pub bf16: Option<f64>,
}

impl Ceilings {
    /// `copy` is our own measurement; the product's rate comes from what `ceilings.py` wrote.
    pub fn new(copy: f64, file: Option<&Path>) -> Result<Self, String> {
        let Some(file) = file else { return Ok(Self { copy, bf16: None }) };
        let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let values: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| format!("{}: {error}", file.display()))?;
        Ok(Self { copy, bf16: values["bf16_flops"].as_f64() })
    }
}

/// One kernel at one shape.
#[derive(Clone, Debug)]
pub struct Row {
    pub kernel: String,
    pub shape: String,
    pub seconds: f64,
    /// The fewest that must move: each input once, each output once.
    pub bytes: f64,
    pub flops: f64,
}

impl Row {
    /// The time that the ceilings allow, and which of them sets it.
    fn limit(&self, ceilings: Ceilings) -> (f64, &'static str) {
        let memory = self.bytes / ceilings.copy;
        match ceilings.bf16.map(|rate| self.flops / rate) {
            Some(arithmetic) if arithmetic > memory => (arithmetic, "bf16 product"),
            _ => (memory, "copy"),
        }
    }
}

pub fn markdown(rows: &[Row], ceilings: Ceilings) -> String {
    let mut text = format!("Ceilings of this run: copy {:.2} TB/s (read + written)", ceilings.copy * 1e-12);
    if let Some(rate) = ceilings.bf16 {
        write!(text, ", bf16 product {:.0} TFLOP/s", rate * 1e-12).expect("a string grows");
    }
    text.push_str(
        ".\n\n| kernel | shape | µs | TB/s | TFLOP/s | limit | share of it |\n|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let (least, what) = row.limit(ceilings);
        let per_second =
            |amount: f64| if amount > 0.0 { format!("{:.2}", amount / row.seconds * 1e-12) } else { "–".to_owned() };
        let (kernel, shape, bytes, flops) = (&row.kernel, &row.shape, per_second(row.bytes), per_second(row.flops));
        let (micros, share) = (row.seconds * 1e6, least / row.seconds * 100.0);
        writeln!(text, "| {kernel} | {shape} | {micros:.1} | {bytes} | {flops} | {what} | {share:.0} % |")
            .expect("a string grows");
    }
    text
}
