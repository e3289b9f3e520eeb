#!/bin/sh
# Writes .env and ops/secrets/ with random passwords and keys. What is there already stays.
set -eu
cd "$(dirname "$0")/.."
umask 077

random() {
    head -c 30 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

if [ -e .env ]; then
    echo ".env is there already and stays as it is"
else
    # A name that is secret and empty gets a value.
    while IFS= read -r line; do
        case $line in
            *_PASSWORD= | S3_*_KEY=) printf '%s%s\n' "$line" "$(random)" ;;
            *) printf '%s\n' "$line" ;;
        esac
    done < .env.example > .env.tmp
    mv .env.tmp .env
    echo "wrote .env"
fi

# Containers read these files as users of their own, so the files are readable and their folder is not.
mkdir -p ops/secrets
chmod 700 ops/secrets
for name in api_keys metrics_key grafana_password; do
    [ -e "ops/secrets/$name" ] && continue
    random > "ops/secrets/$name.tmp"
    if [ $name = api_keys ]; then
        printf '\n' >> ops/secrets/api_keys.tmp
    fi
    chmod 644 "ops/secrets/$name.tmp"
    mv "ops/secrets/$name.tmp" "ops/secrets/$name"
    echo "wrote ops/secrets/$name"
done
# Prometheus asks for /metrics with a key of its own, which has to be one of the API's.
if ! grep -qxF "$(cat ops/secrets/metrics_key)" ops/secrets/api_keys; then
    printf '# Prometheus\n%s\n' "$(cat ops/secrets/metrics_key)" >> ops/secrets/api_keys
fi
