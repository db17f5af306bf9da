//! Text from others, made fit for logs, tables and terminals; and durations as people write them.

use std::time::Duration;

/// Longest duration, in characters, and the digits of a number in it. In seconds, 9 digits are 31 years.
const LONGEST_DURATION: usize = 100;
const LONGEST_NUMBER: usize = 9;

/// The text without colours, and with its control characters escaped: it cannot end a line or move a cursor.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        if let Some(length) = colour(rest) {
            rest = &rest[length..];
            continue;
        }
        match next {
            '\t' => shown.push('\t'),
            next if next.is_control() => shown.extend(next.escape_default()),
            next => shown.push(next),
        }
        rest = &rest[next.len_utf8()..];
    }
    shown
}

/// Parses a duration like `10s` or `1m 30s`.
pub fn duration(text: &str) -> Option<Duration> {
    // The library panics if the sum of many or large numbers overflows.
    let mut numbers = text.split(|c: char| !c.is_ascii_digit() && !c.is_whitespace());
    if text.len() > LONGEST_DURATION || numbers.any(|number| number.len() > LONGEST_NUMBER) {
        return None;
    }
    humantime::parse_duration(text).ok()
}

/// The length of the sequence at the start of `text` that changes the colour or style (ECMA-48, SGR), if there is one.
fn colour(text: &str) -> Option<usize> {
    let parameters = text.strip_prefix("\x1b[")?;
    let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    parameters[end..].starts_with('m').then_some(text.len() - parameters.len() + end + 1)
}

/// Percent-encodes a segment of a path, or a value of a query.
pub fn encoded(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~:".contains(&byte);
    text.bytes()
        .map(|byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_with_large_numbers_is_refused_and_does_not_panic() {
        assert_eq!(duration("1m 30s"), Some(Duration::from_secs(90)));
        assert_eq!(duration("999999999s"), Some(Duration::from_secs(999_999_999)));
        let many = "999999999y ".repeat(600);
        let large = "584542046090y 19767615s 1000ms";
        for text in ["18446744073709551615s 1000ms", "18446744073709551615y", large, &many, "", "s", "-1s"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn control_characters_are_escaped_and_colours_removed() {
        assert_eq!(printable("plain é\ttext"), "plain é\ttext");
        assert_eq!(printable("\x1b[1;32mgreen\x1b[0m"), "green");
        assert_eq!(printable("a\rb\0c\nd"), "a\\rb\\u{0}c\\nd");
        assert_eq!(printable("\x1b[2J\u{9b}1A"), "\\u{1b}[2J\\u{9b}1A");
        assert_eq!(printable("\x1b[31"), "\\u{1b}[31");
    }
}
