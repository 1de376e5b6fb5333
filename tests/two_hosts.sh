#!/usr/bin/env bash
# Two network namespaces as two hosts: torchrun --nnodes 2 trains across them, 2 ranks each, sharded over all ranks and
# then within each host, and agrees with one process to the 1e-8 relative of float64. Needs root and iproute2.
#
#     sudo tests/two_hosts.sh [PYTHON]         # default: .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
out=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; ip netns del host1; ip netns del host2; rm -rf "$out"' EXIT

ip netns add host1
ip netns add host2
ip link add wire1 netns host1 type veth peer name wire2 netns host2
for n in 1 2; do
    ip -n host$n addr add 10.77.0.$n/24 dev wire$n
    ip -n host$n link set wire$n up
    ip -n host$n link set lo up
done
ip netns exec host2 ping -c 1 -q 10.77.0.1 >/dev/null 2>&1 || true      # wakes the wire; ping need not be installed

job="train.py --model data/tiny/model --data data/tiny/pairs.jsonl --eval_pairs 16 --pairs_per_step 8 --max_steps 8
     --learning_rate 1e-4 --weight_dtype float64 --save_every 4"
on_host() {     # on_host N FLAGS...: this host's torchrun
    ip netns exec "host$1" env OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME="wire$1" "$python" -m torch.distributed.run \
        --nnodes 2 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint 10.77.0.1:29400 --rdzv_id "${*: -1}" \
        --rdzv_conf "is_host=$((2 - $1))" --local_addr "10.77.0.$1" $job "${@:2}"
}

"$python" $job --output "$out/one"
for way in "" "--shard_within_node"; do
    on_host 1 $way --output "$out/two$way" & first=$!
    on_host 2 $way --output "$out/two$way"
    wait "$first"
    "$python" - "$out/one/metrics.jsonl" "$out/two$way/metrics.jsonl" <<'COMPARE'
import json, sys
one, two = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
names = ("loss", "grad_norm", "logps/chosen", "eval_loss", "eval_logps/rejected")
pairs = [(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in names if name in a]
worst = max(abs(a - b) / abs(a) for a, b in pairs)
print(f"two hosts against one process: {len(pairs)} numbers, largest relative difference {worst:.1e}")
sys.exit(worst > 1e-8)
COMPARE
done
echo "two hosts agree with one"
