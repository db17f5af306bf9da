//! The answer of an agent: the words of HAProxy's agent checks. Pure.
//!
//! An agent says only what changes. What it has said before stays until it says otherwise.

use std::sync::Arc;

use crate::backend::{Admission, Advice};
use crate::text::printable;

/// Longest answer in bytes. What follows is not read.
pub(super) const LONGEST: usize = 256;

/// What separates words.
const SEPARATORS: [char; 3] = [' ', '\t', ','];

/// The first line of an answer, without its end.
pub(super) fn first_line(answer: &[u8]) -> String {
    let end = answer.iter().position(|byte| matches!(byte, b'\r' | b'\n' | 0)).unwrap_or(answer.len());
    printable(&String::from_utf8_lossy(&answer[..end]))
}

/// The advice that follows from an answer and the advice before it.
///
/// # Errors
/// The first word that is not known. The whole answer then counts for nothing.
pub(super) fn advice(line: &str, before: Option<&Advice>) -> Result<Advice, String> {
    let mut advice = before.cloned().unwrap_or_default();
    advice.text = Arc::from(line);
    // A description follows.
    let words = line.split('#').next().unwrap_or_default();
    for word in words.split(SEPARATORS).filter(|word| !word.is_empty()) {
        let lower = word.to_ascii_lowercase();
        match lower.as_str() {
            "up" => advice.is_down = false,
            "down" | "fail" | "failed" | "stopped" => advice.is_down = true,
            "ready" => advice.is_drained = false,
            "drain" | "maint" => advice.is_drained = true,
            _ => {
                if let Some(percent) = lower.strip_suffix('%').and_then(|number| number.parse::<u32>().ok()) {
                    advice.part = Admission::part(f64::from(percent) / 100.0);
                } else if let Some(most) = lower.strip_prefix("maxconn:").and_then(|number| number.parse::<u32>().ok())
                {
                    // 0 is no limit, as in HAProxy.
                    advice.max_connections = Some(most).filter(|most| *most > 0);
                } else {
                    return Err(format!(
                        "{word:?} is not one of up, down, fail, stopped, ready, drain, maint, N%, maxconn:N"
                    ));
                }
            }
        }
    }
    Ok(advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(lines: &[&str]) -> Advice {
        lines.iter().fold(Advice::default(), |before, line| advice(line, Some(&before)).unwrap())
    }

    fn in_words(advice: &Advice) -> (f64, Option<u32>, bool, bool) {
        (advice.part.as_part(), advice.max_connections, advice.is_drained, advice.is_down)
    }

    #[test]
    fn words_change_only_what_they_name() {
        for (lines, expected) in [
            (&["75%"][..], (0.75, None, false, false)),
            (&["50%, maxconn:30,maint,down#disk full"], (0.5, Some(30), true, true)),
            (&["50% maxconn:30 drain down", "ready"], (0.5, Some(30), false, true)),
            (&["50% maxconn:30 drain stopped", "UP\t100%", "maxconn:0"], (1.0, None, true, false)),
            (&["250%"], (1.0, None, false, false)),
            (&["0%"], (0.0, None, false, false)),
            (&["10%", ""], (0.1, None, false, false)),
            (&["fail", "# all is well, up"], (1.0, None, false, true)),
        ] {
            let (is, expected_part) = (in_words(&said(lines)), expected.0);
            assert!((is.0 - expected_part).abs() < 0.001, "{lines:?}: {is:?}");
            assert_eq!((is.1, is.2, is.3), (expected.1, expected.2, expected.3), "{lines:?}");
        }
    }

    #[test]
    fn an_answer_with_an_unknown_word_counts_for_nothing() {
        for line in ["HTTP/1.1 400", "drain 50", "maxconn:x", "-5%", "weight:3"] {
            assert!(advice(line, None).is_err(), "{line}");
        }
    }

    #[test]
    fn only_the_first_line_counts() {
        assert_eq!(first_line(b"50% up\r\ndown\n"), "50% up");
        assert_eq!(first_line(b"drain # \x1b[2J\n"), "drain # \\u{1b}[2J");
        assert_eq!(first_line(b"\n"), "");
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn no_bytes_break_it(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            let _ = advice(&first_line(&bytes), None);
        }
    }
}
