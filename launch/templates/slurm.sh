#!/bin/bash
# @@{title}
#
# Submit it:   sbatch @@{script}
# Written by:  @@{command}
# It needs nothing but SLURM and the environment of the recipe, and is yours to change.
#
@@{directives}

# shellcheck disable=SC2016  # where a $ stands between single quotes, it is meant
set -uo pipefail
# Steps get this shell's variables: those of your login, and those that --export names. Not those of the terminal.
export SLURM_EXPORT_ENV=ALL@@{setup}

run=@@{run}
recipe=(@@{recipe} --run.dir "$run")
launcher=(--config_file @@{config})
python=(@@{python})@@{pyxis}
per_node=@@{per_node}  # processes@@{array}

fail() { echo "$1" >&2; exit 2; }
[ "$SLURM_NTASKS" = "$SLURM_NNODES" ] || fail "one task for each node, please: it starts the node's $per_node processes"@@{granted}

# The time limit comes near, or someone asks the run to stop: tell all ranks, which save and end.
asked='' step=''
trap 'asked=yes; [ -z "$step" ] || kill -USR1 "$step"' USR1

# Queued again too often without a new checkpoint? Each start enters the newest one.
mkdir -p "$run/slurm"
starts=$run/slurm/starts-$SLURM_JOB_ID
printf '%s\n' "$run"/checkpoints/step_* | tail -n 1 >> "$starts"
[ "$(tail -n 1 "$starts" | grep -cxFf - "$starts")" -le @@{starts} ] || fail "@@{starts} starts without a new checkpoint"

# The ranks meet on the first node, at its address in the network and at a port of this start's own.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$({ getent ahostsv4 "$head"; hostname -I | tr ' ' '\n'; } | awk '/^[0-9]/ && !/^127[.]/ { print $1; exit }')
port=$((20000 + 2 * ((SLURM_JOB_ID + 1000 * ${SLURM_RESTART_COUNT:-0}) % 6000)))
launcher+=(--num_processes "$((SLURM_NNODES * per_node))" --num_machines "$SLURM_NNODES" --machine_rank @node)
[ "$SLURM_NNODES" = 1 ] || launcher+=(--main_process_ip "$address" --main_process_port "$port")

# The cores of a node are shared by its processes. NCCL finds its network by itself, or as the site's setup says.
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
export OMP_NUM_THREADS=$((cpus > per_node ? cpus / per_node : 1))@@{cpu}

# On every node one task, which knows its number; the others are ended where one fails.
everywhere=(srun --label --kill-on-bad-exit=1 --cpus-per-task="$cpus"@@{container} bash -c 'exec "${@/#@node/$SLURM_NODEID}"' node)
srun test -d "$run/slurm" || fail "not every node sees $run: it must lie on a file system that they share"@@{preflight}

# `launch run` keeps the ranks of its node: it hands signals on, leaves no process behind, and ends with their exit code
# (0 finished, 2 a mistake, 75 stopped and saved). 75 it tells by a file, for srun would end the other nodes meanwhile.
saved=$run/slurm/saved-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
code=75
if [ -z "$asked" ]; then
    "${everywhere[@]}" "${python[@]}" -m launch run --label --grace @@{grace} --resumable "$saved" -- \
        "${launcher[@]}" "${recipe[@]}" &
    step=$!
    while kill -0 "$step" 2> /dev/null; do wait "$step"; done  # a signal interrupts it
    wait "$step"; code=$?
    [ "$code" != 0 ] || [ ! -e "$saved" ] || code=75
    [ -z "$asked" ] || [ "$code" -le 128 ] || code=75  # killed in the end: it goes on from the checkpoint before
    rm -f "$saved"
fi

# Stopped and able to go on: back into the queue, unless `launch stop` asked for it, or SLURM has started this job anew
# meanwhile because it had lost sight of this node.
[ "$code" = 75 ] && [ ! -e "$run/slurm/stop-$SLURM_JOB_ID" ] || exit "$code"
for _ in {1..60}; do  # its controller may be away for a while
    start=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'Restarts=[0-9]*')
    [ -z "$start" ] || [ "$start" = "Restarts=${SLURM_RESTART_COUNT:-0}" ] || exit 2
    [ -n "$start" ] && scontrol requeue "$SLURM_JOB_ID" && echo "stopped and saved: queued again" && break
    sleep 5
done
exit "$code"
