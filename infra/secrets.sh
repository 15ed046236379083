#!/bin/sh
# Makes infra/.env with a new secret for each name that it lacks; what stands there stays.  Readable by its owner alone.
set -eu
umask 077
file=$(dirname "$0")/.env
touch "$file"
chmod 600 "$file"
secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
keep() { grep -q "^$1=" "$file" || printf '%s=%s\n' "$1" "$2" >> "$file"; }
keep POSTGRES_PASSWORD "$(secret)"
keep MLFLOW_DB_PASSWORD "$(secret)"
keep PREFECT_DB_PASSWORD "$(secret)"
keep PREFECT_AUTH "admin:$(secret)"
keep S3_ACCESS_KEY "$(secret | cut -c1-20)"
keep S3_SECRET_KEY "$(secret)"
keep RAY_TOKEN "$(secret)"
keep GRAFANA_PASSWORD "$(secret)"
keep ENDPOINT_KEY "none-yet"    # of Prometheus: put one that `diffusion keys add prometheus` printed
echo "$file"
