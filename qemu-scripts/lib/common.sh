# shellcheck shell=bash disable=SC2034
# What the scripts in this folder share: messages, Debian packages, a private apt, locks and atomic publishing.
# Sourced, never run. Everything that is kept lies in one cache folder; a script sets up what it needs in a
# staging folder beside it and renames it into place, so an interrupted run leaves nothing half-made.

set -euo pipefail

program=${0##*/}
scripts=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
repo=$(dirname -- "$scripts")
export VMMBLK_CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/vmmblk"
cache=$VMMBLK_CACHE
staging=

say() { printf '%s: %s\n' "$program" "$*" >&2; }
die() { printf '%s: %s\n' "$program" "$*" >&2; exit 2; }

# usage: prints the comment at the head of the calling script, for --help.
usage() { sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; }

cleanup() { [[ -z $staging ]] || rm -rf -- "$staging"; }

# lock NAME: one run at a time; a second one waits, then finds the work done. The lock ends with the process.
lock() {
    mkdir -p "$cache" 2>/dev/null || die "cannot create $cache: set XDG_CACHE_HOME to a folder you can write to"
    exec {lock_fd}>"$cache/.lock-$1"
    flock -n "$lock_fd" || { say "another run is at it; waiting for it to end"; flock "$lock_fd"; }
}

# fresh TARGET KEY: true when TARGET was published with this KEY.
fresh() { [[ -f $1/.stamp && $(<"$1/.stamp") == "$2" ]]; }

# stage: a new folder in $staging, removed when the script ends unless it was published. Leftovers of runs that
# were killed go too (the lock of this script is held).
stage() {
    rm -rf -- "$cache/.staging-$program".*
    staging=$(mktemp -d "$cache/.staging-$program.XXXXXX")
    chmod 755 "$staging" # mktemp's 0700 would keep other users of a shared cache out
    trap cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# publish FOLDER TARGET KEY: puts FOLDER (inside $staging) at TARGET, in place of what was there.
publish() {
    printf '%s\n' "$3" >"$1/.stamp"
    [[ ! -e $2 ]] || mv -T -- "$2" "$staging/.old-${2##*/}"
    mv -T -- "$1" "$2"
}

# quietly COMMAND...: shows the command's output only when it fails.
quietly() {
    local log=$staging/log status=0
    "$@" >"$log" 2>&1 || status=$?
    if ((status)); then
        cat -- "$log" >&2
        die "$1 failed; its output is above"
    fi
}

on_debian() {
    [[ -r /usr/share/keyrings/debian-archive-keyring.gpg ]] || die "this needs Debian 12 or 13 (apt-get and the package debian-archive-keyring)"
}

# need PACKAGE...: installs the Debian packages that are missing, after listing them.
need() {
    local package missing=() root=()
    for package; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    on_debian
    say "Debian packages to install: ${missing[*]}"
    if ((EUID)); then
        command -v sudo >/dev/null || die "not root and no sudo: have root run: apt-get install ${missing[*]}"
        root=(sudo)
    fi
    if ! "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1; then
        # The usual cause is lists that are missing or old.
        "${root[@]}" apt-get update -qq >&2
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null ||
            die "apt-get could not install: ${missing[*]}"
    fi
}

# debian_archive: the address of the Debian archive that this machine itself uses, from its own apt sources. Whose
# archive it is stands in the machine's package lists; where there are none yet, Debian's is the one that has the
# updates of a release beside the release, or else the first.
debian_archive() {
    local archive
    archive=$(apt-get indextargets --format "\$(REPO_URI)|\$(ORIGIN)|\$(RELEASE)|\$(COMPONENT)" |
        awk -F'|' '$4 == "main" && $3 !~ /security/ && $2 == "Debian" { print $1; exit }')
    [[ -n $archive ]] || archive=$(apt-get update --print-uris |
        sed -n "s|^'\(.*\)/dists/\([^/]*\)/InRelease'.*|\1 \2|p" |
        awk '$2 ~ /security/ { next } $2 ~ /-updates$/ { print $1; found = 1; exit } !first { first = $1 }
             END { if (!found && first) print first }')
    echo "$archive"
}

# private_apt NAME TYPE SUITE...: sets the array apt to an apt-get with sources, lists and package status of its
# own (TYPE deb or deb-src): no root, nothing of the host's touched, everything authenticated by Debian's keys. The
# empty status makes it resolve whole dependency trees. Call it with $staging made.
private_apt() {
    local folder=$cache/apt/$1 type=$2 archive suite
    shift 2
    on_debian
    archive=$(debian_archive)
    [[ -n $archive ]] || die "no Debian archive in this machine's apt sources: add one for 'main' and try again"
    mkdir -p "$folder"/{state/lists/partial,cache/archives/partial}
    # Scripts that run at the same time share the lists; apt itself would fail rather than wait. What an earlier call
    # holds is let go.
    [[ -z ${apt_lock_fd:-} ]] || exec {apt_lock_fd}>&-
    exec {apt_lock_fd}>"$folder/lock"
    flock "$apt_lock_fd"
    : >"$folder/status"
    for suite; do
        echo "$type [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive $suite main"
    done >"$folder/sources.list"
    # -c is read after the host's own configuration, whose proxies hold while its hooks and pins must not.
    cat >"$folder/apt.conf" <<CONF
Dir::State "$folder/state";
Dir::State::status "$folder/status";
Dir::Cache "$folder/cache";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "$folder/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
#clear APT::Default-Release;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Post-Invoke;
CONF
    apt=(apt-get -c "$folder/apt.conf" -qq)
    [[ ! -t 2 ]] || apt=(apt-get -c "$folder/apt.conf" -q)
    # Lists younger than an hour will do.
    if [[ -z $(find "$folder/updated" -mmin -60 2>/dev/null) ]]; then
        say "reading Debian's package lists ($*)"
        "${apt[@]}" update >&2 || die "cannot read Debian's package lists: is the network there?"
        touch "$folder/updated"
    fi
}

# extract_packages TARGET [-t SUITE] PACKAGE...: downloads packages with all they depend on and unpacks them into
# TARGET. Needs private_apt first.
extract_packages() {
    local target=$1 archives=$staging/archives package count=0
    shift
    mkdir -p "$archives/partial" "$target"
    "${apt[@]}" -o "Dir::Cache::archives=$archives" install -y --download-only "$@" >&2 ||
        die "cannot download Debian packages: is the network there?"
    for package in "$archives"/*.deb; do
        dpkg-deb -x "$package" "$target"
        count=$((count + 1))
    done
    say "unpacked $count Debian packages"
    rm -rf -- "$archives"
}

on_x86_64() { [[ $(uname -m) == x86_64 ]] || die "this needs an x86-64 machine, not $(uname -m)"; }

# python_environment EXTRA: makes .venv with vmmblk installed in it as an editable package, with the extra packages
# named EXTRA ("" for none), and its extension modules built. Does nothing when nothing it is made of has changed.
python_environment() {
    local extra=$1 venv=$repo/.venv python=/usr/bin/python3 key log=$cache/install.log
    need python3 python3-venv python3-dev gcc libc6-dev liburing-dev
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "this needs Python 3.11 or newer"
    lock venv
    key=$(cat -- "$cache/libvfio-user/.stamp" "$repo"/{pyproject.toml,cffi_build.py} "$repo"/vmmblk/csrc/* |
        sha256sum | cut -d' ' -f1)
    key="$key $repo $("$python" --version) with"
    if ! fresh "$venv" "$key $extra" && ! { [[ -z $extra ]] && fresh "$venv" "$key test"; }; then
        say "installing vmmblk into $venv"
        # A Python that was upgraded, or a run that was interrupted, leaves one that does not work.
        "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
        "$venv/bin/python" -m pip install -q --disable-pip-version-check -e "$repo${extra:+[$extra]}" >"$log" 2>&1 || {
            cat -- "$log" >&2
            die "pip could not install vmmblk; its output is above"
        }
        printf '%s\n' "$key $extra" >"$venv/.stamp"
    fi
    flock -u "$lock_fd"
}
