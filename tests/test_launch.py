"""launch/: scripts run against stand-ins of the programs they call, files parsed, commands checked.

The stand-in of gcloud runs what is sent to the workers in a folder that plays their home.
"""

import ast
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from gsm_verifier import plan
from gsm_verifier.config import default, leaves, validate

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCH = REPOSITORY / "launch"
MAIN_FLAGS = ["--config=configs/gsm8k.py:tiny", "--workdir=/mnt/runs/a b"]
SLICE = ["--name=gsm", "--zone=z"]
NFS = "--nfs=10.0.0.2:/share"

# Options of what is called or quoted here, by the programs' manuals; "=" is before a value. What
# else is to be used has to be looked up there first.
WIDE = "--zone= --project= --quiet --format="  # cloud.google.com/sdk/gcloud/reference
ACCEPTED = {
    # cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm
    "gcloud compute tpus tpu-vm create": f"--accelerator-type= --version= --spot {WIDE}",
    "gcloud compute tpus tpu-vm describe": WIDE,
    "gcloud compute tpus tpu-vm delete": WIDE,
    "gcloud compute tpus tpu-vm scp": f"--worker= {WIDE}",
    "gcloud compute tpus tpu-vm ssh": f"--worker= --command= {WIDE}",
    # kubernetes.io/docs/reference/kubectl/generated
    "kubectl apply": "-f=",
    "kubectl logs": "--follow --selector= --prefix",
    "kubectl delete": "",
    # docs.skypilot.co/en/stable/reference/cli.html
    "sky launch": "--cluster= --env=",
    "sky jobs launch": "--name= --env=",
    "sky logs": "",
    "sky down": "",
    # slurm.schedmd.com/sbatch.html, slurm.schedmd.com/srun.html, github.com/NVIDIA/pyxis
    "sbatch": "--job-name= --nodes= --gpus-per-node= --ntasks-per-node= --cpus-per-task= --time= "
    "--output= --open-mode= --requeue --signal= --dependency=",
    "srun": "--kill-on-bad-exit= --container-image= --container-mounts= --container-workdir=",
    # apptainer.org/docs/user/latest/cli/apptainer_exec.html
    "apptainer exec": "--nv --bind= --pwd=",
}

