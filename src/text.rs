//! Text from others, made fit for logs, tables and terminals.

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

/// The length of the sequence at the start of `text` that changes the colour or style (ECMA-48, SGR), if there is one.
fn colour(text: &str) -> Option<usize> {
    let parameters = text.strip_prefix("\x1b[")?;
    let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    parameters[end..].starts_with('m').then_some(text.len() - parameters.len() + end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped_and_colours_removed() {
        assert_eq!(printable("plain é\ttext"), "plain é\ttext");
        assert_eq!(printable("\x1b[1;32mgreen\x1b[0m"), "green");
        assert_eq!(printable("a\rb\0c\nd"), "a\\rb\\u{0}c\\nd");
        assert_eq!(printable("\x1b[2J\u{9b}1A"), "\\u{1b}[2J\\u{9b}1A");
        assert_eq!(printable("\x1b[31"), "\\u{1b}[31");
    }
}
