//! How values are written: counts, sizes, durations, choices. One syntax for the file, the environment and the flags.
//!
//! Knows no key and no section.

use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// How a syntax presents itself to the help and to the reader of arguments.
pub trait Notation {
    /// What stands for the value in the help, with its unit.
    const HINT: &'static str;

    /// The flag may stand without a value, and may be negated.
    const IS_SWITCH: bool = false;

    /// The flag may be given several times.
    const IS_LIST: bool = false;
}

/// Reads and writes values of type `T`. `read(write(value)) == value`, except for secrets, which are never written.
pub trait Syntax<T>: Notation {
    /// The error completes the sentence "`key` …".
    fn read(text: &str) -> Result<T, String>;

    fn write(value: &T) -> toml::Value;
}

/// A whole number; `8k` is 8000 and `8K` is 8192, as vLLM reads them.
pub struct Count;

impl Notation for Count {
    const HINT: &'static str = "N";
}

macro_rules! count {
    ($($integer:ty),*) => {$(
        impl Syntax<$integer> for Count {
            fn read(text: &str) -> Result<$integer, String> {
                let count = read_count(text)?;
                <$integer>::try_from(count).map_err(|_| format!("must be at most {}, got {text}", <$integer>::MAX))
            }

            fn write(value: &$integer) -> toml::Value {
                i64::try_from(*value).map_or_else(|_| toml::Value::String(value.to_string()), toml::Value::Integer)
            }
        }
    )*};
}

count!(u16, u32, u64, usize);

fn read_count(text: &str) -> Result<u64, String> {
    let (digits, unit) = split_unit(text);
    let factor: u64 = match unit {
        "" => 1,
        "k" => 1_000,
        "K" => 1 << 10,
        "m" => 1_000_000,
        "M" => 1 << 20,
        _ => return Err(format!("must be a whole number such as 64, 8k (8000) or 8K (8192), got `{text}`")),
    };
    scale(digits, factor).ok_or_else(|| format!("must be a whole number, got `{text}`"))
}

/// Bytes: `4GiB` (2³⁰), `4GB` (10⁹), Kubernetes' `4Gi`, or a plain number of bytes.
pub struct Size;

impl Notation for Size {
    const HINT: &'static str = "SIZE";
}

macro_rules! size {
    ($($integer:ty),*) => {$(
        impl Syntax<$integer> for Size {
            fn read(text: &str) -> Result<$integer, String> {
                <$integer>::try_from(read_size(text)?).map_err(|_| format!("is too large: {text}"))
            }

            fn write(value: &$integer) -> toml::Value {
                toml::Value::String(write_size(*value as u64))
            }
        }
    )*};
}

size!(u64, usize);

fn read_size(text: &str) -> Result<u64, String> {
    let error = || format!("must be a size in bytes such as 512MiB, 4GiB or 4GB, got `{text}`");
    let (digits, unit) = split_unit(text);
    let factor: u64 = match unit.strip_suffix(['B', 'b']).unwrap_or(unit) {
        "" => 1,
        "k" | "K" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" | "ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return Err(error()),
    };
    scale(digits, factor).ok_or_else(error)
}

fn write_size(bytes: u64) -> String {
    for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    format!("{bytes}B")
}

/// Time: `250ms`, `30s`, `5m`, `1h`, or a plain number of seconds.
pub struct Time;

impl Notation for Time {
    const HINT: &'static str = "DURATION";
}

impl Syntax<Duration> for Time {
    fn read(text: &str) -> Result<Duration, String> {
        let error = || format!("must be a duration such as 250ms, 30s, 5m or 1h, got `{text}`");
        let (digits, unit) = split_unit(text);
        let microseconds = match unit {
            "us" => 1,
            "ms" => 1_000,
            "" | "s" => 1_000_000,
            "m" | "min" => 60_000_000,
            "h" => 3_600_000_000,
            _ => return Err(error()),
        };
        scale(digits, microseconds).map(Duration::from_micros).ok_or_else(error)
    }

