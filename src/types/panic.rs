//! What a panic said.

use std::any::Any;

/// The text of a caught panic, where it is one.
pub fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::panic::{catch_unwind, panic_any};

    use super::*;

    #[test]
    fn texts_are_found_and_other_payloads_are_survived() {
        let number = 7;
        let panics = [
            (catch_unwind(|| panic!("plain")), "plain"),
            (catch_unwind(|| panic!("number {number}")), "number 7"),
            (catch_unwind(|| panic_any(7)), "no message"),
        ];
        for (caught, said) in panics {
            let panic: Box<dyn Any + Send> = caught.expect_err("it panics");
            assert_eq!(panic_message(panic.as_ref()), said);
        }
    }
}
