#!/bin/sh
# Sets up .venv-peers: the stores that benchmarks/bench_store.py measures beside this one.
# Needs, from Debian: redis-server libibverbs1 libnuma1 libcurl4 (this script does not install them).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
[ -x .venv-peers/bin/python ] || "$python" -m venv .venv-peers
.venv-peers/bin/pip install --quiet --disable-pip-version-check \
    'mooncake-transfer-engine-non-cuda==0.3.13.post1' 'redis[hiredis]==8.1.0' 'hiredis==3.5.0'
for need in redis-server; do
    command -v "$need" >/dev/null || echo "peers.sh: no $need: its line in the results will be an error" >&2
done
.venv-peers/bin/python -c 'import mooncake.store' ||
    echo "peers.sh: Mooncake does not load: apt-get install libibverbs1 libnuma1 libcurl4" >&2
echo "run: .venv/bin/python benchmarks/bench_store.py"