    fn write(value: &Duration) -> toml::Value {
        let microseconds = value.as_micros();
        let units = [("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000), ("us", 1)];
        let fits = |&&(_, unit): &&(&str, u128)| microseconds != 0 && microseconds.is_multiple_of(unit);
        let text = units.iter().find(fits).map(|(name, unit)| format!("{}{name}", microseconds / unit));
        toml::Value::String(text.unwrap_or_else(|| "0s".into()))
    }
}

/// The leading number (with its fraction) and what follows it.
fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_')).unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

/// `digits × factor` when that is a whole number that fits.
fn scale(digits: &str, factor: u64) -> Option<u64> {
    let digits = digits.replace('_', "");
    let (whole, fraction) = digits.split_once('.').unwrap_or((&digits, ""));
    let whole: u64 = whole.parse().ok()?;
    if fraction.is_empty() {
        return whole.checked_mul(factor);
    }
    let parts: u64 = fraction.parse().ok()?;
    let scaled = u128::from(parts) * u128::from(factor);
    let divisor = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let rest = scaled.is_multiple_of(divisor).then_some(scaled / divisor)?;
    whole.checked_mul(factor)?.checked_add(u64::try_from(rest).ok()?)
}

/// A number with a fraction.
pub struct Number;

impl Notation for Number {
    const HINT: &'static str = "NUMBER";
}

impl Syntax<f64> for Number {
    fn read(text: &str) -> Result<f64, String> {
        let number: Option<f64> = text.trim().parse().ok().filter(|number: &f64| number.is_finite());
        number.ok_or_else(|| format!("must be a number, got `{text}`"))
    }

    fn write(value: &f64) -> toml::Value {
        toml::Value::Float(*value)
    }
}

/// On or off.
pub struct Switch;

impl Notation for Switch {
    const HINT: &'static str = "true|false";
    const IS_SWITCH: bool = true;
}

impl Syntax<bool> for Switch {
    fn read(text: &str) -> Result<bool, String> {
        match text.trim().to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Ok(true),
            "false" | "0" | "no" | "off" => Ok(false),
            _ => Err(format!("must be true or false, got `{text}`")),
        }
    }

    fn write(value: &bool) -> toml::Value {
        toml::Value::Boolean(*value)
    }
}

pub struct Text;

impl Notation for Text {
    const HINT: &'static str = "TEXT";
}

impl Syntax<String> for Text {
    fn read(text: &str) -> Result<String, String> {
        match text.trim() {
            "" => Err("must not be empty".into()),
            text => Ok(text.to_owned()),
        }
    }

    fn write(value: &String) -> toml::Value {
        toml::Value::String(value.clone())
    }
}

/// A text that may be empty.
pub struct Plain;

impl Notation for Plain {
    const HINT: &'static str = "TEXT";
}

impl Syntax<String> for Plain {
    fn read(text: &str) -> Result<String, String> {
        Ok(text.trim().to_owned())
    }

    fn write(value: &String) -> toml::Value {
        toml::Value::String(value.clone())
    }
}

/// An IP address and a port.
pub struct Address;

impl Notation for Address {
    const HINT: &'static str = "IP:PORT";
}

impl Syntax<SocketAddr> for Address {
    fn read(text: &str) -> Result<SocketAddr, String> {
        text.trim().parse().map_err(|_| format!("must be an IP address and a port such as 10.0.0.7:7946, got `{text}`"))
    }

    fn write(value: &SocketAddr) -> toml::Value {
        toml::Value::String(value.to_string())
    }
}

pub struct Location;

impl Notation for Location {
    const HINT: &'static str = "PATH";
}

impl Syntax<PathBuf> for Location {
    fn read(text: &str) -> Result<PathBuf, String> {
        <Text as Syntax<String>>::read(text).map(PathBuf::from)
    }

    fn write(value: &PathBuf) -> toml::Value {
        toml::Value::String(value.to_string_lossy().into_owned())
    }
}

/// Several texts: a TOML array, a repeated flag, one text with commas, or a JSON array, as vLLM has it.
pub struct List;

impl Notation for List {
    const HINT: &'static str = "TEXT,…";
    const IS_LIST: bool = true;
}

impl Syntax<Vec<String>> for List {
    fn read(text: &str) -> Result<Vec<String>, String> {
        // `[::1]:7946` begins like one, too.
        if let Ok(items) = serde_json::from_str(text) {
            return Ok(items);
        }
        Ok(text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect())
    }

    fn write(value: &Vec<String>) -> toml::Value {
        toml::Value::Array(value.iter().cloned().map(toml::Value::String).collect())
    }
}

/// What stands for any secret in the open.
pub const REDACTED: &str = "<redacted>";

/// Texts that are written as `<redacted>`, which is never read back.
pub struct Secrets;

impl Notation for Secrets {
    const HINT: &'static str = "SECRET,…";
    const IS_LIST: bool = true;
}

impl Syntax<Vec<String>> for Secrets {
    fn read(text: &str) -> Result<Vec<String>, String> {
        List::read(text)?.into_iter().map(refuse_redacted).collect()
    }

    fn write(value: &Vec<String>) -> toml::Value {
        toml::Value::Array(value.iter().map(|_| toml::Value::String(REDACTED.into())).collect())
    }
}

/// One text that is written as `<redacted>`.
pub struct Token;

impl Notation for Token {
    const HINT: &'static str = "SECRET";
}

impl Syntax<String> for Token {
    fn read(text: &str) -> Result<String, String> {
        refuse_redacted(<Text as Syntax<String>>::read(text)?)
    }

