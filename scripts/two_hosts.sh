#!/usr/bin/env bash
# ZeRO-3 across two hosts, made on one machine: two network namespaces joined by a cable (a veth pair), each with an
# address, a host name, processes and an sshd of its own. Both see the same disk, as hosts of a cluster do.
#
#   host-a  10.77.0.1  rank 0  ---- cable ----  host-b  10.77.0.2  rank 1
#
#   1. torchrun    one rank on each host, c10d rendezvous, from the first step to the last
#   2. torchrun    static rendezvous; the cable is cut in the middle: both hosts end, each with a message. It is mended,
#                  and the run goes on
#   3. deepspeed   the same, started on host-a by `deepspeed --hostfile` (pdsh over ssh)
#   4. all three adapters are the same to the byte
#
# With the c10d rendezvous the ranks end as soon, but the torchrun on the host without the rendezvous store waits for the
# store until the cable is mended or TCP gives up, about a quarter of an hour.
#
# Needs Linux, root (or the capabilities of SYS_ADMIN and NET_ADMIN) and the Debian packages iproute2, openssh-server,
# openssh-client and pdsh; without them it says what is missing and exits with code 4. Nothing is left behind but the
# runs, in the folder given as first argument (default: runs/two_hosts), which must not exist. Further arguments go to
# every run: scripts/two_hosts.sh runs/cable --set method.density=0.05
set -euo pipefail

CANNOT_RUN_HERE=4
STALL_TIMEOUT_S=8
SECONDS_TO_END=60  # the watchdog's limit, the launchers' own delays, slow machines
CUT_AFTER_STEP=4

root="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(realpath -m "${1:-runs/two_hosts}")"
shift || true
hosts=(host-a host-b)
declare -A init_of=() # host -> process id of its first process
temporary=""          # folder with the hosts' own files
jobs=()               # of the latest run: background commands

cannot() {
    echo "two_hosts: cannot run here: $*" >&2
    exit "$CANNOT_RUN_HERE"
}

fail() {
    echo "two_hosts: $*" >&2
    exit 1
}

clean_up() {
    # With its first process all processes of a host end, and with them its namespaces, mounts and the cable.
    for pid in "${init_of[@]}"; do
        kill -KILL "$pid" 2>/dev/null || true
    done
    wait 2>/dev/null || true
    if [[ -n "$temporary" ]]; then
        rm -rf "$temporary"
    fi
}
trap clean_up EXIT
trap 'exit 1' INT TERM HUP

