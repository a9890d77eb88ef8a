#!/usr/bin/env bash
# A real, throw-away Slurm of one node that listens on 127.0.0.1 alone; for tests. Debian or Ubuntu, root, no systemd needed.
#
#   slurm_cluster.sh up DIR [--install]    start it with its state in DIR; `. DIR/env.sh` lets sbatch and squeue find it
#   slurm_cluster.sh down DIR              cancel its jobs, stop what `up` started, and remove DIR
#
# Without --install, missing packages are an error. Exit code 75: it cannot be started here, and the last line says why.
# There is no accounting, so `sacct` fails, as on many a small cluster.
set -Eeuo pipefail
ACTION=${1:?up or down} DIR=${2:?folder} INSTALL=${3:-}
NODE=$(hostname -s) # srun and slurmctld compare it with the machine's own name
CPUS=16 MEMORY=8192 # claimed, and need not be there
export SLURM_CONF=$DIR/etc/slurm.conf

recorded() { # the process that we recorded, if it is still one that names our folder
  local pid
  pid=$(cat "$DIR/run/$1.pid" 2>/dev/null) && [ -n "$pid" ] && [ -r "/proc/$pid/cmdline" ] &&
    tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF -- "$DIR" && echo "$pid"
}

stop() {
  local pid
  pid=$(recorded "$1") || return 0
  kill -TERM "$pid" 2>/dev/null || return 0
  for _ in $(seq 50); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null || true
}