    fn write(_: &String) -> toml::Value {
        toml::Value::String(REDACTED.into())
    }
}

fn refuse_redacted(text: String) -> Result<String, String> {
    match text == REDACTED {
        true => Err(format!("is `{REDACTED}`: put the secret in its place")),
        false => Ok(text),
    }
}

/// `auto` (or `none`) leaves the decision to the node.
pub struct Auto<S>(PhantomData<S>);

impl<S: Notation> Notation for Auto<S> {
    const HINT: &'static str = S::HINT;
}

impl<T, S: Syntax<T>> Syntax<Option<T>> for Auto<S> {
    fn read(text: &str) -> Result<Option<T>, String> {
        match text.trim() {
            "auto" | "none" => Ok(None),
            _ => S::read(text).map(Some).map_err(|error| format!("{error} (or `auto`)")),
        }
    }

    fn write(value: &Option<T>) -> toml::Value {
        value.as_ref().map_or_else(|| toml::Value::String("auto".into()), S::write)
    }
}

/// One of a few words; the first of each row is the word that is written, the others are understood.
pub struct OneOf<T>(PhantomData<T>);

macro_rules! one_of {
    ($value:ty, $hint:literal { $($variant:ident: $word:literal $(| $alias:literal)*),+ $(,)? }) => {
        impl $crate::config::syntax::Notation for $crate::config::syntax::OneOf<$value> {
            const HINT: &'static str = $hint;
        }

        impl $crate::config::syntax::Syntax<$value> for $crate::config::syntax::OneOf<$value> {
            fn read(text: &str) -> Result<$value, String> {
                match text.trim().to_ascii_lowercase().as_str() {
                    $($word $(| $alias)* => Ok(<$value>::$variant),)+
                    _ => Err(format!("must be one of {}, got `{text}`", [$($word),+].join(", "))),
                }
            }

            fn write(value: &$value) -> toml::Value {
                match value {
                    $(<$value>::$variant => toml::Value::String($word.into()),)+
                }
            }
        }
    };
}

pub(super) use one_of;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn counts_are_read_as_vllm_reads_them() {
        for (text, expected) in [("64", 64), ("8k", 8_000), ("8K", 8_192), ("1.5k", 1_500), ("1_000", 1_000)] {
            assert_eq!(<Count as Syntax<u64>>::read(text), Ok(expected), "{text}");
        }
        for text in ["", "-1", "1.5", "many", "0x10", "1e3", "99999999999999999999"] {
            assert!(<Count as Syntax<u64>>::read(text).is_err(), "{text}");
        }
        assert_eq!(<Count as Syntax<u16>>::read("65536"), Err("must be at most 65535, got 65536".into()));
    }

    #[test]
    fn sizes_are_binary_or_decimal_as_written() {
        for (text, expected) in [
            ("4GiB", 4 << 30),
            ("4Gi", 4 << 30),
            ("4GB", 4_000_000_000),
            ("1.5MiB", 3 << 19),
            ("0", 0),
            ("12 KiB", 12288),
        ] {
            assert_eq!(<Size as Syntax<u64>>::read(text), Ok(expected), "{text}");
        }
        for text in ["4Gb/s", "GiB", "-1", "1.3B", "99999999TiB"] {
            assert!(<Size as Syntax<u64>>::read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_have_units_and_default_to_seconds() {
        for (text, milliseconds) in
            [("250ms", 250), ("30s", 30_000), ("5m", 300_000), ("1h", 3_600_000), ("1.5", 1_500)]
        {
            assert_eq!(Time::read(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "soon", "5 parsecs", "-3s"] {
            assert!(Time::read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn auto_leaves_the_decision_open() {
        assert_eq!(<Auto<Count> as Syntax<Option<u32>>>::read("auto"), Ok(None));
        assert_eq!(<Auto<Count> as Syntax<Option<u32>>>::read("7"), Ok(Some(7)));
        assert!(<Auto<Count> as Syntax<Option<u32>>>::read("seven").unwrap_err().contains("auto"));
    }

    fn text_of(value: toml::Value) -> String {
        value.as_str().map_or_else(|| value.to_string(), str::to_owned)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(count: u64, microseconds in 0u64..1 << 50, number in -1e9f64..1e9) {
            prop_assert_eq!(<Count as Syntax<u64>>::read(&text_of(Count::write(&count))), Ok(count));
            prop_assert_eq!(<Size as Syntax<u64>>::read(&text_of(Size::write(&count))), Ok(count));
            let time = Duration::from_micros(microseconds);
            prop_assert_eq!(Time::read(&text_of(Time::write(&time))), Ok(time));
            prop_assert_eq!(Number::read(&text_of(Number::write(&number))), Ok(number));
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = <Count as Syntax<u64>>::read(&text);
            let _ = <Size as Syntax<u64>>::read(&text);
            let _ = Time::read(&text);
        }
    }
}
