#!/usr/bin/env bash
# Installs what the cluster tests need (SLURM, munge, ssh, pdsh, iproute2) on Debian or Ubuntu. Starts no service; a second call is quick.
# Exit 0: everything is there. Exit 1: something is missing, one line says what.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2 procps util-linux shellcheck)
policy=/usr/sbin/policy-rc.d

say() { printf 'install.sh: %s\n' "$1"; }

missing() { # packages that dpkg does not know as installed
  local package
  for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || printf '%s\n' "$package"
  done
}

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then say "no apt-get here: install SLURM, munge, pdsh and sshd yourself"; exit 1; fi
mapfile -t wanted < <(missing)
if [ "${#wanted[@]}" = 0 ]; then say "everything is installed"; exit 0; fi
if [ "$(id -u)" != 0 ]; then say "not root: cannot install ${wanted[*]}"; exit 1; fi

if [ ! -e "$policy" ]; then # 101 forbids package scripts to start daemons
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! timeout 300 apt-get update -q >"$log" 2>&1; then say "apt-get update failed or took over 300 s: $(tail -n 1 "$log")"; exit 1; fi
if ! timeout 600 apt-get install -yq --no-install-recommends "${wanted[@]}" >"$log" 2>&1; then
  say "apt-get install failed or took over 600 s: $(tail -n 1 "$log")"
  exit 1
fi
rm -f "$log"
say "installed ${wanted[*]}"
