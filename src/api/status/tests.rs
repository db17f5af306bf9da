use super::*;

#[test]
fn strangers_see_states_and_counts_but_no_addresses_processes_or_texts() {
    let status: Status = serde_json::from_value(serde_json::json!({
        "version": "1", "pid": 4711, "config": "/secret.yaml", "uptime_seconds": 1.0, "ready": true,
        "listeners": [{
            "name": "web", "address": "10.9.9.9:8000", "pool": "echo", "max_connections": 7,
            "connections": { "active": 1, "total": 2 },
        }],
        "pools": [{
            "name": "echo", "key": "source", "table_generation": 1, "panic": false, "drain_seconds": 1.0,
            "provider": { "kind": "docker", "engine": {
                "host": "unix:///secret.sock", "reachable": false, "synced_seconds_ago": 1.0, "error": "secret error",
            }, "rollout": {
                "state": "paused", "updated": 1, "total": 3, "since_seconds": 1.0, "reason": "secret line", "last": null, "ended": 1,
            } },
            "ring": { "digest": "0", "points": 1, "virtual_nodes": 1, "probes": 1, "seed": 0 },
            "differs": [{ "what": "drain", "backend": "10.9.9.8:80", "config": null, "now": null }],
            "backends": [{
                "id": "10.9.9.8:80", "address": "10.9.9.8:80", "state": "unhealthy", "weight": 3, "share": 0.5,
                "replica": { "container": "secretid", "name": "secretname" }, "restarts": 5,
                "last_exit": { "reason": "secret reason", "code": 1, "seconds_ago": 1.0, "output": ["secret line"] },
                "connections": { "active": 1, "total": 2, "failed": 3 },
                "bytes": { "from_client": 1, "to_client": 2 },
                "health": { "last": "unexpected answer \"secret\"", "since_seconds": 1.0 },
                "admission": 1.0, "drain": null, "ejections": 0,
            }],
        }],
    }))
    .unwrap();
    let shown = serde_json::to_value(status.for_strangers()).unwrap();
    let text = shown.to_string();
    for hidden in ["secret", "4711", "10.9.9"] {
        assert!(!text.contains(hidden), "{hidden} in {text}");
    }
    let backend = &shown["pools"][0]["backends"][0];
    assert_eq!((&backend["id"], &backend["state"]), (&"backend-1".into(), &"unhealthy".into()));
    assert_eq!(shown["pools"][0]["provider"]["rollout"]["state"], "paused");
    assert_eq!((&backend["share"], &backend["connections"]["total"]), (&0.5.into(), &2.into()));
}
