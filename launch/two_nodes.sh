#!/usr/bin/env bash
# Serve one model over two nodes: run the same line on both, with NODE_RANK 0 on HEAD and 1 on the other.
#
#   launch/two_nodes.sh HEAD NODE_RANK NPROC [MODEL] [tpserve flags]
#   launch/two_nodes.sh 10.0.0.1 0 8 /models/llama --port 8000
#
# HEAD is an address of node 0 that both nodes can reach, NPROC the number of GPUs (or CPU ranks) of each node. Without
# a layout among the flags it is tensor parallel inside a node and one pipeline stage a node. MASTER_PORT (29500) is the
# port on HEAD at which the nodes meet. Only node 0 answers HTTP.
set -euo pipefail

if (($# < 3)) || [[ ! $2 =~ ^[01]$ || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
head=$1 node_rank=$2 nproc=$3
shift 3

layout=(--tensor-parallel-size "$nproc" --pipeline-parallel-size 2)
for argument in "$@"; do
    case ${argument//_/-} in
        -tp* | -pp* | --tensor-parallel-size* | --pipeline-parallel-size* | --pipeline-layer-map*) layout=() ;;
    esac
done

torchrun=$(dirname "$0")/../.venv/bin/torchrun
[[ -x $torchrun ]] || torchrun=torchrun
exec "$torchrun" --nnodes 2 --node_rank "$node_rank" --nproc_per_node "$nproc" \
    --master_addr "$head" --master_port "${MASTER_PORT:-29500}" -m tpserve "$@" "${layout[@]}"
