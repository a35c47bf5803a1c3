#!/bin/bash
# Cancels the jobs of a lab, full lab or twin started under DIR and stops its daemons, each by the pid it recorded.
# Usage: lab-down.sh DIR [--purge]   --purge also removes everything the boot scripts made under DIR.
set -uo pipefail
dir=$(cd "${1:?usage: lab-down.sh DIR [--purge]}" && pwd) || exit 2
export SLURM_CONF=$dir/etc/slurm.conf
# Refuse any directory that a boot script did not make.
grep -qxF "StateSaveLocation=$dir/state" "$SLURM_CONF" 2>/dev/null || { echo "$dir holds no lab or twin" >&2; exit 2; }
if compgen -G "$dir/run/slurmd-*.pid" > /dev/null; then
  if [ -n "$(timeout 10 squeue -h -o %i 2>/dev/null)" ]; then
    timeout 10 scancel --user="$(id -un)" 2>/dev/null
    sleep 1
  fi
fi
rc=0
stop_pid() {  # PIDFILE COMMAND: signal only a live process that is what the file says it is
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ]; then
    kill "$pid"
    for _ in $(seq 100); do [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] || break; sleep .1; done
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ]; then
      echo "$2 (pid $pid) is still running" >&2; rc=1; return
    fi
  fi
  rm -f "$1"
}
# All daemons get the signal first and are waited for after: they need seconds each to go.
for f in "$dir"/run/slurmd-*.pid "$dir/run/slurmctld.pid"; do
  pid=$(cat "$f" 2>/dev/null) || continue
  case $(cat "/proc/$pid/comm" 2>/dev/null) in slurmd|slurmctld) kill "$pid";; esac
done
for f in "$dir"/run/slurmd-*.pid; do [ -e "$f" ] && stop_pid "$f" slurmd; done
stop_pid "$dir/run/slurmctld.pid" slurmctld
for d in slurmdbd mariadbd munged; do # only the full lab has these
  [ -e "$dir/run/$d.pid" ] && stop_pid "$dir/run/$d.pid" "$d"
done
[ "$rc" = 0 ] && [ "${2:-}" = --purge ] && rm -rf "${dir:?}"/{state,spool,run,log,etc,db,munge,probe.sh}
exit $rc
