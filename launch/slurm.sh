#!/usr/bin/env bash
#SBATCH --job-name=gsm_verifier
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
#
# One task per GPU: on Slurm, JAX gives each task the GPU of its local number. All GPUs of a node
# must be visible to all its tasks for that, so don't ask for --gpus-per-task. After a preemption or
# a lost node the job is queued again (--requeue), and the run goes on where it was. Before its time
# limit all tasks get SIGTERM (--signal), early enough to save a checkpoint: Slurm by itself leaves
# them 30 seconds. Such a job isn't queued again.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: [NAME=VALUE...] sbatch [SBATCH OPTION...] launch/slurm.sh FLAG...

from the checkout, which all nodes must see. FLAG... are those of gsm_verifier.main: --config and
--workdir at least; the work directory must be a folder that all nodes see, or gs://<bucket>/<run>.

  MODULES="cuda python"   modules to load
  VENV=DIR                virtual environment to use (default: .venv, if it exists)
  CONTAINER=IMAGE         run in a container: by apptainer if IMAGE ends in .sif, else by pyxis;
                          VENV, if given, is one of the container's
EOF
}

fail() {
    echo "slurm.sh: $*" >&2
    exit 2
}

case ${1:-} in
    -h | --help) usage && exit 0 ;;
    --*) ;;
    *) usage >&2 && exit 2 ;;
esac
[[ " $*" == *" --config="[![:space:]]* && " $*" == *" --workdir="[![:space:]]* ]] ||
    fail "give gsm_verifier.main's --config=... and --workdir=..."
[[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job: submit it by sbatch; see --help"
cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this script, elsewhere

if [[ -n ${MODULES:-} ]]; then
    read -ra modules <<< "$MODULES"
    module load "${modules[@]}"
fi
python=${VENV:-.venv}/bin/python
if [[ -z ${CONTAINER:-} && ! -x $python ]]; then
    [[ -z ${VENV:-} ]] || fail "VENV=$VENV: there is no $python"
    python=python
fi

step=(srun --kill-on-bad-exit=1)
inside=()
case ${CONTAINER:-} in
    '') ;;
    *.sif) inside=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" "$CONTAINER") ;;
    *) step+=(--container-image="$CONTAINER" --container-mounts="$PWD:$PWD" --container-workdir="$PWD") ;;
esac
[[ -z ${CONTAINER:-} || -n ${VENV:-} ]] || python=python # the container's own

exec "${step[@]}" "${inside[@]}" "$python" -m gsm_verifier.main --distributed "$@"
