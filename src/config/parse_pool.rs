//! The keys of a pool: ranges and defaults.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::parse_provider;
use super::reader::{DAY, HOUR, MINUTE, MS, SECOND, Section, name, narrow};
use super::{Connect, HealthCheck, Pool, Provider, Timeouts};
use crate::label_enum;
use crate::proxy::key::KeyKind;
use crate::ring::Parameters;

/// Points of one ring: 50 MB of memory and a third of a second to build.
const MOST_POINTS: u64 = 1 << 22;

label_enum! {
    enum CheckKind { Tcp => "tcp", Http => "http", None => "none", }
}

pub(super) fn pool(mut section: Section<'_>) -> Pool {
    let name = name(&mut section);
    let key = section.choice("key", KeyKind::Source);
    let ring = ring(section.section("ring"));
    let provider = section.required("provider", parse_provider::KINDS);
    let provider = provider.map_or(Provider::Static(Vec::new()), |item| parse_provider::provider(item.section()));
    let points = points(&provider, ring);
    if points > MOST_POINTS {
        section.fault(format_args!(
            "its ring would have {points} points, and {MOST_POINTS} is the most: take fewer virtual_nodes, backends or weight"
        ));
    }
    let mut connect = section.section("connect");
    let connect = {
        let settings = Connect {
            timeout: connect.duration("timeout", MS..=5 * MINUTE, 2 * SECOND),
            attempts: narrow(connect.integer("attempts", 1..=100, 3)),
        };
        connect.finish();
        settings
    };
    let mut timeouts = section.section("timeouts");
    let timeouts = {
        let settings = Timeouts {
            idle: timeouts.duration("idle", 100 * MS..=30 * DAY, 10 * MINUTE),
            half_closed: timeouts.duration("half_closed", 100 * MS..=30 * DAY, MINUTE),
        };
        timeouts.finish();
        settings
    };
    let health_check = health_check(section.section("health_check"));
    let drain = section.duration("drain", Duration::ZERO..=DAY, 30 * SECOND);
    section.finish();
    Pool { name, key, ring, provider, connect, timeouts, health_check, drain }
}

fn ring(mut section: Section<'_>) -> Parameters {
    let parameters = Parameters {
        virtual_nodes: narrow(section.integer("virtual_nodes", 1..=65_536, 160)),
        probes: narrow(section.integer("probes", 1..=64, 3)),
        seed: section.integer("seed", 0..=u64::MAX, 0),
    };
    section.finish();
    parameters
}

fn points(provider: &Provider, ring: Parameters) -> u64 {
    let weight: u64 = match provider {
        Provider::Static(backends) => backends.iter().map(|backend| u64::from(backend.weight)).sum(),
        Provider::Process(_) | Provider::Containers(_) | Provider::Discover(_) => provider.backends() as u64,
    };
    weight * u64::from(ring.virtual_nodes)
}

fn health_check(mut section: Section<'_>) -> Option<HealthCheck> {
    let kind = section.choice("kind", CheckKind::Tcp);
    let path = section.item("path");
    if let Some(item) = path.as_ref().filter(|_| kind != CheckKind::Http) {
        item.fault("is only for `kind: http`: set that kind, or leave the path out");
    }
    let path = path.and_then(|item| {
        let path = item.text()?;
        let is_path = path.starts_with('/') && path.parse::<hyper::Uri>().is_ok();
        if !is_path {
            item.fault(format_args!("{path:?} is not a path like /heartbeat"));
        }
        is_path.then_some(path)
    });
    let interval = section.duration("interval", 10 * MS..=HOUR, 2 * SECOND);
    let timeout = section.duration("timeout", MS..=HOUR, SECOND);
    let counts: RangeInclusive<u64> = 1..=100;
    let rise = narrow(section.integer("rise", counts.clone(), 2));
    let fall = narrow(section.integer("fall", counts, 3));
    section.finish();
    let http_path = match kind {
        CheckKind::None => return None,
        CheckKind::Tcp => None,
        CheckKind::Http => Some(path.unwrap_or_else(|| "/".to_owned())),
    };
    Some(HealthCheck { http_path, interval, timeout, rise, fall })
}
