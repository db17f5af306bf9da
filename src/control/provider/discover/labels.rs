//! What the labels of a container say about it as a backend. Pure.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use crate::backend::{CheckWay, Membership, OwnCheck};
use crate::control::docker::label;

/// Most of the labels here are numbers of these ranges, as in the config.
const WEIGHTS: RangeInclusive<u64> = 0..=1000;
const TIERS: RangeInclusive<u64> = 0..=65_535;
const CONNECTIONS: RangeInclusive<u64> = 1..=1_000_000;
const PORTS: RangeInclusive<u64> = 1..=65_535;

/// Most unknown labels that a message names.
const MOST_NAMED: usize = 5;

/// What the labels of a container say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Labeled {
    /// The port on which the container listens; `None`: as the pool says.
    pub(super) port: Option<u16>,
    pub(super) membership: Membership,
    /// How to check it; `None`: as the pool says.
    pub(super) check: Option<OwnCheck>,
}

/// Reads the labels of a container.
///
/// # Errors
/// The first label that is wrong, and the remedy.
pub(super) fn read(labels: &HashMap<String, String>) -> Result<Labeled, String> {
    let text = |name: &str| labels.get(name).map(|text| text.trim());
    let number = |name: &str, range: &RangeInclusive<u64>| {
        let Some(text) = text(name) else { return Ok(None) };
        let number = text.parse().ok().filter(|number| range.contains(number));
        number.map(Some).ok_or_else(|| {
            format!("its label {name} is {text:?}: write a whole number from {} to {}", range.start(), range.end())
        })
    };
    let check_port = number(label::CHECK_PORT, &PORTS)?.map(|port| port as u16);
    let way = match text(label::CHECK) {
        None if check_port.is_some() => {
            return Err(format!("it has the label {} without {}: add that", label::CHECK_PORT, label::CHECK));
        }
        None => None,
        Some("off") => Some(CheckWay::Off),
        Some("tcp") => Some(CheckWay::Tcp),
        Some(path) if is_path(path) => Some(CheckWay::Http(path.into())),
        Some(other) => {
            return Err(format!(
                "its label {} is {other:?}: write tcp, off, or a path for HTTP like /health",
                label::CHECK
            ));
        }
    };
    Ok(Labeled {
        port: number(label::PORT, &PORTS)?.map(|port| port as u16),
        membership: Membership {
            weight: number(label::WEIGHT, &WEIGHTS)?.map_or(1, |weight| weight as u32),
            tier: number(label::TIER, &TIERS)?.map_or(0, |tier| tier as u16),
            max_connections: number(label::MAX_CONNECTIONS, &CONNECTIONS)?.map(|most| most as u32),
            is_drained: false,
        },
        check: way.map(|way| OwnCheck { way, port: check_port }),
    })
}

/// Whether a text is the path of a URL.
fn is_path(text: &str) -> bool {
    text.starts_with('/') && text.parse::<hyper::Uri>().is_ok()
}

/// The first labels with Ringway's prefix that it does not know.
pub(super) fn unknown(labels: &HashMap<String, String>) -> Vec<&str> {
    let known = |name: &str| label::OF_BACKENDS.contains(&name) || label::OF_REPLICAS.contains(&name);
    let mut unknown: Vec<_> =
        labels.keys().map(String::as_str).filter(|name| name.starts_with(label::PREFIX) && !known(name)).collect();
    unknown.sort_unstable();
    unknown.truncate(MOST_NAMED);
    unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(name, value)| (format!("ringway.{name}"), (*value).to_owned())).collect()
    }

    #[test]
    fn labels_say_how_a_container_takes_part() {
        let plain = read(&labels(&[])).unwrap();
        assert_eq!(plain, Labeled { port: None, membership: Membership::weighing(1), check: None });
        let all = [
            ("port", "8080"),
            ("weight", "0"),
            ("tier", " 2 "),
            ("max_connections", "50"),
            ("check", "/health?full=1"),
            ("check.port", "8081"),
        ];
        let expected = Labeled {
            port: Some(8080),
            membership: Membership { weight: 0, tier: 2, max_connections: Some(50), is_drained: false },
            check: Some(OwnCheck { way: CheckWay::Http("/health?full=1".into()), port: Some(8081) }),
        };
        assert_eq!(read(&labels(&all)).unwrap(), expected);
        let way = |text: &str| read(&labels(&[("check", text)])).unwrap().check.unwrap().way;
        assert_eq!((way("tcp"), way("off")), (CheckWay::Tcp, CheckWay::Off));
    }

    #[test]
    fn a_wrong_label_has_a_remedy() {
        for (name, value, part) in [
            ("weight", "1001", "ringway.weight is \"1001\": write a whole number from 0 to 1000"),
            ("weight", "-1", "from 0 to 1000"),
            ("weight", "", "from 0 to 1000"),
            ("tier", "70000", "from 0 to 65535"),
            ("port", "0", "from 1 to 65535"),
            ("port", "http", "from 1 to 65535"),
            ("max_connections", "0", "from 1 to"),
            ("check", "http", "write tcp, off, or a path"),
            ("check", "/a b", "write tcp, off, or a path"),
            ("check.port", "80", "without ringway.check"),
        ] {
            let problem = read(&labels(&[(name, value)])).unwrap_err();
            assert!(problem.contains(part), "{name}: {problem}");
        }
    }

    #[test]
    fn labels_that_ringway_does_not_know_are_named() {
        let all = labels(&[("wieght", "2"), ("weight", "2"), ("pool", "web"), ("owner", "x")]);
        assert_eq!(unknown(&all), ["ringway.wieght"]);
    }
}