# Every stand-in begins so. Those of above refuse what the real ones would.
BEGIN = f"""#!{sys.executable}
import argparse, json, os, subprocess, sys
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(os.environ["FAKE"] + "/calls", "a") as file:
    file.write(json.dumps(words) + "\\n")
ACCEPTED = {ACCEPTED!r}

def parse(words):
    name = next(name for name in ACCEPTED if words[: len(name.split())] == name.split())
    parser = argparse.ArgumentParser(name, allow_abbrev=False, add_help=False)
    for option in ACCEPTED[name].split():
        kind = "append" if option.endswith("=") else "store_true"
        parser.add_argument(option.rstrip("="), action=kind)
    rest = words[len(name.split()) :]
    if words[0] in ("sbatch", "srun", "apptainer"):  # what follows is another's
        parser.add_argument("words", nargs=argparse.REMAINDER)
        return parser.parse_args(rest)
    parser.add_argument("words", nargs="*")
    return parser.parse_intermixed_args(rest)

if any(name.split()[0] == words[0] for name in ACCEPTED):
    given = parse(words)
"""
# The slice's state is a file; a worker is a folder.
GCLOUD = """
import pathlib, shutil
fake = pathlib.Path(os.environ["FAKE"])
state, home = fake / "state", fake / "home"
verb = words[4]
refused = fake / f"refused_{verb}"  # a message a line, one for each call
if refused.exists() and (messages := refused.read_text().splitlines()):
    refused.write_text("\\n".join(messages[1:]))
    sys.exit(f"ERROR: (gcloud.compute.tpus.tpu-vm.{verb}) {messages[0]}")
if verb == "describe":
    if not state.exists():
        sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: no such node")
    print(state.read_text())
elif verb == "create":
    assert not state.exists()
    state.write_text("READY")
    shutil.copytree(fake / "image", home)
elif verb == "delete":
    state.unlink()
    shutil.rmtree(home)
elif verb == "scp":
    source, target = given.words
    shutil.copy(source, home / target.split(":")[1])
else:
    (command,) = given.command
    done = subprocess.run(["bash", "-c", command], cwd=home, env=os.environ | {"HOME": str(home)})
    sys.exit(done.returncode)
"""
SKY = """
import yaml
if "launch" in words:
    (script,) = given.words
    with open(script) as file:
        envs = yaml.safe_load(file)["envs"]
    envs |= dict(entry.split("=", 1) for entry in given.env or [])
    missing = [name for name, value in envs.items() if value is None]
    sys.exit(f"no value of {missing}" if missing else 0)
"""
# A job runs at once, on one machine.
SBATCH = """
import re
script, *flags = given.words
with open(script) as file:
    directives = re.findall("^#SBATCH (.*)$", file.read(), re.MULTILINE)
job = parse([words[0], *directives, *words[1:]])
os.environ["SLURM_JOB_ID"] = str(os.getpid())
os.environ["SLURM_NTASKS"] = str(int(job.nodes[-1]) * int(job.ntasks_per_node[-1]))
os.environ["SLURM_SUBMIT_DIR"] = os.getcwd()
os.execvp("bash", ["bash", script, *flags])
"""
SRUN = """
tasks = []
for i in range(int(os.environ["SLURM_NTASKS"])):
    told = {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_NODELIST": "localhost"}
    tasks.append(subprocess.Popen(given.words, env=os.environ | told))
sys.exit(any([task.wait() for task in tasks]))
"""
# Of the worker: makes an environment whose Python plays the run.
UV = """
import pathlib, stat
if sys.argv[1] == "venv":
    python = pathlib.Path(sys.argv[-1]) / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(open(os.environ["FAKE"] + "/run.py").read())
    python.chmod(0o755)
"""
RUN = """
import pathlib, signal, time
fake = pathlib.Path(os.environ["FAKE"])
before = sum('"gsm_verifier.main"' in line for line in (fake / "calls").read_text().splitlines())
outcomes = os.environ.get("OUTCOMES", "0").split()
outcome = outcomes[min(before, len(outcomes)) - 1]

def save(number, frame):
    time.sleep(1.5)
    print("saved", flush=True)
    sys.exit(143)

if outcome == "saves":
    signal.signal(signal.SIGTERM, save)
if outcome == "stays":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("run", before, outcome, flush=True)
if outcome == "preempted":
    (fake / "state").write_text("PREEMPTED")
    sys.exit(1)
if outcome in ("hangs", "saves", "stays"):
    time.sleep(600)
sys.exit(int(outcome))
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A machine with stand-ins on PATH, and what they were called with."""
    programs = tmp_path / "bin"

    def program(path: Path, body: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(BEGIN + body)
        path.chmod(0o755)

    for name in ("sudo", "python", "python3", "kubectl", "apptainer"):
        program(programs / name)
    for name, body in (("gcloud", GCLOUD), ("sky", SKY), ("sbatch", SBATCH), ("srun", SRUN)):
        program(programs / name, body)
    program(tmp_path / "module")  # a shell function of clusters, no program on PATH
    (tmp_path / "functions").write_text(f'module() {{ {tmp_path}/module "$@"; }}')
    checkout = tmp_path / "checkout"  # without a virtual environment that may be in this one
    checkout.mkdir()
    for name in ("launch", "configs", "gsm_verifier"):
        (checkout / name).symlink_to(REPOSITORY / name)
    program(tmp_path / "image" / ".local" / "bin" / "uv", UV)
    program(tmp_path / "run.py", RUN)
    mine = ("MODULES", "VENV", "CONTAINER", "SLURM_JOB_ID")
    environment = {
        k: v for k, v in os.environ.items() if k not in mine and "proxy" not in k.lower()
    }
    environment |= {
        "FAKE": str(tmp_path),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "BASH_ENV": str(tmp_path / "functions"),
    }

    def call(*command: str, **changes: str) -> SimpleNamespace:
        done = subprocess.run(
            command,
            cwd=checkout,
            env=environment | changes,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)

    def calls(name: str) -> list[list[str]]:
        path = tmp_path / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [words[1:] for words in map(json.loads, lines) if words[0] == name]

    home = tmp_path / "home"
    yield SimpleNamespace(call=call, calls=calls, program=program, folder=tmp_path, home=home)
    if (home / "run.pid").exists():
        call("bash", "-c", f"kill -KILL -- -$(cat {shlex.quote(str(home / 'run.pid'))})")


def pod(world: SimpleNamespace, verb: str, *words: str, **changes: str) -> SimpleNamespace:
    return world.call("launch/tpu_pod.sh", verb, *SLICE, *words, **changes)


def verbs(world: SimpleNamespace) -> list[str]:
    return [words[3] for words in world.calls("gcloud")]


def runs(world: SimpleNamespace) -> list[list[str]]:
    """The flags of gsm_verifier.main in each of the runs on the worker."""
    found = [words for words in world.calls("python") if "gsm_verifier.main" in words]
    assert all(words[:2] == ["-m", "gsm_verifier.main"] for words in found)
    return [words[2:] for words in found]


# Cloud TPU


def test_up_makes_the_slice_installs_this_commit_and_runs_to_the_end(world) -> None:
    flags = ["--project=p", "--spot", NFS, "--poll=0.05", "--"]
    done = pod(world, "up", *flags, *MAIN_FLAGS)
    assert done.code == 0, done.err
    assert verbs(world)[:4] == ["describe", "create", "ssh", "scp"]
    assert verbs(world).count("create") == 1
    create = next(words for words in world.calls("gcloud") if words[3] == "create")
    assert create[4] == "gsm"
    for flag in ("--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"):
        assert flag in create
    for words in world.calls("gcloud"):
        assert {"--zone=z", "--project=p", "--quiet"} <= set(words)
    assert runs(world) == [["--distributed", *MAIN_FLAGS]]
    assert world.home.joinpath("run.exit").read_text().strip() == "0"
    head = ["git", "rev-parse", "HEAD"]
    commits = [
        subprocess.run(head, cwd=folder, capture_output=True, text=True, check=True).stdout
        for folder in (REPOSITORY, world.home / "gsm_verifier")
    ]
    assert commits[0] == commits[1]


def test_up_starts_again_after_a_preemption_on_a_new_slice(world) -> None:
    done = pod(world, "up", NFS, "--poll=0.05", "--", *MAIN_FLAGS, OUTCOMES="preempted 0")
    assert done.code == 0, done.err
    assert verbs(world).count("create") == 2
    assert verbs(world).count("delete") == 1
    assert runs(world) == [["--distributed", *MAIN_FLAGS]] * 2
    assert "was preempted" in done.err


def test_up_tries_a_failing_run_again_and_gives_up_with_its_log(world) -> None:
    flags = [NFS, "--poll=0.05", "--tries=2", "--"]
    done = pod(world, "up", *flags, *MAIN_FLAGS, OUTCOMES="1")
    assert done.code == 1
    assert len(runs(world)) == 2
    assert verbs(world).count("create") == 1
    assert "run 2 1" in done.out + done.err


def test_run_refuses_a_second_run_until_it_is_stopped(world) -> None:
    assert pod(world, "create").code == 0
    assert pod(world, "install").code == 0
    assert pod(world, "run", "--", *MAIN_FLAGS, OUTCOMES="hangs").code == 0
    again = pod(world, "run", "--", *MAIN_FLAGS)
    assert again.code == 1
    assert "stop it first" in again.err
    assert pod(world, "stop").code == 0
    assert pod(world, "stop").code == 0
    third = pod(world, "run", "--", *MAIN_FLAGS)
    assert third.code == 0, third.err


def begin(world: SimpleNamespace, outcome: str) -> int:
    """The process group of a run that goes on until it is stopped."""
    assert pod(world, "create").code == 0
    assert pod(world, "install").code == 0
    assert pod(world, "run", "--", *MAIN_FLAGS, OUTCOMES=outcome).code == 0
    wait_until(lambda: f"run 1 {outcome}\n" in (world.home / "run.log").read_text())
    return int((world.home / "run.pid").read_text())


def wait_until(moment: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not moment():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(send: Callable[[int, int], None], number: int) -> bool:
    try:
        send(number, 0)
    except ProcessLookupError:
        return True
    return False


def test_stop_waits_until_the_run_has_saved(world) -> None:
    group = begin(world, "saves")
    assert pod(world, "stop", "--dry-run").code == 0
    assert not gone(os.killpg, group)
    assert pod(world, "stop").code == 0
    assert (world.home / "run.log").read_text() == "run 1 saves\nsaved\n"


def test_a_run_that_does_not_end_is_killed(world) -> None:
    group = begin(world, "stays")
    os.killpg(group, signal.SIGTERM)  # as a `stop` that is broken off
    wait_until(lambda: gone(os.kill, group))
    again = pod(world, "run", "--", *MAIN_FLAGS)
    assert again.code == 1
    assert "stop it first" in again.err
    done = pod(world, "stop", "--grace=1")
    assert done.code == 0
    assert "going on after 1 s: killed" in done.err
    wait_until(lambda: gone(os.killpg, group))


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        (None, ["describe", "create"]),
        ("READY", ["describe"]),
        ("PREEMPTED", ["describe", "delete", "create"]),
        ("STOPPED", ["describe"]),
    ],
)
def test_create_reuses_what_is_there(world, state: str | None, wanted: list[str]) -> None:
    if state:
        world.home.mkdir()
        (world.folder / "state").write_text(state)
    done = pod(world, "create")
    assert verbs(world) == wanted
    assert (done.code == 0) == (state != "STOPPED")


