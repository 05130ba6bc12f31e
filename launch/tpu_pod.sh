#!/usr/bin/env bash
# Run gsm_verifier on a Cloud TPU slice of one or many hosts. See usage below.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTION...] [-- FLAG...]

  create    make the slice, or reuse the one of that name; a preempted one is made anew
  install   copy this checkout's last commit to all workers and install it; mount the work directory
  run       start `python -m gsm_verifier.main --distributed FLAG...` on all workers
  logs      follow the log of worker 0
  stop      end what `run` started, and wait until it has saved a checkpoint
  delete    delete the slice, with its disks
  up        create, stop, install, run; again after a preemption, until the run is finished

  --name=NAME, --zone=ZONE   the slice; [--project=PROJECT]: else gcloud's default
  --type=TYPE                accelerator type (default v5litepod-16: 16 chips, 4 hosts)
  --version=VERSION          runtime version (default v2-alpha-tpuv5-lite)
  --spot                     cheaper, and can be preempted at any time; `up` waits for capacity
  --nfs=HOST:/SHARE          mounted on all workers at /mnt/runs: for --workdir=/mnt/runs/<run>
  --repo=URL                 workers clone this instead of being sent a copy
  --poll=SECONDS             between two looks of `up` (default 60)
  --tries=N                  failed runs of `up` on a healthy slice before it gives up (default 3)
  --grace=SECONDS            that `stop` waits before it kills (default 300)
  --dry-run                  print every gcloud command instead of running it

FLAG... are those of gsm_verifier.main: --config and --workdir at least. The work directory must be
a folder that all workers see, by its absolute path and not in the checkout, which `install` makes
anew; or gs://<bucket>/<run>, for which nothing has to be mounted.
EOF
}

fail() {
    echo "tpu_pod.sh: $*" >&2
    exit 2
}

verb=${1:-}
case $verb in
    create | install | run | logs | stop | delete | up) shift ;;
    -h | --help | help) usage && exit 0 ;;
    '') usage >&2 && exit 2 ;;
    -*) fail "a command comes before $verb; see --help" ;;
    *) fail "unknown command $verb; see --help" ;;
esac

name='' zone='' project='' nfs='' repo='' spot='' dry_run=''
type=v5litepod-16 version=v2-alpha-tpuv5-lite poll=60 tries=3 grace=300
while (($#)); do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --nfs=*) nfs=${1#*=} ;;
        --repo=*) repo=${1#*=} ;;
        --poll=*) poll=${1#*=} ;;
        --tries=*) tries=${1#*=} ;;
        --grace=*) grace=${1#*=} ;;
        --spot) spot=1 ;;
        --dry-run) dry_run=1 ;;
        --) shift && break ;;
        --name | --zone | --project | --type | --version | --nfs | --repo | --poll | --tries | --grace)
            fail "use $1=${2:-VALUE}"
            ;;
        *) fail "unknown option $1; see --help" ;;
    esac
    shift
