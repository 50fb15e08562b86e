//! C's `strftime` in the C locale, for chat templates.

use std::fmt::Write as _;

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
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

/// A point in time in UTC, split into the fields of `strftime`.
struct Moment {
    year: u64,
    /// 0 to 11.
    month: usize,
    /// 1 to 31.
    day: u64,
    /// 0 for Sunday.
    weekday: usize,
    /// Seconds since midnight.
    seconds: u64,
}

impl Moment {
    /// Splits seconds since 1970-01-01. The computation uses years that start on 1 March: then the leap day is
    /// the last day of a year, and the lengths of months repeat every 5 months (153 days). 400 years have
    /// 146097 days.
    fn from_unix(unix: u64) -> Self {
        let days = unix / 86_400;
        let from_era = days + 719_468;
        let (era, day_of_era) = (from_era / 146_097, from_era % 146_097);
        let leap_days = day_of_era / 1_460 + day_of_era / 146_096 - day_of_era / 36_524;
        let year_of_era = (day_of_era - leap_days) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = (march_month + 2) % 12;
        Self {
            year: era * 400 + year_of_era + u64::from(month < 2),
            month: index(month),
            day: day_of_year - (153 * march_month + 2) / 5 + 1,
            // 1970-01-01 was a Thursday.
            weekday: index((days + 4) % 7),
            seconds: unix % 86_400,
        }
    }

    fn hour(&self) -> u64 {
        self.seconds / 3_600
    }

    /// The hour of a 12-hour clock.
    fn hour12(&self) -> u64 {
        (self.hour() + 11) % 12 + 1
    }

    /// 1 to 366.
    fn day_of_year(&self) -> u64 {
        const BEFORE: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        let leap = self.year.is_multiple_of(4)
            && (!self.year.is_multiple_of(100) || self.year.is_multiple_of(400));
        BEFORE[self.month] + self.day + u64::from(leap && self.month > 1)
    }
}

/// A small number as an index.
fn index(small: u64) -> usize {
    usize::try_from(small).unwrap_or_default()
}

/// Formats `unix`, in seconds since 1970-01-01 UTC. Supported are `%a %A %b %B %d %e %F %H %I %j %m %M %p %S
/// %T %y %Y %%`, and numbers without padding, such as `%-d`.
///
/// # Errors
/// The directive that is not supported.
pub(super) fn strftime_utc(unix: u64, format: &str) -> Result<String, String> {
    let moment = Moment::from_unix(unix);
    let mut text = String::with_capacity(format.len() * 2);
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        let (dash, directive) = match letters.next() {
            Some('-') => ("-", letters.next()),
            other => ("", other),
        };
        let known =
            directive.is_some_and(|d| write_directive(&mut text, &moment, d, dash.is_empty()));
        if !known {
            return Err(format!("%{dash}{}", directive.map(String::from).unwrap_or_default()));
        }
    }
    Ok(text)
}

/// Writes one directive. Returns false if it is not supported.
fn write_directive(text: &mut String, moment: &Moment, directive: char, padded: bool) -> bool {
    let (number, width) = match directive {
        'Y' => (moment.year, 4),
        'y' => (moment.year % 100, 2),
        'm' => (moment.month as u64 + 1, 2),
        'd' | 'e' => (moment.day, 2),
        'H' => (moment.hour(), 2),
        'I' => (moment.hour12(), 2),
        'M' => (moment.seconds / 60 % 60, 2),
        'S' => (moment.seconds % 60, 2),
        'j' => (moment.day_of_year(), 3),
        _ => return padded && write_words(text, moment, directive),
    };
    let written = match (padded, directive) {
        (false, _) => write!(text, "{number}"),
        (true, 'e') => write!(text, "{number:2}"),
        (true, _) => write!(text, "{number:0width$}"),
    };
    written.is_ok()
}

/// Writes a directive that is not a single number. Returns false if it is not supported.
fn write_words(text: &mut String, moment: &Moment, directive: char) -> bool {
    let (day, month) = (DAYS[moment.weekday], MONTHS[moment.month]);
    match directive {
        'a' => text.push_str(&day[..3]),
        'A' => text.push_str(day),
        'b' => text.push_str(&month[..3]),
        'B' => text.push_str(month),
        'p' => text.push_str(if moment.hour() < 12 { "AM" } else { "PM" }),
        '%' => text.push('%'),
        'F' => return parts(text, moment, ["Y", "-", "m", "-", "d"]),
        'T' => return parts(text, moment, ["H", ":", "M", ":", "S"]),
        _ => return false,
    }
    true
}

fn parts(text: &mut String, moment: &Moment, parts: [&str; 5]) -> bool {
    parts.iter().flat_map(|part| part.chars()).all(|part| {
        if part.is_ascii_alphabetic() {
            return write_directive(text, moment, part, true);
        }
        text.push(part);
        true
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_moments_come_out_as_date_prints_them() {
        let cases = [
            (0, "%F %T %a %j", "1970-01-01 00:00:00 Thu 001"),
            (951_782_399, "%d %b %Y %I:%M %p", "28 Feb 2000 11:59 PM"),
            (951_868_799, "%A, %B %-d, %y", "Tuesday, February 29, 00"),
            (1_709_251_200, "%e/%-m %j %%", " 1/3 061 %"),
            (4_107_542_400, "%F %-H", "2100-03-01 0"),
        ];
        for (unix, format, expected) in cases {
            assert_eq!(strftime_utc(unix, format).unwrap(), expected);
        }
    }

    #[test]
    fn unknown_directives_are_returned() {
        for (format, directive) in [("%Q", "%Q"), ("a%", "%"), ("%-A", "%-A"), ("%-", "%-")] {
            assert_eq!(strftime_utc(0, format).unwrap_err(), directive);
        }
    }

    proptest! {
        #[test]
        fn the_day_after_a_day_is_the_next_one(day in 0u64..200_000) {
            let number = |day: u64| {
                let moment = Moment::from_unix(day * 86_400);
                (moment.year, moment.day_of_year(), moment.weekday)
            };
            let ((year, of_year, weekday), next) = (number(day), number(day + 1));
            prop_assert_eq!(next.2, (weekday + 1) % 7);
            if next.0 == year {
                prop_assert_eq!(next.1, of_year + 1);
            } else {
                prop_assert!(next == (year + 1, 1, next.2) && (365..=366).contains(&of_year));
            }
        }
    }
}
