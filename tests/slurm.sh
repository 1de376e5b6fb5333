#!/usr/bin/env bash
# Slurm on this machine alone: the script of RUNNING.md's section "Slurm", with other sizes and paths, is submitted,
# stopped by its own signal while it trains, and submitted again until it is done. Its weights are then those of an
# undisturbed run, bit for bit. Takes 5 to 15 minutes. Needs root, and Debian's slurm-wlm and munge; their daemons are
# this script's own, with keys, ports and folders of their own, and end with it.
#
#     sudo tests/slurm.sh [PYTHON]             # default: .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
torchrun=$(dirname "$python")/torchrun
out=$(mktemp -d)
finish() {
    status=$?
    scancel --quiet --user root 2>/dev/null || true
    sleep 1
    for daemon in slurmd slurmctld munged; do
        kill "$(cat "$out/$daemon.pid")" 2>/dev/null || true
    done
    [ $status = 0 ] || tail -n 20 "$out"/*.log
    sleep 2
    rm -rf "$out"
}
trap finish EXIT

# 1. munge and Slurm, with everything they write in the folder. The node has no GPU; Slurm counts two all the same.
chmod 755 "$out"
dd if=/dev/urandom of="$out/munge.key" bs=1024 count=1 status=none
chmod 400 "$out/munge.key"
munged --force --key-file="$out/munge.key" --socket="$out/munge.socket" --pid-file="$out/munged.pid" \
    --log-file="$out/munged.log" --seed-file="$out/munge.seed"
host=$(hostname -s)
cat >"$out/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$out/munge.socket
StateSaveLocation=$out/state
SlurmdSpoolDir=$out/spool
SlurmctldPidFile=$out/slurmctld.pid
SlurmdPidFile=$out/slurmd.pid
SlurmctldLogFile=$out/slurmctld.log
SlurmdLogFile=$out/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=$host CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES State=UP
CONF
echo "Name=gpu File=$out/gpu[0-1]" >"$out/gres.conf"
touch "$out"/gpu{0,1}
export SLURM_CONF=$out/slurm.conf
mkdir "$out/state" "$out/spool"
slurmctld
slurmd
for _ in $(seq 30); do
    [ "$(sinfo --noheader --format %t 2>/dev/null)" = idle ] && break
    sleep 1
done
sinfo
sinfo --noheader --format %t | grep -qx idle

# 2. The documented script. Every replacement has to find its words.
awk '/^## Slurm/ { here = 1 } here && /^```$/ { exit } copying { print } here && /^```bash$/ { copying = 1 }' \
    RUNNING.md >"$out/job.sh"
replace() {
    grep -qF -- "$1" "$out/job.sh" || { echo "RUNNING.md's script does not say: $1"; exit 1; }
    "$python" - "$out/job.sh" "$1" "$2" <<'REPLACE'
import pathlib, sys
path, old, new = pathlib.Path(sys.argv[1]), *sys.argv[2:]
path.write_text(path.read_text().replace(old, new))
REPLACE
}
replace "--nodes 2" "--nodes 1"
replace "--gpus-per-node 8" "--gpus-per-node 2"
replace "--nproc_per_node 8" "--nproc_per_node 2"
replace "--cpus-per-task 64" "--cpus-per-task 2"
replace "--time 08:00:00 --signal TERM@300" "--time 00:03:00 --signal TERM@60"
replace "--shutdown-timeout 280" "--shutdown-timeout 40"
replace "cd /shared/alphapo" "cd $PWD"
replace ".venv/bin/torchrun" "$torchrun"
replace "/shared/Meta-Llama-3-8B-Instruct" "data/tiny/model"
replace "/shared/pairs.jsonl" "data/tiny/pairs.jsonl"
replace "/shared/runs/llama3-8b" "$out/stopped"
replace "--save_every 100" "--save_every 100 --pairs_per_step 16 --epochs 8"
export OMP_NUM_THREADS=1
cat "$out/job.sh"

# 3. Submitted until it is done.
done=
for try in $(seq 20); do
    job=$(sbatch --parsable --output "$out/job-$try.txt" "$out/job.sh")
    while [ -n "$(squeue --noheader --jobs "$job" --states PENDING,RUNNING,COMPLETING 2>/dev/null)" ]; do
        sleep 1
    done
    state=$(scontrol show job "$job" | grep -oE "(JobState|ExitCode|RunTime)=[^ ]+" | tr '\n' ' ')
    echo "--- submission $try: $state"
    grep -vE "^step [0-9]" "$out/job-$try.txt"
    if grep -q "saved. To load it" "$out/job-$try.txt"; then
        grep -q "JobState=COMPLETED ExitCode=0:0" <<<"$state"
        done=yes
        break
    fi
    grep -q "stopped  by SIGTERM after step" "$out/job-$try.txt" || { echo "not stopped by the signal"; exit 1; }
done
[ -n "$done" ] || { echo "not done after $try submissions"; exit 1; }
[ "$try" -gt 1 ] || { echo "the job was done before its signal came"; exit 1; }

# 4. The same without Slurm and undisturbed.
sed "s|srun --cpus-per-task 2||; s|$out/stopped|$out/whole|" "$out/job.sh" >"$out/whole.sh"
SLURM_JOB_NODELIST=$host SLURM_NNODES=1 SLURM_JOB_ID=whole bash "$out/whole.sh" >"$out/whole.txt" 2>&1 ||
    { tail "$out/whole.txt"; exit 1; }
last=$(basename "$(ls -d "$out"/whole/step-* | tail -n 1)")
cmp "$out/whole/$last/model.safetensors" "$out/stopped/$last/model.safetensors"
[ "$(wc -l <"$out/whole/metrics.jsonl")" = "$(wc -l <"$out/stopped/metrics.jsonl")" ]
echo "$(sinfo --version): stopped $((try - 1)) time(s), and the weights of $last are the undisturbed run's"