def test_a_failing_network_is_not_a_missing_slice(world) -> None:
    (world.folder / "refused_describe").write_text("the network is unreachable")
    done = pod(world, "create")
    assert done.code == 1
    assert verbs(world) == ["describe"]
    assert "unreachable" in done.err


PASSING = [
    '{"code": 8, "message": "There is no more capacity in the zone \\"z\\"; you can try another"}',
    "RESOURCE_EXHAUSTED: try again later",
    "the zone does not have enough resources (state:STOCKOUT)",
    "the node was preempted while it was created",
    '{"code": 13, "message": "an internal error has occurred"}',
    "UNAVAILABLE: The service is currently unavailable.",
    "gcloud crashed (ConnectionError): HTTPSConnectionPool: Max retries exceeded",
]


def test_up_waits_for_a_spot_slice(world) -> None:
    (world.folder / "refused_create").write_text("\n".join(PASSING))
    flags = [NFS, "--poll=0.05", "--", *MAIN_FLAGS]
    assert pod(world, "up", *flags).code == 1  # not of --spot: tried once
    assert verbs(world) == ["describe", "create"]
    done = pod(world, "up", "--spot", *flags)
    assert done.code == 0, done.err
    assert done.err.count("no slice yet; trying again") == len(PASSING) - 1
    assert len(runs(world)) == 1


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("describe", "You do not currently have an active account selected."),
        ("create", "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'internal-ml'"),
        ("create", 'INVALID_ARGUMENT: Accelerator type "v5e-16" not found'),
        ("create", "RESOURCE_EXHAUSTED: Quota limit 'A' has been exceeded. Limit: 0 in zone z."),
        ("delete", "PERMISSION_DENIED: Permission 'tpu.nodes.delete' denied"),
    ],
)
def test_up_gives_up_where_waiting_does_not_help(world, verb: str, message: str) -> None:
    (world.folder / f"refused_{verb}").write_text(message)
    if verb == "delete":
        world.home.mkdir()
        (world.folder / "state").write_text("PREEMPTED")
    flags = ["--project=preempted", NFS, "--poll=0.05", "--"]  # what it was told, it didn't say
    done = pod(world, "up", "--spot", *flags, *MAIN_FLAGS)
    assert done.code == 1
    assert done.err.endswith(f"{message}\n")
    assert verbs(world)[-1] == verb


