#!/usr/bin/env bash
# One node of a server on real machines, in Docker: the same line on each, NODE_RANK 0 on HEAD.
#
#   launch/docker/node.sh IMAGE HEAD NODE_RANK HF_CACHE [-e NAME[=VALUE]]... [-v HOST:INSIDE[:ro]]... [--infiniband] \
#       [-- MODEL [tpserve flags]]
#   launch/docker/node.sh tpserve 10.0.0.1 0 ~/.cache/huggingface -e HF_TOKEN -- ORG/NAME -tp 8 -pp 2
#   launch/docker/node.sh tpserve 10.0.0.1 0 ~/.cache/huggingface -v /models:/models:ro -- /models/llama -tp 8 -pp 2
#
# HF_CACHE is the node's cache of models, mounted at /cache (a good place for cluster.secret, too). NNODES (2) is the number of
# nodes. The container runs as you, and shares the host's network, because gloo and NCCL meet on ports that the kernel chooses,
# and its memory for communication between ranks.
set -euo pipefail

if (($# < 4)) || [[ ! $3 =~ ^[0-9]+$ ]]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
image=$1 head=$2 node_rank=$3 cache=$4
shift 4

options=()
while (($#)); do
    case $1 in
        -e) options+=(-e "${2:?-e needs a variable}"); shift 2 ;;
        -v) options+=(--volume "${2:?-v needs HOST:INSIDE}"); shift 2 ;;
        --infiniband) options+=(--device /dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1); shift ;;
        --) shift; break ;;
        *) echo "node.sh: unknown option $1; what is for tpserve comes after --" >&2; exit 2 ;;
    esac
done
mkdir -p "$cache"
for key in TPSERVE_API_KEY TPSERVE_ADMIN_API_KEY TPSERVE_METRICS_KEY; do
    [[ -z ${!key:-} ]] || options+=(-e "$key")
done

exec docker run --rm --init --name "tpserve-$node_rank" --network host --ipc host --gpus all --stop-timeout 40 \
    --user "$(id -u):$(id -g)" --volume "$(cd "$cache" && pwd):/cache" -e HF_HOME=/cache "${options[@]}" "$image" "$@" \
    --nnodes "${NNODES:-2}" --node-rank "$node_rank" --master-addr "$head"
