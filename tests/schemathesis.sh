#!/usr/bin/env bash
# Sends random calls to the side port of a demo, as its description allows them, and compares the answers with the description.
#
#   tests/schemathesis.sh [RINGWAY]      the default is target/debug/ringway; needs schemathesis (PyPI)
#
# It leaves out the calls that end the run: upgrade, and the endless stream.
set -euo pipefail
cd "$(dirname "$0")/.."
ringway=${1:-target/debug/ringway}

folder=$(mktemp -d)
cat > "$folder/config.yaml" <<YAML
api: { listen: 127.0.0.1:0 }
listeners: [{ name: web, listen: 127.0.0.1:0, pool: echo }]
pools:
  - name: echo
    provider: { process: { replicas: 2, command: [ringway, echo-server, --listen, "127.0.0.1:{port}", --name, "{slot}"] } }
    health_check: { kind: http, path: /heartbeat }
YAML
"$ringway" --config "$folder/config.yaml" 2> "$folder/log" &
pid=$!
trap 'kill $pid 2>/dev/null; wait $pid 2>/dev/null || true; rm -r "$folder"' EXIT
for _ in $(seq 100); do grep -q ' ready' "$folder/log" && break; sleep 0.1; done
address=$(sed -n 's/^ *\([0-9.:]*\) *side port:.*/\1/p' "$folder/log")

schemathesis run "http://$address/api/openapi.json" --url "http://$address" --seed 14 --max-examples "${EXAMPLES:-30}" \
  --exclude-path /api/upgrade --exclude-path /api/stream --exclude-path /api/pools/{pool}/scale --exclude-path /api/reload \
  --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance

kill -0 $pid
if grep -q 'has a bug' "$folder/log"; then cat "$folder/log"; exit 1; fi
echo "Ringway is still well"
