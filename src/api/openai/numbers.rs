//! Whole numbers in JSON. Clients that compute a value may write `8.0` for `8`; pydantic, and so vLLM, accepts that, and so
//! does this module. Numbers in strings are refused, as by OpenAI.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

/// An integer type and its range in words.
pub trait Whole: TryFrom<i128> {
    const RANGE: &'static str;
}

impl Whole for u32 {
    const RANGE: &'static str = "a whole number from 0 to 4294967295";
}

impl Whole for i32 {
    const RANGE: &'static str = "a whole number";
}

impl Whole for i64 {
    const RANGE: &'static str = "a whole number";
}

/// Deserializes a field that holds a whole number, with or without a fraction of zero.
pub fn whole<'de, T: Whole, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    Ok(Option::<AnyWhole<T>>::deserialize(deserializer)?.map(|AnyWhole(number)| number))
}

/// The whole number that a float represents, if any.
pub fn of_float(number: f64) -> Option<i128> {
    // Floats in this range convert without loss.
    (number.fract() == 0.0 && number.abs() < 1e30).then_some(number as i128)
}

struct AnyWhole<T>(T);

impl<'de, T: Whole> Deserialize<'de> for AnyWhole<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WholeVisitor(PhantomData))
    }
}

struct WholeVisitor<T>(PhantomData<T>);

impl<T: Whole> Visitor<'_> for WholeVisitor<T> {
    type Value = AnyWhole<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::RANGE)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
        let whole = T::try_from(number.into()).ok();
        whole.map(AnyWhole).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Self::Value, E> {
        let whole = T::try_from(number.into()).ok();
        whole.map(AnyWhole).ok_or_else(|| E::invalid_value(Unexpected::Signed(number), &self))
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Self::Value, E> {
        let whole = of_float(number).and_then(|number| T::try_from(number).ok());
        whole.map(AnyWhole).ok_or_else(|| E::invalid_value(Unexpected::Float(number), &self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Fields {
        #[serde(deserialize_with = "whole")]
        count: Option<u32>,
        #[serde(deserialize_with = "whole")]
        signed: Option<i64>,
    }

    fn count(json: &str) -> Result<Option<u32>, String> {
        serde_json::from_str::<Fields>(json).map(|fields| fields.count).map_err(|error| error.to_string())
    }

    #[test]
    fn a_fraction_of_zero_is_none() {
        for (json, expected) in [("{}", None), (r#"{"count": null}"#, None), (r#"{"count": 8}"#, Some(8))] {
            assert_eq!(count(json), Ok(expected), "{json}");
        }
        assert_eq!(count(r#"{"count": 8.0}"#), Ok(Some(8)));
        assert_eq!(count(r#"{"count": 4.294967295e9}"#), Ok(Some(u32::MAX)));
        let signed = |json| serde_json::from_str::<Fields>(json).expect(json).signed;
        assert_eq!([signed(r#"{"signed": -1.0}"#), signed(r#"{"signed": -1}"#)], [Some(-1); 2]);
    }

    #[test]
    fn anything_else_is_refused_with_the_range() {
        for value in ["8.5", "-1", "-1.0", "4294967296", "1e300", "\"8\"", "true", "[8]"] {
            let error = count(&format!(r#"{{"count": {value}}}"#)).expect_err(value);
            assert!(error.contains("expected a whole number from 0 to 4294967295"), "{value}: {error}");
        }
    }
}
