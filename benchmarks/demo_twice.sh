#!/usr/bin/env bash
# Run the demo twice; print each run's time and accuracies, and fail if the accuracies differ.
set -euo pipefail
cd "$(dirname "$0")/.."
burnish=${BURNISH:-.venv/bin/burnish}
folder=$(mktemp -d)
for number in 1 2; do
    started=$SECONDS
    "$burnish" demo --out "$folder/$number" --quiet --json >"$folder/$number.json"
    echo "run $number: $((SECONDS - started)) s"
done
python3 - "$folder" <<'PY'
import json, sys
scores = [
    {variant["name"]: variant["score"] for variant in json.load(open(f"{sys.argv[1]}/{number}.json"))["variants"]}
    for number in (1, 2)
]
for name, score in scores[0].items():
    print(f"{name:10} {score:.4f} {scores[1][name]:.4f}")
sys.exit(scores[0] != scores[1])
PY
