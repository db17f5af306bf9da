//! What `ringway top` shows: rows with rates from two samples of the status, sorted and filtered. Pure.

use std::collections::HashMap;
use std::time::Duration;

use ringway::api::status::{Member, Status};

use crate::cli::status::percents;

/// The order of the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Sort {
    /// As the config has them.
    #[default]
    Config,
    Active,
    Rate,
    Errors,
    Bytes,
}

impl Sort {
    pub(super) const ALL: [(char, Self, &'static str); 5] = [
        ('n', Self::Config, "place in the config"),
        ('a', Self::Active, "active"),
        ('r', Self::Rate, "connections per second"),
        ('e', Self::Errors, "failed connects"),
        ('b', Self::Bytes, "bytes per second"),
    ];
}

/// One backend, with its rates.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) pool: String,
    pub(super) id: String,
    pub(super) state: String,
    pub(super) is_drained: bool,
    pub(super) active: u64,
    pub(super) failed: u64,
    /// New connections per second; `None` without an earlier sample of the same process.
    pub(super) rate: Option<f64>,
    /// Bytes per second from clients and to clients.
    pub(super) bytes: Option<(f64, f64)>,
    /// In percent.
    pub(super) share: String,
    /// In percent.
    pub(super) now: String,
    pub(super) check: String,
}

/// What a counter was in the earlier sample.
type Before<'a> = HashMap<(&'a str, &'a str), &'a Member>;

/// The rows of the newer of two samples. `passed` is the time between them. After an upgrade, counters begin at 0 again, so
/// samples of two processes give no rates.
pub(super) fn rows(before: Option<(&Status, Duration)>, now: &Status) -> Vec<Row> {
    let before = before.filter(|(before, _)| before.pid == now.pid);
    let passed = before.map_or(0.0, |(_, passed)| passed.as_secs_f64());
    let members: Before<'_> = before.map_or_else(HashMap::new, |(before, _)| {
        let all = before.pools.iter().flat_map(|pool| pool.backends.iter().map(move |member| (pool, member)));
        all.map(|(pool, member)| ((pool.name.as_str(), member.id.as_str()), member)).collect()
    });
    let of_pool = |pool: &ringway::api::status::Pool| {
        let shares = percents(pool.backends.iter().map(|member| member.share));
        let now = percents(pool.backends.iter().map(|member| member.now));
        let shares = std::iter::zip(shares, now);
        let row = |(member, shares)| row(&pool.name, member, shares, &members, passed);
        std::iter::zip(&pool.backends, shares).map(row).collect::<Vec<_>>()
    };
    now.pools.iter().flat_map(of_pool).collect()
}

fn row(pool: &str, member: &Member, (share, now): (String, String), before: &Before<'_>, passed: f64) -> Row {
    let old = before.get(&(pool, member.id.as_str())).filter(|_| passed > 0.0);
    // A backend that left and joined again counts from 0 too: never a negative rate.
    let per_second = |now: u64, before: u64| now.checked_sub(before).map(|more| more as f64 / passed);
    Row {
        pool: pool.to_owned(),
        id: member.id.clone(),
        state: member.state.clone(),
        is_drained: member.drain.is_some(),
        active: member.connections.active,
        failed: member.connections.failed,
        rate: old.and_then(|old| per_second(member.connections.total, old.connections.total)),
        bytes: old.and_then(|old| {
            let from = per_second(member.bytes.from_client, old.bytes.from_client)?;
            Some((from, per_second(member.bytes.to_client, old.bytes.to_client)?))
        }),
        share,
        now,
        check: member.health.last.clone().unwrap_or_else(|| "-".to_owned()),
    }
}

/// Keeps the rows that contain the text, and sorts them: the largest numbers first.
pub(super) fn arrange(rows: &mut Vec<Row>, filter: &str, sort: Sort) {
    rows.retain(|row| filter.is_empty() || format!("{}/{} {}", row.pool, row.id, row.state).contains(filter));
    let bytes = |row: &Row| row.bytes.map_or(0.0, |(from, to)| from + to);
    match sort {
        Sort::Config => {}
        Sort::Active => rows.sort_by_key(|row| std::cmp::Reverse(row.active)),
        Sort::Rate => rows.sort_by(|a, b| b.rate.unwrap_or(0.0).total_cmp(&a.rate.unwrap_or(0.0))),
        Sort::Errors => rows.sort_by_key(|row| std::cmp::Reverse(row.failed)),
        Sort::Bytes => rows.sort_by(|a, b| bytes(b).total_cmp(&bytes(a))),
    }
}

