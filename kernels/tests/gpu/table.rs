//! The table of kernels, and the limits with which they are compared.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// What this very device reaches, in the same run.
#[derive(Clone, Debug, Default)]
pub struct Ceilings {
    /// Bytes a second, read and written, of a copy within its memory.
    pub copy: f64,
    /// Floating-point operations a second of a large bf16 product by the vendor's library, where that was measured.
    pub bf16: Option<f64>,
    /// Seconds that the vendor's library takes, by kernel and shape. Its results depend on the number of rows.
    library: Library,
}

type Library = BTreeMap<String, BTreeMap<String, f64>>;

impl Ceilings {
    /// `copy` is our own measurement; the product's rate comes from what `ceilings.py` wrote.
    pub fn new(copy: f64, file: Option<&Path>) -> Result<Self, String> {
        let Some(file) = file else { return Ok(Self { copy, ..Self::default() }) };
        let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let in_file = |error: serde_json::Error| format!("{}: {error}", file.display());
        let mut values: serde_json::Value = serde_json::from_str(&text).map_err(in_file)?;
        let library = serde_json::from_value(values["library_seconds"].take()).map_err(in_file)?;
        Ok(Self { copy, bf16: values["bf16_flops"].as_f64(), library })
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
    fn limit(&self, ceilings: &Ceilings) -> (f64, &'static str) {
        let memory = self.bytes / ceilings.copy;
        match ceilings.bf16.map(|rate| self.flops / rate) {
            Some(arithmetic) if arithmetic > memory => (arithmetic, "bf16 product"),
            _ => (memory, "copy"),
        }
    }

    fn library_seconds(&self, ceilings: &Ceilings) -> Option<f64> {
        ceilings.library.get(&self.kernel)?.get(&self.shape).copied()
    }
}

pub fn markdown(rows: &[Row], ceilings: &Ceilings) -> String {
    let mut text = format!("Ceilings of this run: copy {:.2} TB/s (read + written)", ceilings.copy * 1e-12);
    if let Some(rate) = ceilings.bf16 {
        write!(text, ", bf16 product {:.0} TFLOP/s", rate * 1e-12).expect("a string grows");
    }
    text.push_str(
        ".\n\n| kernel | shape | µs | TB/s | TFLOP/s | limit | share of it | library µs |\n|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let (least, what) = row.limit(ceilings);
        let per_second =
            |amount: f64| if amount > 0.0 { format!("{:.2}", amount / row.seconds * 1e-12) } else { "–".to_owned() };
        let (kernel, shape, bytes, flops) = (&row.kernel, &row.shape, per_second(row.bytes), per_second(row.flops));
        let (micros, share) = (row.seconds * 1e6, least / row.seconds * 100.0);
        let library = row.library_seconds(ceilings).map_or("–".to_owned(), |seconds| format!("{:.1}", seconds * 1e6));
        writeln!(text, "| {kernel} | {shape} | {micros:.1} | {bytes} | {flops} | {what} | {share:.0} % | {library} |")
            .expect("a string grows");
    }
    text
}

/// All dense products of a forward pass, ours and the library's, by the number of rows: what it costs that a row's result does
/// not depend on how many others there are. `per_pass` says how often each product is done.
pub fn cost_of_invariance(rows: &[Row], ceilings: &Ceilings, per_pass: &[(&str, f64)]) -> String {
    let mut sums: BTreeMap<usize, (usize, f64, f64)> = BTreeMap::new();
    for row in rows {
        let times = per_pass.iter().find(|(kernel, _)| *kernel == row.kernel).map(|(_, times)| times);
        let count = row.shape.split(' ').next().and_then(|count| count.parse().ok());
        if let (Some(times), Some(count), Some(library)) = (times, count, row.library_seconds(ceilings)) {
            let (products, ours, theirs) = sums.entry(count).or_default();
            (*products, *ours, *theirs) = (*products + 1, *ours + times * row.seconds, *theirs + times * library);
        }
    }
    let whole = sums.into_iter().filter(|(_, (products, ..))| *products == per_pass.len());
    let lines: String = whole
        .map(|(count, (_, ours, theirs))| {
            let more = (ours / theirs - 1.0) * 100.0;
            format!("| {count} | {:.2} | {:.2} | {more:+.0} % |\n", ours * 1e3, theirs * 1e3)
        })
        .collect();
    if lines.is_empty() {
        return lines;
    }
    format!(
        "\n| rows of a forward pass, Llama-3.1-8B | our dense products, ms | the library's, ms | cost of the invariant |\n\
         |---|---|---|---|\n{lines}"
    )
}