done
flags=("$@")
[[ -n $name && -n $zone ]] || fail "--name and --zone are needed"
config='' workdir=''
if [[ $verb == run || $verb == up ]]; then
    for flag in "${flags[@]}"; do
        case $flag in
            --config=*) config=${flag#*=} ;;
            --workdir=*) workdir=${flag#*=} ;;
        esac
    done
    [[ -n $config && -n $workdir ]] ||
        fail "give gsm_verifier.main's --config=... and --workdir=... after --"
    case $workdir in
        /* | gs://?*/?*) ;;
        *) fail "--workdir=$workdir: give /mnt/runs/<run>, or another absolute path, or gs://<bucket>/<run>" ;;
    esac
    # Types up to 8 are of one host, whether they count chips or cores. Many share what `install`
    # mounts; better told before the slice is paid for.
    if [[ $verb == up && $workdir == /* && $type =~ -([0-9]+)$ ]] && ((BASH_REMATCH[1] > 8)); then
        [[ -n $nfs && $workdir == /mnt/runs/?* ]] ||
            fail "--workdir=$workdir: not shared by the hosts of $type: give /mnt/runs/<run> with" \
                "--nfs=HOST:/SHARE, or gs://<bucket>/<run>"
    fi
fi

# Every gcloud command goes through here, and is shown.
call() {
    { printf '+ gcloud' && printf ' %q' "$@" && echo; } >&2
    [[ -n $dry_run ]] || gcloud "$@"
}

tpu() {
    local what=$1
    shift
    call compute tpus tpu-vm "$what" "$@" --zone="$zone" ${project:+--project="$project"} --quiet
}

# remote WORKER COMMAND
remote() {
    tpu ssh "$name" --worker="$1" --command="$2"
}

errors=$(mktemp) # what gcloud said last
trap 'rm "$errors"' EXIT

# READY, PREEMPTED ..., or ABSENT. What isn't known, such as a failing network, is an error.
state() {
    local found
    if found=$(tpu describe "$name" --format='value(state)' 2> "$errors"); then
        found=${found:-ABSENT} # as in a dry run
    elif grep -q NOT_FOUND "$errors"; then
        found=ABSENT
    else
        found=''
    fi
    cat "$errors" >&2
    [[ -n $found ]] && echo "$found"
}

make_slice() {
    tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot} 2>&1 |
        tee "$errors" >&2
}

# Did gcloud say what mends itself? Quota is RESOURCE_EXHAUSTED too, and stays so.
passes() {
    local said
    said=$(grep -v '^+ ' "$errors") || true
    [[ ! $said =~ [Qq]uota && $said =~ $PASSES ]]
}
PASSES='RESOURCE_EXHAUSTED|capacity|[Ss]tockout|STOCKOUT|[Pp]reempted|PREEMPTED'
PASSES+='|[Ii]nternal error|INTERNAL|[Uu]navailable|UNAVAILABLE'
PASSES+='|[Cc]onnection|[Tt]imed? ?out|[Dd]eadline|DEADLINE|[Mm]ax retries|Bad Gateway|unreachable'

create() {
    local now
    while true; do
        now=$(state) || return 1
        case $now in
            READY) return 0 ;;
            ABSENT)
                make_slice
                return
                ;;
            PREEMPTED | TERMINATED)
                tpu delete "$name" 2>&1 | tee "$errors" >&2 || return 1
                make_slice
                return
                ;;
            CREATING | STARTING | RESTARTING | REPAIRING | DELETING) sleep "$poll" ;;
            *)
                echo "tpu_pod.sh: $name is $now: start it, or delete it" >&2
                return 1
                ;;
        esac
    done
}

# In the home directory. The runtime's own Python is older than the 3.11 that is needed: uv brings one.
SETUP='python3 -m pip install --quiet --user uv
test -d venv || ~/.local/bin/uv venv --quiet --python=3.11 venv
~/.local/bin/uv pip install --quiet --python=venv/bin/python --editable "./gsm_verifier[tpu,gs]"'

# shellcheck disable=SC2016  # expands on the workers
CLONE='git init --quiet gsm_verifier
git -C gsm_verifier fetch --quiet --depth=1 "$REPO" "$COMMIT"
git -C gsm_verifier checkout --quiet --force --detach FETCH_HEAD'

# shellcheck disable=SC2016
MOUNT='command -v mount.nfs > /dev/null || sudo apt-get install --quiet --yes nfs-common
sudo mkdir -p /mnt/runs
mountpoint -q /mnt/runs || sudo mount -t nfs "$NFS" /mnt/runs
test -w /mnt/runs || sudo chmod a+rwx /mnt/runs'

install() {
    local here commit folder what
    here=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel) || return 1
    commit=$(git -C "$here" rev-parse HEAD) || return 1
    [[ -z $(git -C "$here" status --porcelain --untracked-files=no) ]] ||
        echo "tpu_pod.sh: changes that aren't committed stay here" >&2
    if [[ -n $repo ]]; then
        what=$(printf 'REPO=%q COMMIT=%q\n%s' "$repo" "$commit" "$CLONE")
    else
        # With its .git, so that results carry the commit that made them.
        folder=$(mktemp -d)
        git clone --quiet --depth=1 "file://$here" "$folder/gsm_verifier" &&
            tar -czf "$folder/gsm_verifier.tgz" -C "$folder" gsm_verifier &&
            tpu scp "$folder/gsm_verifier.tgz" "$name:gsm_verifier.tgz" --worker=all || return 1
        rm -rf "$folder"
        what='rm -rf gsm_verifier
tar -xzf gsm_verifier.tgz'
    fi
    [[ -z $nfs ]] || what=$(printf 'NFS=%q\n%s\n%s' "$nfs" "$MOUNT" "$what")
    remote all "set -eu
$what
$SETUP"
}

# `tell SIGNAL` is false once nothing is left of the run. That is asked of its group, as the signal
# ends the shell that leads it long before the run has saved; or of the process itself, where it has
# no group of its own yet.
# shellcheck disable=SC2016
TELL='pid=$(cat ~/run.pid 2> /dev/null)
tell() {
    test -n "$pid" && { kill -s "$1" -- "-$pid" || kill -s "$1" "$pid"; } 2> /dev/null
}'

# A run that hasn't ended holds the chips, and may be writing its checkpoint.
# shellcheck disable=SC2016
STOP='tell TERM
waited=0
while tell 0; do
    if test "$waited" -ge "$GRACE"; then
        echo "tpu_pod.sh: going on after $GRACE s: killed" >&2
        tell KILL
        break
    fi
    sleep 1
    waited=$((waited + 1))
done
rm -f ~/run.pid'

run() {
    local inner
    inner="$(printf '%q ' ../venv/bin/python -m gsm_verifier.main --distributed "${flags[@]}")"
    # The exit code is left in a file for `up`; a process group of its own lets `stop` end it all.
    inner="$inner; echo \$? > ~/run.exit"
    remote all "$TELL
set -eu
cd gsm_verifier
case $(printf %q "$workdir") in
    \"\$PWD\"/*)
        echo 'tpu_pod.sh: --workdir is in the checkout, which install deletes: give another' >&2
        exit 1
        ;;
esac
if tell 0; then
    echo 'a run is going on: stop it first' >&2
    exit 1
fi
rm -f ~/run.exit
nohup setsid bash -c $(printf %q "$inner") >> ~/run.log 2>&1 < /dev/null &
echo \$! > ~/run.pid"
}

logs() {
    remote 0 'tail -n 100 -F run.log'
}

stop() {
    remote all "$(printf 'GRACE=%q\n%s\n%s' "$grace" "$TELL" "$STOP")"
}

# Returns 0 when the run has finished, 1 when it failed, 3 when the slice is gone.
watch_run() {
    local now code
    while true; do
        [[ -n $dry_run ]] || sleep "$poll"
        now=$(state) || continue # look again: it says nothing about the slice
        [[ -n $dry_run || $now == READY ]] || return 3
        code=$(remote 0 'cat run.exit 2> /dev/null || echo running') || continue
        case $code in
            0 | '') return 0 ;;
            running) ;;
            *)
                # Losing one host fails the others before the slice is said to be preempted.
                sleep "$poll"
                now=$(state) && [[ $now != READY ]] && return 3
                remote 0 'tail -n 30 run.log' >&2 || true
                return 1
                ;;
        esac
    done
}

up() {
    local failed=0 code
    while true; do
        until create; do
            [[ -n $spot ]] && passes || return 1
            echo "tpu_pod.sh: no slice yet; trying again" >&2
            sleep "$poll"
        done
        code=0
        { stop && install && run && watch_run; } || code=$?
        case $code in
            0)
                echo "finished; the slice still costs: launch/tpu_pod.sh delete ..." >&2
                return 0
                ;;
            3) echo "tpu_pod.sh: $name was preempted; starting again" >&2 ;;
            *)
                failed=$((failed + 1))
                ((failed < tries)) || return 1
                echo "tpu_pod.sh: failed $failed time(s); the run resumes" >&2
                sleep "$poll"
                ;;
        esac
    done
}

case $verb in
    delete) tpu delete "$name" ;;
    *) "$verb" ;;
esac