def test_install_mounts_the_work_directory_and_can_clone(world) -> None:
    assert pod(world, "create").code == 0
    done = pod(world, "install", NFS, f"--repo={REPOSITORY}")
    assert done.code == 0, done.err
    assert "scp" not in verbs(world)
    assert ["mount", "-t", "nfs", "10.0.0.2:/share", "/mnt/runs"] in world.calls("sudo")
    assert (world.home / "gsm_verifier" / "setup.py").is_file()


def test_a_bucket_needs_no_mount(world) -> None:
    flags = ["--config=configs/gsm8k.py:tiny", "--workdir=gs://bucket/run"]
    done = pod(world, "up", "--poll=0.05", "--", *flags)
    assert done.code == 0, done.err
    assert runs(world) == [["--distributed", *flags]]
    assert not world.calls("sudo")
    (installed,) = [words for words in world.calls("uv") if words[0] == "pip"]
    assert installed[-1] == "./gsm_verifier[tpu,gs]"


def test_logs_follow_worker_0_and_delete_deletes(world) -> None:
    for verb in ("logs", "delete"):
        assert pod(world, verb, "--dry-run").code == 0
    assert not world.calls("gcloud")
    logs, delete = (pod(world, verb, "--dry-run").err for verb in ("logs", "delete"))
    assert "--worker=0" in logs
    assert "run.log" in logs
    assert delete == "+ gcloud compute tpus tpu-vm delete gsm --zone=z --quiet\n"


