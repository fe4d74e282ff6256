#!/usr/bin/env bash
# A real SLURM cluster on this machine, for tests: slurmctld and one slurmd per node, nothing simulated.
#
#   cluster.sh up DIR [--nodes N] [--cpus N] [--mode loop|netns] [--port P]   start, or bring back what died; a second call changes nothing
#   cluster.sh env DIR                   print `export SLURM_CONF=...` for the shell that will call sbatch
#   cluster.sh on DIR HOST COMMAND...    run a command inside node h1, h2, ... (h0 is the controller's host)
#   cluster.sh ssh DIR                   netns mode: an sshd in every node, for `deepspeed --hostfile` (pdsh)
#   cluster.sh link DIR HOST down|up     netns mode: pull the network cable of a node, or plug it in
#   cluster.sh kill DIR HOST             netns mode: power cut
#   cluster.sh down DIR                  stop everything; DIR keeps the logs
#
# loop:  all nodes share this host and listen on 127.0.0.1; needs no root. Node names do not resolve: set MASTER_ADDR=127.0.0.1.
# netns: each node has its own network, hostname, processes, IPC and /dev/shm; needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN).
set -euo pipefail

subnet=${CLUSTER_SUBNET:-10.77.0} # netns mode: bridge .1, controller .10, node i .1i
link=${CLUSTER_LINK:-mk}          # netns mode: prefix of the bridge, the cables and the namespaces

die() { printf 'cluster.sh: %s\n' "$1" >&2; exit 1; }

running() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; } # PIDFILE, of this machine's process table

retry() { # SECONDS COMMAND...: until it succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.1
  done
}

on_host() { # HOST COMMAND...: in loop mode all hosts are this one
  local host=$1
  shift
  if [ "$mode" = loop ]; then
    "$@"
  else
    running "$dir/run/$host.init" || { echo "cluster.sh: host $host is not up" >&2; return 1; }
    nsenter -t "$(cat "$dir/run/$host.init")" --net --uts --ipc --pid --mount --wd="$PWD" "$@"
  fi
}

daemon_runs() { # HOST PIDFILE: daemons write the pid that they have inside their host
  [ -s "$2" ] && on_host "$1" kill -0 "$(cat "$2")" 2>/dev/null
}

