#!/bin/bash
# The machines of a small SLURM cluster: namespaces of this one. For tests/slurm/cluster.py, which writes the files of
# the folder $CLUSTER, starts `nodes.sh head`, and puts requests into the pipe $CLUSTER/requests.
#
# The head has a network, a host name and processes of its own; munged and slurmctld run in it. Below it each node has
# them once more, with a slurmd. The nodes' processes are the head's too: when the head is killed, the kernel ends all,
# and with the last process the networks go. Nothing is left, and nothing of the machine's own is changed.
set -u

separate=(unshare --net --uts --ipc --mount --propagation slave --pid --fork --kill-child)

head() {
    hostname head
    mount -t proc proc /proc
    mount --bind "$CLUSTER/hosts" /etc/hosts
    ip link set lo up
    ip link add br0 type bridge
    ip addr add "$NETWORK.1/24" dev br0
    ip link set br0 up
    for device in "$CLUSTER"/gpu*; do mount --bind /dev/null "$device"; done  # SLURM only counts them
    munged --force --key-file="$CLUSTER/munge/key" --socket="$CLUSTER/munge/socket" --pid-file="$CLUSTER/munge/pid" \
        --log-file="$CLUSTER/log/munged.log" --seed-file="$CLUSTER/munge/seed"
    controller
    for name in $NODES; do start "$name"; done
    exec 5<> "$CLUSTER/requests"  # for writing too, so that reading never meets an end
    while read -r what name <&5; do
        case $what in
            stop-controller) kill "$(cat "$CLUSTER/slurmctld.pid")" ;;
            start-controller) controller ;;
            power-off) kill -KILL "$(cat "$CLUSTER/$name.pid")"; rm -f "$CLUSTER/$name.pid" ;;
            power-on) start "$name" ;;
        esac
    done
}

controller() { slurmctld -D < /dev/null >> "$CLUSTER/log/slurmctld.out" 2>&1 5>&- & }

start() {
    local name=$1
    while ip link show "link-$name" > /dev/null 2>&1; do sleep 0.1; done  # of its life before this one
    "${separate[@]}" bash "$0" node "$name" < /dev/null >> "$CLUSTER/log/$name.out" 2>&1 5>&- &
    until [ -s "$CLUSTER/$name.pid" ]; do sleep 0.05; done
    ip link add "link-$name" type veth peer name eth0 netns "$(cat "$CLUSTER/$name.pid")"
    ip link set "link-$name" master br0 up
}

node() {
    local name=$1 pid
    # Its number among the head's processes, whose /proc is still mounted here.
    read -r pid _ < /proc/self/stat; echo "$pid" > "$CLUSTER/$name.new"; mv "$CLUSTER/$name.new" "$CLUSTER/$name.pid"
    hostname "$name"
    mount -t proc proc /proc
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    ip link set lo up
    until ip addr add "$NETWORK.$((10 + ${name#node}))/24" dev eth0 2> /dev/null; do sleep 0.05; done
    ip link set eth0 up
    slurmd -D -N "$name" < /dev/null &
    sleep infinity &
    while :; do wait || :; done  # a machine goes on without slurmd, and takes orphans in
}

"$@"