def test_a_dry_run_shows_every_command_and_runs_none(world) -> None:
    done = pod(world, "up", "--spot", "--nfs=h:/s", "--dry-run", "--", *MAIN_FLAGS)
    assert done.code == 0, done.err
    assert not world.calls("gcloud")
    shown = [line.split()[5] for line in done.err.splitlines() if line[:2] == "+ "]
    assert set(shown) == {"create", "describe", "scp", "ssh"}
    assert "mount -t nfs" in done.err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], "usage:"),
        (["start"], "unknown command start"),
        ([*SLICE, "create"], "a command comes before --name=gsm"),
        (["create", "--name", "g", "--zone=z"], "use --name=g"),
        (["create", "--name=g", "--zone"], "use --zone=VALUE"),
        (["create", "--zone=z"], "--name and --zone"),
        (["create", *SLICE, "--size=3"], "unknown option --size=3"),
        (["run", *SLICE], "--config"),
        (["run", *SLICE, "--", "--config=c"], "--workdir"),
        (["run", *SLICE, "--", "--config=c", "--workdir="], "--workdir=..."),
        (["run", *SLICE, "--", "--config=c", "--workdir=runs/r"], "runs/r: give /mnt/runs/<run>"),
        (["up", *SLICE, NFS, "--", "--config=c", "--workdir=~/r"], "~/r: give /mnt/runs/<run>"),
        (["run", *SLICE, "--", "--config=c", "--workdir=gs:/b/r"], "or gs://<bucket>/<run>"),
        (["run", *SLICE, "--", "--config=c", "--workdir=gs://b"], "or gs://<bucket>/<run>"),
        (["run", *SLICE, "--", *MAIN_FLAGS, "--workdir=r"], "--workdir=r:"),  # the last one counts
        (["up", *SLICE, "--", *MAIN_FLAGS], "not shared by the hosts of v5litepod-16"),
        (["up", *SLICE, NFS, "--", "--config=c", "--workdir=/home/r"], "--nfs=HOST:/SHARE"),
        (["up", *SLICE, "--type=v5p-16", "--", *MAIN_FLAGS], "not shared by the hosts of v5p-16"),
    ],
    ids=str,
)
def test_wrong_words_are_refused_before_any_command(world, words: list[str], names: str) -> None:
    done = world.call("launch/tpu_pod.sh", *words)
    assert done.code == 2
    assert names in done.err
    assert names == "usage:" or len(done.err.splitlines()) == 1
    assert not world.calls("gcloud")


def test_one_host_may_keep_its_runs_to_itself_but_not_in_the_checkout(world) -> None:
    flags = ["--type=v5litepod-8", "--poll=0.05", "--tries=1", "--", "--config=c"]
    inside = f"--workdir={world.home}/gsm_verifier/runs/r"
    done = pod(world, "up", *flags, inside)
    assert done.code == 1
    assert "--workdir is in the checkout, which install deletes" in done.err
    assert not runs(world)
    beside = f"--workdir={world.home}/runs/r"
    done = pod(world, "up", *flags, beside)
    assert done.code == 0, done.err
    assert runs(world) == [["--distributed", "--config=c", beside]]


def test_help_names_every_command_and_option(world) -> None:
    text = (LAUNCH / "tpu_pod.sh").read_text()
    done = world.call("launch/tpu_pod.sh", "--help")
    assert done.code == 0
    for option in re.findall(r"^        (--[a-z-]+)(?:=\*)?\)", text, re.MULTILINE):
        assert option in done.out
    valued = re.findall(r"^        (--[a-z-]+)=\*\)", text, re.MULTILINE)
    assert f"        {' | '.join(valued)})\n" in text  # those that are told to have a value
    for verb in ("create", "install", "run", "logs", "stop", "delete", "up"):
        assert re.search(rf"^  {verb} ", done.out, re.MULTILINE)


# Slurm


