//! Dates for chat templates; some models expect one in their system prompt: `strftime_now("%d %b %Y")`. In UTC, so that every
//! replica renders the same text.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const SECONDS_A_DAY: u64 = 86_400;

/// A date and time in the Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moment {
    year: u64,
    /// From 0.
    month: usize,
    /// From 1.
    day: u64,
    /// From 1.
    day_of_year: u64,
    /// Sunday is 0.
    weekday: usize,
    hour: u64,
    minute: u64,
    second: u64,
}

/// Formats as C's `strftime` in the C locale. `None` if a directive is not supported.
pub(super) fn strftime(format: &str, time: SystemTime) -> Option<String> {
    let moment = Moment::at(time);
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let directive = characters.next()?;
        // GNU's flag for numbers without padding.
        let padded = directive != '-';
        let directive = if padded { directive } else { characters.next()? };
        moment.write(directive, padded, &mut text)?;
    }
    Some(text)
}

impl Moment {
    /// Times before 1970 count as 1970.
    fn at(time: SystemTime) -> Self {
        let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let days = seconds / SECONDS_A_DAY;
        let (mut year, mut day_of_year) = (1970, days);
        while day_of_year >= days_in_year(year) {
            day_of_year -= days_in_year(year);
            year += 1;
        }
        let (mut month, mut day) = (0, day_of_year);
        while day >= days_in_month(year, month) {
            day -= days_in_month(year, month);
            month += 1;
        }
        let second = seconds % SECONDS_A_DAY;
        Self {
            year,
            month,
            day: day + 1,
            day_of_year: day_of_year + 1,
            // 1 January 1970 was a Thursday.
            weekday: ((days + 4) % 7) as usize,
            hour: second / 3600,
            minute: second / 60 % 60,
            second: second % 60,
        }
    }

    fn write(&self, directive: char, padded: bool, text: &mut String) -> Option<()> {
        let (month, weekday) = (MONTHS[self.month], WEEKDAYS[self.weekday]);
        let hour_of_12 = (self.hour + 11) % 12 + 1;
        let (number, width) = match directive {
            'Y' => (self.year, 4),
            'y' => (self.year % 100, 2),
            'm' => (self.month as u64 + 1, 2),
            'd' => (self.day, 2),
            'j' => (self.day_of_year, 3),
            'H' => (self.hour, 2),
            'I' => (hour_of_12, 2),
            'M' => (self.minute, 2),
            'S' => (self.second, 2),
            'w' => (self.weekday as u64, 1),
            _ => {
                match directive {
                    'B' => text.push_str(month),
                    'b' | 'h' => text.push_str(&month[..3]),
                    'A' => text.push_str(weekday),
                    'a' => text.push_str(&weekday[..3]),
                    'p' => text.push_str(if self.hour < 12 { "AM" } else { "PM" }),
                    'Z' => text.push_str("UTC"),
                    'z' => text.push_str("+0000"),
                    'F' => self.write_all("Y-m-d", text)?,
                    'T' => self.write_all("H:M:S", text)?,
                    'R' => self.write_all("H:M", text)?,
                    'D' | 'x' => self.write_all("m/d/y", text)?,
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    '%' => text.push('%'),
                    _ => return None,
                }
                return Some(());
            }
        };
        let width = if padded { width } else { 0 };
        write!(text, "{number:0width$}").ok()
    }

    /// Writes the format, in which letters after `%` are directives.
    fn write_all(&self, format: &str, text: &mut String) -> Option<()> {
        for character in format.chars() {
            match character.is_ascii_alphabetic() {
                true => self.write(character, true, text)?,
                false => text.push(character),
            }
        }
        Some(())
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in_year(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_in_month(year: u64, month: usize) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn format(seconds: u64, format: &str) -> Option<String> {
        strftime(format, UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn formats_as_python_does() {
        // Expected values: datetime.fromtimestamp(…, timezone.utc).strftime(…).
        let all = "%Y %y %m %d %j %H %I %M %S %w %B %b %A %a %p %F %T %R %D %% %-d %-m";
        let expected =
            "2024 24 02 29 060 00 12 07 05 4 February Feb Thursday Thu AM 2024-02-29 00:07:05 00:07 02/29/24 % 29 2";
        assert_eq!(format(1_709_165_225, all).unwrap(), expected);
        assert_eq!(format(0, "%d %b %Y, %A, %I %p").unwrap(), "01 Jan 1970, Thursday, 12 AM");
        assert_eq!(format(4_107_542_399, "%F %T %j").unwrap(), "2100-02-28 23:59:59 059");
        assert_eq!(format(1_735_646_400, "%-d.%-m.%y").unwrap(), "31.12.24");
    }

    #[test]
    fn unknown_directives_are_refused() {
        assert_eq!(format(0, "%Q"), None);
        assert_eq!(format(0, "100%"), None);
    }
}