down() {
  [ -d "$DIR" ] || return 0
  local ids=''
  if recorded slurmctld >/dev/null && recorded slurmd >/dev/null; then
    ids=$(timeout 10 squeue -h -o %A 2>/dev/null | sort -u || true)
    # shellcheck disable=SC2086
    [ -z "$ids" ] || timeout 10 scancel $ids 2>/dev/null || true
    for _ in $(seq 75); do
      [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break
      sleep 0.2
    done
  fi
  for name in slurmd slurmctld munged; do stop $name; done
  for process in /proc/[0-9]*; do # a job's step, and what it started, outlive the daemons
    local environment command
    environment=$(tr '\0' '\n' 2>/dev/null <"$process/environ" || true)
    command=$(tr '\0' ' ' 2>/dev/null <"$process/cmdline" || true)
    if [[ $environment == *"SLURM_CONF=$SLURM_CONF"* && $environment == *SLURM_JOB_ID=* ]]; then
      kill -KILL "${process#/proc/}" 2>/dev/null || true
    fi
    for id in $ids; do
      [[ $command != "slurmstepd: [$id."* ]] || kill -KILL "${process#/proc/}" 2>/dev/null || true
    done
  done
  if grep -q '# truthsteer-test$' /etc/hosts 2>/dev/null; then # in place: containers bind-mount it
    local kept
    kept=$(grep -v '# truthsteer-test$' /etc/hosts || true)
    printf '%s\n' "$kept" >/etc/hosts
  fi
  rm -rf "$DIR"
}

cannot() {
  trap - ERR
  for log in "$DIR"/log/*; do [ ! -s "$log" ] || { echo "-- $log"; tail -n 5 "$log"; }; done >&2
  down || true
  echo "$*" >&2
  exit 75
}

until_ok() { # SECONDS NAME COMMAND: poll, and give up at once if the daemon has died
  local left=$(($1 * 5)) name=$2
  shift 2
  while ! "$@" >/dev/null 2>&1; do
    left=$((left - 1))
    [ $left -gt 0 ] || cannot "$name did not come up in time"
    kill -0 "$(cat "$DIR/run/$name.pid")" 2>/dev/null || cannot "$name died while starting"
    sleep 0.2
  done
}

[ "$ACTION" != down ] || { down; exit 0; }
trap 'cannot "line $LINENO failed: $BASH_COMMAND"' ERR

# Packages
[ "$(id -u)" = 0 ] || cannot "a Slurm for tests needs root: munged and slurmd start as other users"
missing=()
for pair in munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client; do
  command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
  [ "$INSTALL" = --install ] || cannot "not installed: ${missing[*]}"
  command -v apt-get >/dev/null || cannot "not installed, and there is no apt-get: ${missing[*]}"
  policy=/usr/sbin/policy-rc.d made= # the packages must not start services of their own
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && made=yes; }
  mkdir -p "$DIR/log"
  DEBIAN_FRONTEND=noninteractive
  export DEBIAN_FRONTEND
  { timeout 120 apt-get update && timeout 180 apt-get install -y --no-install-recommends "${missing[@]}"; } \
    >"$DIR/log/apt" 2>&1 || { [ -z "$made" ] || rm -f $policy; cannot "apt-get cannot install ${missing[*]}"; }
  [ -z "$made" ] || rm -f $policy
fi

# Configuration
free() { for port in "$1" $(($1 + 1)); do ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || return 1; done; }
for PORT in 31817 32817 33817 ''; do
  [ -n "$PORT" ] || cannot "ports 31817, 32817 and 33817 are taken"
  ! free "$PORT" || break
done
umask 022
mkdir -p "$DIR"/{etc,run,state,spool,log,munge/log}
(umask 077 && head -c 128 /dev/urandom >"$DIR/munge/key")
chown -R munge:munge "$DIR/munge"
chmod 700 "$DIR/munge/log" "$DIR/state"
chmod 400 "$DIR/munge/key"
if [ "$(getent ahostsv4 "$(hostname)" | awk 'NR==1{print $1}')" != 127.0.0.1 ]; then # what Slurm's programs listen on
  { printf '127.0.0.1 %s %s # truthsteer-test\n' "$(hostname)" "$NODE"; cat /etc/hosts 2>/dev/null || true; } >"$DIR/hosts"
  cat "$DIR/hosts" >/etc/hosts
fi
for number in 0 1 2 3; do ln -sfn /dev/null "$DIR/etc/gpu$number"; done # slurmd wants a character device
printf 'NodeName=%s Name=gpu File=%s/etc/gpu[0-3]\nAutoDetect=off\n' "$NODE" "$DIR" >"$DIR/etc/gres.conf"
echo CgroupPlugin=cgroup/v1 >"$DIR/etc/cgroup.conf" # touches nothing until something asks for a cgroup
# cred_expire is also how long a queued-again job waits; it must be above KillWait, or the new copy meets the old one.
# Job ids begin at the clock, since files of a job are named by its id alone.
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$NODE(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
SrunPortRange=$((PORT + 100))-$((PORT + 400))
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/munge/socket,cred_expire=8
SlurmctldPidFile=$DIR/run/slurmctld.own
SlurmdPidFile=$DIR/run/slurmd.own
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=256
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1
KillWait=3
CompleteWait=0
FirstJobId=$(($(date +%s) % 60000000 + 1000))
JobRequeue=1
NodeName=$NODE NodeHostname=$NODE NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=$MEMORY Gres=gpu:4 State=UNKNOWN
PartitionName=test Default=YES Nodes=$NODE State=UP DefaultTime=5 MaxTime=60 DisableRootJobs=NO
CONF
printf 'export SLURM_CONF=%s MUNGE_SOCKET=%s/munge/socket\n' "$SLURM_CONF" "$DIR" >"$DIR/env.sh"

# Daemons: each in a session of its own and with its output in a file, so that nobody waits for an open pipe
setsid setpriv --reuid=munge --regid=munge --init-groups munged --foreground --key-file="$DIR/munge/key" \
  --socket="$DIR/munge/socket" --pid-file="$DIR/munge/pid" --log-file="$DIR/munge/log/munged" --seed-file="$DIR/munge/seed" \
  --num-threads=2 >"$DIR/log/munged" 2>&1 </dev/null &
echo $! >"$DIR/run/munged.pid"
until_ok 15 munged munge -n -S "$DIR/munge/socket"
setsid slurmctld -D -c -f "$SLURM_CONF" >"$DIR/log/slurmctld" 2>&1 </dev/null &
echo $! >"$DIR/run/slurmctld.pid"
until_ok 20 slurmctld sh -c 'scontrol ping | grep -q "is UP"'
setsid slurmd -D -c -f "$SLURM_CONF" -N "$NODE" >"$DIR/log/slurmd" 2>&1 </dev/null &
echo $! >"$DIR/run/slurmd.pid"
until_ok 60 slurmd sh -c '[ "$(sinfo -h -o %t)" = idle ]'
trap - ERR
echo "up: $DIR"