def test_slurm_starts_one_process_per_gpu(world) -> None:
    done = world.call("sbatch", "launch/slurm.sh", *MAIN_FLAGS)
    assert done.code == 0, done.err
    main = ["-m", "gsm_verifier.main", "--distributed", *MAIN_FLAGS]
    assert world.calls("srun") == [["--kill-on-bad-exit=1", "python", *main]]
    assert world.calls("python") == [main] * 2 * 8
    options = dict(
        re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", (LAUNCH / "slurm.sh").read_text(), re.M)
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options
    assert "requeue" in options
    assert options["signal"] == "TERM@300"  # to the tasks; B: would be the script alone


def test_slurm_in_containers_and_environments(world) -> None:
    python = world.folder / "venv" / "bin" / "python"
    world.program(python)
    for changes in (
        {"VENV": str(world.folder / "venv")},
        {"CONTAINER": "image.sif"},
        {"CONTAINER": "image.sqsh"},
        {"CONTAINER": "image.sif", "VENV": "/its/own"},
    ):
        assert world.call("sbatch", "launch/slurm.sh", *MAIN_FLAGS, **changes).code == 0
    plain, apptainer, pyxis, inside = world.calls("srun")
    assert plain[1] == str(python)
    assert apptainer[1:4] == ["apptainer", "exec", "--nv"]
    assert world.calls("apptainer") == [apptainer[2:]] * 16 + [inside[2:]] * 16
    assert "image.sif" in apptainer
    assert "--container-image=image.sqsh" in pyxis
    assert "python" in apptainer
    assert "/its/own/bin/python" in inside
    assert all(words[-len(MAIN_FLAGS) :] == MAIN_FLAGS for words in (plain, apptainer, pyxis))


def test_slurm_says_what_is_missing(world) -> None:
    assert "sbatch" in world.call("launch/slurm.sh", *MAIN_FLAGS).err
    assert world.call("sbatch", "launch/slurm.sh").code == 2
    assert "usage:" in world.call("launch/slurm.sh", "--help").out
    for flags, changes, names in [
        (MAIN_FLAGS[:1], {}, "--workdir=..."),
        (["--workdir=", *MAIN_FLAGS[:1]], {}, "--workdir=..."),
        (MAIN_FLAGS[1:], {}, "--config=..."),
        (MAIN_FLAGS, {"VENV": "nowhere"}, "VENV=nowhere: there is no nowhere/bin/python"),
    ]:
        done = world.call("sbatch", "launch/slurm.sh", *flags, **changes)
        assert done.code == 2
        assert names in done.err
        assert len(done.err.splitlines()) == 1
    assert not world.calls("srun")


# Kubernetes and SkyPilot


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def test_the_gke_manifest_starts_a_process_on_every_host_of_the_slice() -> None:
    claim, jobset = documents("gke.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert (jobset["kind"], jobset["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["backoffLimit"] == 0
    pod_spec = job["template"]["spec"]
    assert pod_spec["shareProcessNamespace"] is True  # PID 1 would ignore SIGTERM
    (container,) = pod_spec["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    topology = pod_spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    size = math.prod(map(int, topology.split("x")))
    assert job["parallelism"] == job["completions"] == size // chips
    (volume,) = pod_spec["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    (script,) = container["args"]
    assert f'--workdir="{mount["mountPath"]}/$RUN"' in script
    assert "--distributed" in script
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert set(re.findall(r"\$(\w+)", script)) <= given.keys()
    check_main_flags([f"--config={given['CONFIG']}"])


@pytest.mark.parametrize(
    ("nodes", "rank", "wanted"),
    [
        ("1", "0", []),
        ("2", "1", ["--coordinator=10.0.0.1:8476", "--processes=2", "--process=1"]),
    ],
)
def test_skypilots_nodes_meet_at_the_first(world, nodes: str, rank: str, wanted: list[str]) -> None:
    (task,) = documents("sky.yaml")
    python = world.folder / "nodes_home" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy(world.folder / "run.py", python)
    # Who launches says where: no bucket is everyone's, and a mounted one isn't proven.
    assert [key for key, value in task["envs"].items() if value is None] == ["RUNS"]
    assert "file_mounts" not in task
    environment = task["envs"] | {"RUNS": "gs://my-bucket", "HOME": str(python.parents[2])}
    environment |= {"FLAGS": "--stages=prepare --config.seed=1"}
    environment |= {"SKYPILOT_NUM_NODES": nodes, "SKYPILOT_NODE_RANK": rank}
    done = world.call(
        "bash", "-c", task["run"], SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", **environment
    )
    assert done.code == 0, done.err
    (flags,) = runs(world)
    run = ["--config=configs/gsm8k.py:tiny", "--workdir=gs://my-bucket/gsm8k-tiny"]
    assert flags == [*wanted, *run, "--stages=prepare", "--config.seed=1"]
    assert '--editable ".[${extra}gs]"' in task["setup"]
    assert set(re.findall(r"\$([A-Z]+)\b", task["run"])) <= set(task["envs"])


# All of them


def test_shellcheck_has_nothing_to_say() -> None:
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) == 2
    # Beside this Python, which needn't be on PATH.
    where = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=where)
    assert shellcheck, "pip install -e '.[test]' brings it"
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (task,) = documents("sky.yaml")
    (container,) = documents("gke.yaml")[1]["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]["spec"]["containers"]
    for script in (task["setup"], task["run"], container["args"][0]):
        # FLAGS is meant to be split into words.
        done = subprocess.run(
            [shellcheck, "--shell=bash", "--exclude=SC2086", "-"],
            input=script,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_scripts_are_strict_and_executable() -> None:
    for script in LAUNCH.glob("*.sh"):
        assert os.access(script, os.X_OK)
        assert "\nset -euo pipefail\n" in script.read_text()


def commands() -> list[str]:
    """The command lines quoted in launch/README.md, and in the heads of the YAML files."""
    readme = re.findall(r"```bash\n(.*?)```", (LAUNCH / "README.md").read_text(), re.DOTALL)
    heads = [
        line.removeprefix("#").strip()
        for name in ("gke.yaml", "sky.yaml")
        for line in (LAUNCH / name).read_text().splitlines()
        if line.startswith("#   ")
    ]
    lines = [line for block in readme for line in block.splitlines()] + heads
    return list(dict.fromkeys(re.sub(r"\s+# .*$", "", line) for line in lines if line.strip()))


COMMANDS = commands()


def inline() -> list[str]:
    """What launch/README.md quotes within its lines."""
    prose = re.sub(r"```.*?```", "", (LAUNCH / "README.md").read_text(), flags=re.DOTALL)
    return list(dict.fromkeys(re.findall(r"`([^`]+)`", prose)))


def check_main_flags(flags: list[str]) -> None:
    """Flags of gsm_verifier.main: they exist, and what they name does; together they are valid."""
    main = (REPOSITORY / "gsm_verifier" / "main.py").read_text()
    known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', main))
    assert {"config", "workdir", "distributed", "coordinator", "processes", "process"} <= known
    given = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
    changes = {k.removeprefix("config."): v for k, v in given.items() if k.startswith("config.")}
    assert {name for name in given if not name.startswith("config.")} <= known
    path, _, preset = given.get("config", "configs/quickstart.py").partition(":")
    config = runpy.run_path(str(REPOSITORY / path))["get_config"](*[preset] if preset else [])
    for key, value in changes.items():
        text = isinstance(leaves(config)[key], str)
        config.update_from_flattened_dict({key: value if text else ast.literal_eval(value)})
    validate(config)
    if given.get("topology"):
        kind, _, shape = given["topology"].partition(":")
        assert shape in ["", *plan.CHIPS[kind].slices.split()]


def test_the_readme_speaks_of_every_file_and_every_kind_of_command() -> None:
    readme = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in readme
    first = {next(word for word in shlex.split(c) if "=" not in word) for c in COMMANDS}
    assert first == {"launch/tpu_pod.sh", "kubectl", "sky", "sbatch", "python"}


VERSIONS = {"v5e": "v5-lite", "v5p": "v5", "v6e": "v6e"}  # cloud.google.com/tpu/docs/runtimes


def test_planned_slices_are_told_by_type_and_version(world) -> None:
    readme = (LAUNCH / "README.md").read_text()
    found = re.findall(r"^\| (v\w+):([x\d]+) \| (\S+)-(\d+) \| (\S+) \| (\d+) \|$", readme, re.M)
    assert {kind for kind, *_ in found} == {k for k, chip in plan.CHIPS.items() if chip.slices}
    for kind, shape, name, number, version, hosts in found:
        assert shape in plan.CHIPS[kind].slices.split()
        chips = math.prod(map(int, shape.split("x")))
        cores = 2 if kind == "v5p" else 1
        assert int(number) == cores * chips
        assert int(hosts) == (1 if int(number) <= 8 else chips // 4)
        assert name == {"v5e": "v5litepod"}.get(kind, kind)
        done = pod(world, "up", f"--type={name}-{number}", "--dry-run", "--", *MAIN_FLAGS)
        assert (done.code == 0) == (hosts == "1")  # many need --nfs
        assert version == f"v2-alpha-tpu{VERSIONS[kind]}"
    defaults = re.search(r"^type=(\S+) version=(\S+) ", (LAUNCH / "tpu_pod.sh").read_text(), re.M)
    assert defaults.groups() in [(f"{name}-{n}", v) for _, _, name, n, v, _ in found]


def test_what_is_quoted_within_lines_exists() -> None:
    extras = re.findall(r'^        "(\w+)": ', (REPOSITORY / "setup.py").read_text(), re.MULTILINE)
    keys = leaves(default())
    for words in map(shlex.split, inline()):
        if words[0].startswith("--"):
            check_main_flags(words)
        elif words[0] == "pip":
            assert words[:3] == ["pip", "install", "-e"]
            assert set(words[3].strip(".[]").split(",")) <= set(extras)
        elif found := re.match(r"(config\.)?((\w+)\.\w+)\b", words[0]):
            prefix, key, section = found.groups()
            is_key = prefix or any(known.startswith(f"{section}.") for known in keys)
            assert not is_key or key in keys


@pytest.mark.parametrize("command", COMMANDS)
def test_every_quoted_command_parses(world, command: str) -> None:
    words = shlex.split(command)
    variables = {}
    while "=" in words[0] and not words[0].startswith("-"):
        name, _, variables[name] = words.pop(0).partition("=")
    program, *rest = words
    if program == "python":
        assert rest[:2] == ["-m", "gsm_verifier.main"]
        check_main_flags(rest[2:])
    elif program == "launch/tpu_pod.sh":
        if "--dry-run" not in rest:
            rest.insert(1, "--dry-run")
        done = world.call(program, *rest)
        assert done.code == 0, done.err
        assert "+ gcloud" in done.err
        if "--" in rest:
            check_main_flags(rest[rest.index("--") + 1 :])
    elif program == "sbatch":
        world.program(world.folder / "checkout" / ".venv" / "bin" / "python")
        known = (LAUNCH / "slurm.sh").read_text()
        assert all(f"  {name}=" in known for name in variables)
        done = world.call(program, *rest, **variables)
        assert done.code == 0, done.err
        (step,) = world.calls("srun")
        check_main_flags(step[step.index("--distributed") + 1 :])
        loaded = [["load", *variables["MODULES"].split()]] if "MODULES" in variables else []
        assert world.calls("module") == loaded
    elif program == "sky":
        done = world.call(program, *rest)
        assert done.code == 0, done.err
        (task,) = documents("sky.yaml")
        given = dict(b.split("=", 1) for a, b in itertools.pairwise(rest) if a == "--env")
        assert given.keys() <= task["envs"].keys()
        check_main_flags([f"--config={(task['envs'] | given)['CONFIG']}"])
    else:
        assert program == "kubectl"
        name = documents("gke.yaml")[1]["metadata"]["name"]
        done = world.call(program, *rest)
        assert done.code == 0, done.err
        assert rest == ["apply", "-f", "launch/gke.yaml"] or any(name in word for word in rest)


# The flags of gsm_verifier.main

MEET = """
from absl import app, flags
from gsm_verifier import main, pipeline

def instead(config, folder, names):
    import jax, sys
    counts = jax.process_index(), jax.process_count(), jax.device_count(), jax.local_device_count()
    sys.stdout.write(" ".join(map(str, counts)) + "\\n")  # one write: tasks share a file

pipeline.run_stages = instead
flags.mark_flags_as_required(["config", "workdir"])
app.run(main.main)
"""


TWO_DEVICES = ["--config=configs/quickstart.py:tiny", "--config.mesh.cpu_devices=2"]
# What GKE tells both pods of a slice; here, also what its chips and its metadata server would say.
GKE = {
    "TPU_WORKER_HOSTNAMES": "localhost,localhost",
    "JAX_FORCE_TPU_INIT": "1",
    "JAX_PLATFORMS": "cpu",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "1",
    "MEGASCALE_SLICE_ID": "0",
}


def start(folder: Path, *flags: str, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MEET, *TWO_DEVICES, f"--workdir={folder}", *flags],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("told", ["flags", pytest.param("gke", marks=pytest.mark.slow)])
def test_two_processes_meet_and_see_each_others_devices(told: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if told == "flags":
        meet = [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
        both = [start(tmp_path, *meet, f"--process={i}") for i in (0, 1)]
    else:
        ids = [{"JAX_COORDINATOR_PORT": f"{port}", "TPU_WORKER_ID": f"{i}"} for i in (0, 1)]
        both = [start(tmp_path, "--distributed", **GKE, **worker) for worker in ids]
    try:
        for index, process in enumerate(both):
            out, err = process.communicate(timeout=200)
            assert process.returncode == 0, err
            assert out.split() == [str(index), "2", "4", "2"]
    finally:
        for process in both:
            process.kill()


@pytest.mark.slow
def test_two_tasks_of_slurm_meet(world) -> None:
    python = world.folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # Instead of `-m gsm_verifier.main`.
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -c {shlex.quote(MEET)} "$@"\n')
    python.chmod(0o755)
    tasks = ["sbatch", "--nodes=1", "--ntasks-per-node=2", "launch/slurm.sh"]
    flags = [*TWO_DEVICES, f"--workdir={world.folder}"]
    venv = str(python.parents[1])
    done = world.call(*tasks, *flags, VENV=venv, JAX_PLATFORMS="cpu")
    assert done.code == 0, done.err
    assert sorted(done.out.splitlines()) == ["0 2 4 2", "1 2 4 2"]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--process=0"], "go together"),
        (["--distributed"], "--coordinator"),
        (["--coordinator=127.0.0.1:9", "--processes=2", "--process=2"], "process_id"),
        (["--coordinator=here", "--processes=2", "--process=1"], "give host:port"),
        (["--distributed", "--coordinator=a:1", "--processes=2", "--process=1"], "not both"),
        (["--workdir=gs:/bucket/run"], "gs:/bucket/run"),
        (["--workdir=s3://bucket/run"], "s3://bucket/run"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_flags_that_do_not_fit_are_one_line(flags: list[str], names: str, tmp_path: Path) -> None:
    process = start(tmp_path / "run", *flags)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1
    *waits, told = err.strip().splitlines()
    assert all(line.startswith("waiting up to 300 s for ") for line in waits), err
    assert told.startswith("gsm_verifier: ")
    assert names in told
    assert not out
    assert not (tmp_path / "run").exists()