check_tools() {
    local missing=()
    for tool in ip:iproute2 ssh:openssh-client ssh-keygen:openssh-client pdsh:pdsh unshare:util-linux nsenter:util-linux; do
        command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
    done
    [[ -x /usr/sbin/sshd ]] || missing+=(openssh-server)
    ((${#missing[@]} == 0)) || cannot "Debian packages are missing: $(printf '%s\n' "${missing[@]}" | sort -u | xargs)"
    unshare --net --mount --uts --pid --fork true 2>/dev/null || cannot "namespaces are not allowed"
    unshare --net ip link add type veth 2>/dev/null || cannot "a veth pair is not allowed"
}

# start_host NAME: its first process is an sshd. Its /etc/hosts, /etc/ssh and /run are its own.
start_host() {
    local name="$1"
    # shellcheck disable=SC2016  # expanded by the inner shell
    unshare --net --mount --uts --pid --fork --mount-proc --kill-child bash -c '
        set -e
        echo "$1" > /proc/sys/kernel/hostname
        mount --bind "$2/hosts" /etc/hosts
        mount --bind "$2/ssh" /etc/ssh
        mount -t tmpfs tmpfs /run && mkdir /run/sshd
        ip link set lo up
        touch "$2/$1.ready"
        exec /usr/sbin/sshd -D -e
    ' - "$name" "$temporary" 2>"$temporary/$name.sshd" &
    wait_for "$name" test -e "$temporary/$name.ready"
    init_of[$name]="$(pgrep --parent $!)"
}

# wait_for WHAT COMMAND...: until the command succeeds
wait_for() {
    local what="$1"
    shift
    for ((i = 0; i < 600; i++)); do
        "$@" && return
        sleep 0.2
    done
    fail "waited too long for: $what"
}

# on NAME COMMAND...: carry out on a host
on() {
    local target="${init_of[$1]}"
    shift
    nsenter --target "$target" --net --mount --uts --pid -- "$@"
}

# reaches FROM ADDRESS: an sshd answers
reaches() {
    on "$1" ssh -o ConnectTimeout=2 "$2" true 2>/dev/null
}

make_hosts() {
    temporary="$(mktemp -d)"
    chmod 755 "$temporary"
    mkdir "$temporary/ssh"
    printf '127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n' >"$temporary/hosts"
    ssh-keygen -q -t ed25519 -N '' -f "$temporary/ssh/key"
    cp "$temporary/ssh/key" "$temporary/ssh/ssh_host_ed25519_key"
    cat >"$temporary/ssh/sshd_config" <<-END
		HostKey /etc/ssh/ssh_host_ed25519_key
		AuthorizedKeysFile /etc/ssh/key.pub
		StrictModes no
		PermitRootLogin prohibit-password
		UsePAM no
		PidFile none
	END
    # A cut cable ends an ssh session in seconds, and with it pdsh and deepspeed; ssh alone would wait for many minutes.
    cat >"$temporary/ssh/ssh_config" <<-END
		IdentityFile /etc/ssh/key
		StrictHostKeyChecking no
		UserKnownHostsFile /dev/null
		LogLevel ERROR
		ServerAliveInterval 3
		ServerAliveCountMax 3
	END
    start_host host-a
    start_host host-b
    ip link add name cable netns "${init_of[host-a]}" type veth peer name cable netns "${init_of[host-b]}"
    on host-a ip address add 10.77.0.1/24 dev cable
    on host-b ip address add 10.77.0.2/24 dev cable
    cable up
    wait_for "host-b to answer host-a" reaches host-a host-b
    wait_for "host-a to answer host-b" reaches host-b host-a
}

cable() {
    on host-a ip link set cable "$1"
    on host-b ip link set cable "$1"
}

# words NAME: the command line of every run, one word a line
words() {
    printf '%s\n' "$root/launcher/train.py" --config zero3_sft_ma \
        --set "train.output_dir=$folder/$1" --set train.max_steps=8 --set train.device=cpu --set train.cpu_threads=1 \
        --set train.micro_batch_size=4 --set train.global_batch_size=8 --set "train.stall_timeout_s=$STALL_TIMEOUT_S" \
        --set data.num_eval_samples=8 --set method.interval_steps=3 --set method.estimation_steps=2 \
        --set checkpoint.interval_steps=2 --set export.merged=false --set monitor.num_sample_prompts=0 \
        --set monitor.progress_bar=false
}

# start_run LAUNCHER NAME WORD...: in the background; output in $folder/<name>.<host>.log
start_run() {
    local launcher="$1" name="$2" port=$((29000 + RANDOM % 1000)) command rendezvous rank
    shift 2
    mapfile -t command < <(words "$name")
    command+=("$@")
    jobs=()
    if [[ "$launcher" == torchrun* ]]; then
        for rank in 0 1; do
            if [[ "$launcher" == torchrun_c10d ]]; then
                rendezvous=(--rdzv-backend c10d --rdzv-endpoint "host-a:$port" --rdzv-id "$name")
            else
                rendezvous=(--node-rank "$rank" --master-addr host-a --master-port "$port")
            fi
            on "${hosts[rank]}" torchrun --nnodes 2 --nproc-per-node 1 "${rendezvous[@]}" "${command[@]}" \
                >>"$folder/$name.${hosts[rank]}.log" 2>&1 &
            jobs+=($!)
        done
    else
        printf 'host-a slots=1\nhost-b slots=1\n' >"$folder/hostfile"
        # What is left of a rank's output when the way to it is cut lies in a file on its own host.
        on host-a env DS_ACCELERATOR=cpu deepspeed --hostfile "$folder/hostfile" --master_addr host-a \
            --master_port "$port" --enable_each_rank_log "$folder/$name.ranks" "${command[@]}" \
            >>"$folder/$name.host-a.log" 2>&1 &
        jobs+=($!)
    fi
}

has_done_step() {
    grep -qs "\"kind\": \"step\", \"step\": $2," "$folder/$1/metrics.jsonl"
}

# The launchers' command lines hold the name of the program too, but have a module before it.
no_rank_is_left() {
    for host in "${hosts[@]}"; do
        ! on "$host" pgrep -f '^[^ ]+ -u [^ ]*launcher/train.py' >/dev/null || return 1
    done
}

show() {
    grep -h -A3 '^error (rank' "$folder/$1".*.log "$folder/$1".ranks/*.log 2>/dev/null | grep '^error (rank' || true
}

finish() {
    local name="$1"
    for job in "${jobs[@]}"; do
        wait "$job" || { tail -n 40 "$folder/$name".*.log >&2; fail "$name has failed"; }
    done
    [[ -f "$folder/$name/adapter/adapter_model.safetensors" ]] || fail "$name has left no adapter"
}

cut_and_go_on() {
    local launcher="$1" name="$2" begin errors
    shift 2
    start_run "$launcher" "$name" "$@"
    wait_for "step $CUT_AFTER_STEP of $name" has_done_step "$name" "$CUT_AFTER_STEP"
    cable down
    begin="$SECONDS"
    echo "the cable is cut after step $CUT_AFTER_STEP"
    until no_rank_is_left; do
        ((SECONDS - begin < SECONDS_TO_END)) || fail "ranks are left $SECONDS_TO_END s after the cut"
        sleep 0.5
    done
    echo "both ranks have ended, $((SECONDS - begin)) s after the cut (train.stall_timeout_s $STALL_TIMEOUT_S):"
    show "$name"
    errors="$(show "$name")"
    grep -q '^error (rank 0): the run ends because rank 1 (pid [0-9]* on host-b) has not been heard of' <<<"$errors" ||
        fail "rank 0 has not named rank 1"
    grep -q '^error (rank 1): the run ends because rank 0 (pid [0-9]* on host-a) has not been heard of' <<<"$errors" ||
        fail "rank 1 has not named rank 0"
    for job in "${jobs[@]}"; do
        if wait "$job"; then
            fail "$launcher has ended with exit code 0 after the cut"
        fi
    done
    echo "$launcher has ended, $((SECONDS - begin)) s after the cut"
    cable up
    wait_for "host-b to answer host-a" reaches host-a host-b
    start_run "$launcher" "$name" "$@" --resume auto
    finish "$name"
    echo "mended and gone on to the end"
}

phase() {
    printf '\n== %s  [%d s so far]\n' "$1" "$SECONDS"
}

check_tools
[[ ! -e "$folder" ]] || fail "$folder exists; give another folder"
if ! python -c 'import deepspeed, sparse_ds' 2>/dev/null; then
    # shellcheck source=scripts/environment.sh
    source "$root/scripts/environment.sh"
fi
mkdir -p "$folder"
cd "$root"
make_hosts

phase "torchrun across host-a and host-b"
start_run torchrun_c10d whole "$@"
finish whole
echo "from the first step to the last"

phase "torchrun, the cable cut"
cut_and_go_on torchrun_static torchrun "$@"

phase "deepspeed --hostfile, the cable cut"
cut_and_go_on deepspeed deepspeed "$@"

phase "Adapters"
for name in torchrun deepspeed; do
    cmp "$folder/whole/adapter/adapter_model.safetensors" "$folder/$name/adapter/adapter_model.safetensors"
done
echo "two_hosts: all runs have ended with the same adapter, byte for byte"