/// A number of bytes per second, like `1.2 MB/s`.
pub(super) fn speed(bytes: Option<f64>) -> String {
    let Some(bytes) = bytes else { return "-".to_owned() };
    let units = [("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)];
    let unit = units.iter().find(|(_, size)| bytes >= *size);
    unit.map_or_else(|| format!("{bytes:.0} B/s"), |(name, size)| format!("{:.1} {name}", bytes / size))
}

/// A number of connections per second.
pub(super) fn rate(rate: Option<f64>) -> String {
    rate.map_or("-".to_owned(), |rate| if rate < 10.0 { format!("{rate:.1}") } else { format!("{rate:.0}") })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::cli::top) fn status(pid: u32, totals: &[(&str, u64)]) -> Status {
        let backends: Vec<_> = totals
            .iter()
            .map(|(id, total)| {
                serde_json::json!({
                    "id": id, "address": "10.0.0.1:80", "state": "healthy", "weight": 1, "share": 0.5, "now": 0.5, "replica": null,
                    "restarts": 0, "last_exit": null, "connections": { "active": total / 10, "total": total, "failed": 0 },
                    "bytes": { "from_client": total * 100, "to_client": total * 1_000_000 },
                    "health": { "last": "ok", "since_seconds": 1.0 }, "admission": 1.0, "drain": null, "ejections": 0,
                })
            })
            .collect();
        serde_json::from_value(serde_json::json!({
            "version": "1", "pid": pid, "uptime_seconds": 310.0, "ready": true, "listeners": [],
            "pools": [{
                "name": "web", "key": "source", "table_generation": 1, "panic": false, "drain_seconds": 1.0, "differs": [],
                "provider": { "kind": "static", "engine": null },
                "ring": { "digest": "0", "points": 1, "virtual_nodes": 1, "probes": 1, "seed": 0 }, "backends": backends,
            }],
        }))
        .unwrap()
    }

    #[test]
    fn rates_come_from_two_samples_of_one_process_and_are_never_negative() {
        let second = Duration::from_secs(2);
        let (old, new) = (status(1, &[("a", 100), ("b", 50)]), status(1, &[("a", 150), ("b", 40), ("c", 7)]));
        let rates = |before: Option<(&Status, Duration)>, now: &Status| {
            rows(before, now).iter().map(|row| row.rate).collect::<Vec<_>>()
        };
        assert_eq!(rates(Some((&old, second)), &new), [Some(25.0), None, None]);
        assert_eq!(rates(Some((&old, second)), &status(2, &[("a", 150)])), [None]);
        assert_eq!(rates(None, &new), [None; 3]);
        assert_eq!(rates(Some((&old, Duration::ZERO)), &new), [None; 3]);
    }

    #[test]
    fn rows_are_filtered_and_sorted() {
        let all = rows(None, &status(1, &[("a", 10), ("b", 30), ("c", 20)]));
        let ids = |filter: &str, sort| {
            let mut rows = all.clone();
            arrange(&mut rows, filter, sort);
            rows.iter().map(|row| row.id.clone()).collect::<Vec<_>>()
        };
        assert_eq!(ids("", Sort::Config), ["a", "b", "c"]);
        assert_eq!(ids("", Sort::Active), ["b", "c", "a"]);
        assert_eq!(ids("web/b", Sort::Config), ["b"]);
        assert_eq!(ids("healthy", Sort::Config).len(), 3);
        assert!(ids("nothing", Sort::Config).is_empty());
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            (speed(Some(1_234_567.0)), speed(Some(12.0)), speed(None)),
            ("1.2 MB/s".into(), "12 B/s".into(), "-".into())
        );
        assert_eq!((rate(Some(3.25)), rate(Some(1234.0)), rate(None)), ("3.2".into(), "1234".into(), "-".into()));
    }
}
