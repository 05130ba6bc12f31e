"""Training verifiers to solve math word problems, from data to report.

    python -m gsm_verifier.main --config=configs/quickstart.py --workdir=runs/quickstart

The same command again resumes, or skips what is done. configs/ has quickstart.py (with :tiny it
takes seconds), gsm8k.py:<tiny or a model> and paper/. Any key of gsm_verifier/config.py can be
overridden: --config.sample.temperature=1.0
"""

import os
import signal
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from gsm_verifier import storage
from gsm_verifier.config import validate

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/: what to run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, or gs://...; a rerun resumes.")
_SOME = "Some of prepare, pretrain, finetune, sample, label, verify, score, rank, report."
_STAGES = flags.DEFINE_list("stages", None, _SOME)
_PLAN = flags.DEFINE_bool("plan", False, "Run nothing: what would fit, and how long it would take.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "With --plan: a TPU slice, such as v5p:4x4x8.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of many processes of a platform.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Without one: host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "With --coordinator: how many there are.")
_PROCESS = flags.DEFINE_integer("process", None, "With --coordinator: which this is, from 0.")


def main(argv: list[str]) -> None:
    """Set the devices up and hand over to the pipeline; an expected error is one line."""
    if argv[1:]:
        raise app.UsageError(f"unknown argument {argv[1]}")
    logging.set_verbosity(logging.WARNING)  # orbax and jax tell of every file and backend
    try:
        validate(config := _CONFIG.value)
        storage.reach(folder := storage.path(_WORKDIR.value or ""))
    except (ValueError, OSError) as error:  # before the seconds it takes to import what follows
        sys.exit(f"gsm_verifier: {error}")
    import jax

    from gsm_verifier import pipeline, plan, processes, sharding

    try:
        sharding.configure(config.mesh.cpu_devices)
        told = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        if _DISTRIBUTED.value and told != (None, None, None):
            raise ValueError("--distributed, where the platform tells, or --coordinator: not both")
        if _DISTRIBUTED.value or told != (None, None, None):
            processes.meet(*told)
        stages = _STAGES.value or list(pipeline.STAGES)
        if _PLAN.value:
            for line in plan.lines(config, _TOPOLOGY.value, stages):
                print(line, flush=True)
        else:
            pipeline.run_stages(config, folder, stages)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if os.environ.get("GSM_VERIFIER_TRACEBACK"):
            raise
        sys.exit(f"gsm_verifier: {error}")
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1:
            error.add_note("Perhaps another process has died; start all again to go on")
        raise
    except processes.Stopped as stopped:
        print(f"gsm_verifier: {stopped}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)  # as if it had killed the process, so that it is run again
    except KeyboardInterrupt:
        print("gsm_verifier: interrupted; run again to go on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _parse(argv: list[str]) -> list[str]:
    """The arguments without the flags; a key that doesn't exist is one line."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # of a key, of its section
        told = str(error).replace("\\n", ". ").replace("\\", "").replace("'", "")
        sys.exit(f"gsm_verifier: config has no key {told}")


if __name__ == "__main__":
    example = "missing: for example, --config=configs/quickstart.py --workdir=runs/quickstart"
    flags.register_validator("config", bool, example)
    flags.register_multi_flags_validator(
        ["workdir", "plan"], lambda x: x["workdir"] or x["plan"], "--workdir is missing"
    )
    app.run(main, flags_parser=_parse)
