#!/usr/bin/env bash
# One run on several machines without a scheduler: start this on each of them.
#
#   NODES=2 HEAD=node-a bash torchrun.sh RUN.toml --stages train
#
# HEAD is the name of one of the machines, the same on all. The run file's output, and the cache, are on a file system
# that all machines share. Whoever starts first waits for the others.
#
#   NODES     how many machines (default 1)
#   WORKERS   processes a machine (default: one a GPU)
#   HEAD      where they meet (needed with several machines)
#   PORT      a port that is free there (default 29500)
#   RUN_ID    what tells this run from another one that meets at the same place (default: the run file's name)
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: NODES=N HEAD=HOST bash torchrun.sh RUN.toml [options of deepspec run]" >&2
    exit 2
fi
nodes=${NODES:-1}
if [[ $nodes -gt 1 && -z ${HEAD:-} ]]; then
    echo "HEAD is not set: with several machines, name one of them where all meet" >&2
    exit 2
fi

# A worker that is asked to stop finishes its step and saves: torchrun kills it after 30 seconds unless told otherwise.
exec torchrun \
    --nnodes "$nodes" \
    --nproc-per-node "${WORKERS:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
    --rdzv-id "${RUN_ID:-$(basename "$1")}" \
    --max-restarts 0 \
    --shutdown-timeout 60 \
    -m deepspec_core run "$@"