address() { printf '%s.%d' "$subnet" $((10 + ${1#h})); }

# --- hosts (netns mode) -------------------------------------------------------------------------------------------------------------

make_bridge() {
  ip link show "${link}br" >/dev/null 2>&1 && return
  ip link add "${link}br" type bridge
  ip addr add "$subnet.1/24" dev "${link}br"
  ip link set "${link}br" up
}

make_network() { # HOST: a namespace with eth0, whose other end hangs on the bridge
  local space="$link${1#h}" cable="${link}v${1#h}"
  ip netns list | grep -qw "$space" || ip netns add "$space"
  if ! ip link show "$cable" >/dev/null 2>&1; then
    ip link add "$cable" type veth peer name eth0 netns "$space"
    ip -n "$space" addr add "$(address "$1")/24" dev eth0
  fi
  ip link set "$cable" master "${link}br" up
  ip -n "$space" link set lo up
  ip -n "$space" link set eth0 up
}

boot_host() { # HOST: its first process only waits; when it dies the kernel ends everything in the host
  local host=$1 shim
  running "$dir/run/$host.init" && return
  rm -f "$dir/run/$host".* "$dir/run/slurmd.$host.pid"
  [ "$host" != h0 ] || rm -f "$dir/run/slurmctld.pid"
  make_network "$host"
  # shellcheck disable=SC2016
  nsenter --net="/run/netns/$link${host#h}" unshare --uts --ipc --pid --mount --fork --kill-child --mount-proc bash -c '
    hostname "$1" && mount -t tmpfs -o size=1g tmpfs /dev/shm && mount --bind "$2/hosts" /etc/hosts && touch "$2/run/$1.ready"
    while :; do sleep 3600 & wait $!; done' boot "$host" "$dir" </dev/null >"$dir/log/$host.log" 2>&1 &
  shim=$!
  retry 10 test -e "$dir/run/$host.ready" || die "host $host did not start, see $dir/log/$host.log"
  pgrep -P "$shim" >"$dir/run/$host.init"
}

boot_hosts() {
  local i
  [ "$(id -u)" = 0 ] || die "netns mode needs root; use --mode loop"
  { echo "127.0.0.1 localhost"; for ((i = 0; i <= nodes; i++)); do echo "$(address "h$i") h$i"; done; } >"$dir/hosts"
  make_bridge
  for ((i = 0; i <= nodes; i++)); do boot_host "h$i"; done
}

# --- SLURM --------------------------------------------------------------------------------------------------------------------------

write_configuration() {
  local i me user controller
  me=$(hostname -s) user=$(id -un)
  controller="$me(127.0.0.1)"
  [ "$mode" = loop ] || controller="h0($(address h0))"
  {
    cat <<CONF
ClusterName=mini
SlurmctldHost=$controller
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: 5 s, not 120.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Believe CPUs= below, so that a small machine can hold many nodes.
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdTimeout=30
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
CONF
    # A host name on 127.x: listen on loopback only, or the daemons do not find each other.
    if [ "$mode" = loop ] && getent hosts "$me" | grep -q '^127\.'; then echo "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny"; fi
    for ((i = 1; i <= nodes; i++)); do
      if [ "$mode" = loop ]; then echo -n "NodeName=h$i NodeHostname=$me NodeAddr=127.0.0.1 Port=$((port + i)) "
      else echo -n "NodeName=h$i NodeAddr=$(address "h$i") Port=$((port + 1)) "; fi
      echo "CPUs=$cpus SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=2000 State=UNKNOWN"
    done
    echo "PartitionName=debug Nodes=ALL Default=YES MaxTime=30 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30"
    echo "PartitionName=high Nodes=ALL MaxTime=30 PriorityTier=10 PreemptMode=OFF"
  } >"$dir/slurm.conf"
}

start_munge() {
  [ -s "$dir/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
  running "$dir/run/munged.pid" && return
  # --force: DIR may lie below a private folder; then only its owner can use this cluster.
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" --num-threads=2
}

start_slurm() {
  local i
  daemon_runs h0 "$dir/run/slurmctld.pid" || on_host h0 slurmctld -f "$dir/slurm.conf"
  for ((i = 1; i <= nodes; i++)); do
    mkdir -p "$dir/spool/h$i"
    daemon_runs "h$i" "$dir/run/slurmd.h$i.pid" || on_host "h$i" slurmd -N "h$i" -f "$dir/slurm.conf"
  done
}

nodes_answer() {
  [ "$(timeout 2 sinfo --noheader --Node --partition debug --states idle,mix,alloc --format %N 2>/dev/null | sort -u | wc -l)" = "$nodes" ]
}

# --- commands -----------------------------------------------------------------------------------------------------------------------

up() {
  nodes=2 cpus=2 mode=loop port=17000
  while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || die "$1 needs a value"
    case $1 in
      --nodes) nodes=$2 ;; --cpus) cpus=$2 ;; --mode) mode=$2 ;; --port) port=$2 ;;
      *) die "unknown option $1; see the head of this file" ;;
    esac
    shift 2
  done
  case $mode in loop | netns) ;; *) die "--mode $mode: choose loop or netns" ;; esac
  command -v slurmctld slurmd munged >/dev/null || die "slurmctld, slurmd or munged is missing: run $(dirname "$0")/install.sh"
  mkdir -p "$dir"/{munge,state,run,log,spool}
  printf 'nodes=%s cpus=%s mode=%s port=%s\n' "$nodes" "$cpus" "$mode" "$port" >"$dir/shape"
  [ "$mode" = loop ] || boot_hosts
  write_configuration
  start_munge
  start_slurm
  retry 20 nodes_answer || { tail -n 20 "$dir"/log/*.log >&2; die "the nodes did not come up within 20 s"; }
}

ssh_up() {
  local i keys="$dir/ssh"
  [ "$mode" = netns ] || die "ssh needs --mode netns"
  mkdir -p "$keys" ~/.ssh /run/sshd && chmod 700 "$keys"
  if [ ! -s "$keys/host" ]; then
    ssh-keygen -qt ed25519 -N '' -f "$keys/host"
    ssh-keygen -qt ed25519 -N '' -f "$keys/id_ed25519"
    cp "$keys/id_ed25519.pub" "$keys/authorized_keys"
    printf '%s\n' 'Host *' 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' 'LogLevel ERROR' \
      'ServerAliveInterval 5' 'ServerAliveCountMax 2' >"$keys/config"
    chmod 600 "$keys"/*
  fi
  for ((i = 1; i <= nodes; i++)); do
    daemon_runs "h$i" "$dir/run/h$i.sshd" && continue
    on_host "h$i" mount --bind "$keys" ~/.ssh # the user's own keys stay out of sight and untouched
    on_host "h$i" "$(command -v sshd || echo /usr/sbin/sshd)" -f /dev/null -E "$dir/log/sshd.h$i.log" -o "ListenAddress=$(address "h$i")" \
      -o "HostKey=$keys/host" -o "PidFile=$dir/run/h$i.sshd" -o StrictModes=no -o UsePAM=no -o "AuthorizedKeysFile=$keys/authorized_keys"
  done
}

stop_daemon() { # PIDFILE
  running "$1" || return 0
  local pid
  pid=$(cat "$1")
  kill "$pid" && retry 10 not_running "$pid" || kill -9 "$pid" 2>/dev/null || true
}

not_running() { ! kill -0 "$1" 2>/dev/null; }

down() {
  local file i
  if daemon_runs h0 "$dir/run/slurmctld.pid"; then timeout 5 scancel --full --me 2>/dev/null || true; fi
  if [ "$mode" = netns ]; then
    for file in "$dir"/run/h*.init; do if running "$file"; then kill -9 "$(cat "$file")"; fi; done
    for ((i = 0; i <= nodes; i++)); do
      ip link del "${link}v$i" 2>/dev/null || true
      ip netns del "$link$i" 2>/dev/null || true
    done
    ip link del "${link}br" 2>/dev/null || true
  else
    for file in "$dir"/run/slurmd.*.pid "$dir/run/slurmctld.pid"; do stop_daemon "$file"; done
  fi
  stop_daemon "$dir/run/munged.pid"
  rm -f "$dir"/run/*
}

[ $# -ge 2 ] || die "usage: cluster.sh up|env|on|ssh|link|kill|down DIR ...; see the head of this file"
verb=$1
[ "$verb" = up ] && mkdir -p "$2"
dir=$(cd "$2" && pwd -P)
shift 2
export SLURM_CONF="$dir/slurm.conf"
if [ "$verb" != up ]; then
  [ -s "$dir/shape" ] || die "no cluster in $dir; start one with: cluster.sh up $dir"
  # shellcheck disable=SC1091
  . "$dir/shape"
fi
case $verb in
  up) up "$@" ;;
  env) printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" ;;
  on) on_host "$@" ;;
  ssh) ssh_up ;;
  link) ip link set "${link}v${1#h}" "$2" ;;
  kill) kill -9 "$(cat "$dir/run/$1.init")" ;;
  down) down ;;
  *) die "unknown command $verb; see the head of this file" ;;
esac
