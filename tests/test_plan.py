"""The plan: counts against counts by hand, every stage on the devices at hand, clear refusals."""

import dataclasses
import importlib.util
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MakeMesh
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gsm_verifier import config as config_module
from gsm_verifier import hlo, plan, sharding
from gsm_verifier.model import cpu_kernels, transformer
from gsm_verifier.plan import Programs

REPOSITORY = Path(__file__).resolve().parents[1]
WITH_LIBTPU = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu isn't installed"
)
B, T, V = 4, 32, 320  # rows, and V as it is padded
WIDTH, LAYERS, MLP, HEADS, SIZE = 64, 3, 256, 4, 16


def tiny(**changes: Any) -> ConfigDict:
    config = config_module.default()
    config.text.vocab_size = V - 20
    config.model.update(layers=LAYERS, width=WIDTH, heads=HEADS, kv_heads=HEADS, head_size=SIZE)
    config.model.update(mlp_width=MLP)
    for stage in ("pretrain", "finetune", "baseline", "verify"):
        config[stage].update(row_tokens=T, microbatch_rows=B, batch_tokens=2 * B * T)
    config.score.update(row_tokens=T, rows=B)
    config.sample.update(prompts=2, slots=4, max_tokens=16, chunk_steps=5)
    config.update_from_flattened_dict(changes)
    return config


def counted(function: Any, *arguments: Any, steps: int = 1) -> hlo.Work:
    return hlo.work(jax.jit(function).lower(*arguments).compile().as_text(), steps)


def test_products_in_loops_count_as_often_as_they_run() -> None:
    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.zeros((128, 64)), jnp.zeros((7, 64, 64))
    assert counted(layers, x, w).flops == 7 * 2 * 128 * 64 * 64

    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 2, lambda _, x: layers(x, w), x)

    assert counted(twice, x, w).flops == 2 * 7 * 2 * 128 * 64 * 64


def test_a_loop_that_its_data_end_counts_as_often_as_one_says() -> None:
    def until(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    x, w = jnp.zeros((8, 64)), jnp.zeros((64, 64))
    assert counted(until, x, w, steps=5).flops == 5 * 2 * 8 * 64 * 64


def test_memory_is_what_is_read_and_written() -> None:
    read = counted(lambda x: x.sum(), jnp.zeros((1 << 20,))).hbm
    assert read == pytest.approx(4 << 20, rel=0.01)
    # A slice of a table is read, not the table.
    table, at = jnp.zeros((64, 1 << 14)), jnp.zeros((), int)
    row = counted(lambda x, at: jax.lax.dynamic_index_in_dim(x, at, 0) * 2, table, at).hbm
    assert row < 4 * (4 << 14)


def test_collectives_count_what_a_ring_sends(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(data=4, tensor=2)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding.named(mesh, "BV"))
    w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=sharding.named(mesh, ("V", None)))

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x @ w, sharding.named(mesh, ("B", None)))

    with jax.set_mesh(mesh):
        got = counted(product, x, w)
    assert got.flops == 2 * 64 * 32 * 16 / 8
    assert dict(got.sent) == {"all-reduce": 2 * (2 - 1) / 2 * (64 / 4) * 16 * 4}


# How a TPU's compiler writes a scan of 12 matrix products, shortened: the product is a convolution,
# batched over its space, the loop says no number but counts by two, and one collective goes on
# beside two pieces.
TPU = """HloModule jit_f, is_scheduled=true

%piece (p.1: bf16[8,64]) -> bf16[32,64] {
  %p.1 = bf16[8,64]{1,0:T(8,128)} parameter(0)
  ROOT %ag.1 = bf16[32,64]{1,0} all-gather(%p.1), channel_id=3, replica_groups=mesh['x'=2,'y'=4] {'y'}
}

%same (p.2: bf16[8,64]) -> bf16[32,64] {
  %p.2 = bf16[8,64]{1,0:T(8,128)} parameter(0)
  ROOT %ag.2 = bf16[32,64]{1,0} all-gather(%p.2), channel_id=3, replica_groups=mesh['x'=2,'y'=4] {'y'}
}

%body (carry.1: (s32[], f32[8,4,16,32], bf16[8,64])) -> (s32[], f32[8,4,16,32], bf16[8,64]) {
  %carry.1 = (s32[]{:T(128)}, f32[8,4,16,32]{3,2,1,0}, bf16[8,64]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %x.1 = f32[8,4,16,32]{3,2,1,0} get-tuple-element(%carry.1), index=1
  %w.1 = bf16[8,64]{1,0} get-tuple-element(%carry.1), index=2
  %first = bf16[32,64]{1,0:S(1)} fusion(%w.1), kind=kCustom, calls=%piece
  %second = bf16[32,64]{1,0:S(1)} fusion(%w.1), kind=kCustom, calls=%same
  %y.1 = f32[8,4,16,32]{3,2,1,0} convolution(%x.1, %x.1), window={size=8x4 stride=7x3 lhs_dilate=8x4}, dim_labels=01bf_01io->01bf
  %two = s32[]{:T(128)} constant(2)
  %i.3 = s32[]{:T(128)} add(%i.1, %two)
  ROOT %next = (s32[], f32[8,4,16,32], bf16[8,64]) tuple(%i.3, %y.1, %w.1)
}

%condition (carry.2: (s32[], f32[8,4,16,32], bf16[8,64])) -> pred[] {
  %carry.2 = (s32[]{:T(128)}, f32[8,4,16,32]{3,2,1,0}, bf16[8,64]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(24)
  %i.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  ROOT %more = pred[]{:T(512)} compare(%i.2, %limit), direction=LT
}

ENTRY %main (a: f32[8,4,16,32], b: bf16[8,64]) -> f32[8,4,16,32] {
  %a = f32[8,4,16,32]{3,2,1,0} parameter(0)
  %b = bf16[8,64]{1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[], f32[8,4,16,32], bf16[8,64]) tuple(%zero, %a, %b)
  %loop = (s32[], f32[8,4,16,32], bf16[8,64]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,4,16,32]{3,2,1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_what_a_tpus_compiler_writes() -> None:
    got = hlo.work(TPU)
    assert got.flops == 12 * 2 * (8 * 4) * 16 * 16 * 32
    assert dict(got.sent) == {"all-gather": 12 * 3 * 8 * 64 * 2}
    big = 8 * 4 * 16 * 32 * 4
    # Read twice, written once; what is gathered stays on the chip.
    assert got.hbm == pytest.approx(12 * 3 * big, rel=1e-3)


def test_what_a_gpus_compiler_writes() -> None:
    """cuBLAS computes the products, batched or not, and is given scratch memory."""
    gemm = (
        'custom_call_target="__cublas${}", backend_config={{"operation_queue_id":"0",'
        '"gemm_backend_config":{{"alpha_real":1,"beta":0,"dot_dimension_numbers":{{'
        '"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],'
        '"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}},"epilogue":"DEFAULT"}}}}'
    )
    for target in ("gemm", "lt$matmul"):
        program = f"""HloModule jit_f, is_scheduled=true

ENTRY %main (a: bf16[8,32,64], b: bf16[8,64,16]) -> bf16[8,32,16] {{
  %a = bf16[8,32,64]{{2,1,0}} parameter(0)
  %b = bf16[8,64,16]{{2,1,0}} parameter(1)
  %c = (bf16[8,32,16]{{2,1,0}}, s8[4194304]{{0}}) custom-call(%a, %b), {gemm.format(target)}
  ROOT %out = bf16[8,32,16]{{2,1,0}} get-tuple-element(%c), index=0
}}
"""
        got = hlo.work(program)
        assert got.flops == 2 * 8 * 32 * 64 * 16
        assert got.hbm == 2 * 8 * (32 * 64 + 64 * 16 + 32 * 16)


def test_what_is_updated_in_place_moves_the_update_alone() -> None:
    """As a TPU writes a slot's key: its scatter, in a fusion or alone, is given the whole cache."""
    alone = """HloModule jit_f, is_scheduled=true

%write (cache: bf16[64,32,128], at: s32[4,1], new: bf16[4,32,128]) -> bf16[64,32,128] {
  %cache = bf16[64,32,128]{2,1,0} parameter(0)
  %at = s32[4,1]{1,0} parameter(1)
  %new = bf16[4,32,128]{2,1,0} parameter(2)
  ROOT %kept = bf16[64,32,128]{2,1,0} scatter(%cache, %at, %new), update_window_dims={1,2}, to_apply=%second
}
"""  # noqa: E501
    fused = """
ENTRY %main (cache.1: bf16[64,32,128], at.1: s32[4,1], new.1: bf16[4,32,128]) -> bf16[64,32,128] {
  %cache.1 = bf16[64,32,128]{2,1,0} parameter(0)
  %at.1 = s32[4,1]{1,0} parameter(1)
  %new.1 = bf16[4,32,128]{2,1,0} parameter(2)
  ROOT %out = bf16[64,32,128]{2,1,0} fusion(%cache.1, %at.1, %new.1), kind=kCustom, calls=%write
}
"""
    moved = 4 * 4 + 2 * (4 * 32 * 128 * 2)
    assert hlo.work(alone.replace("%write", "ENTRY %write")).hbm == moved
    assert hlo.work(alone + fused).hbm == moved


@pytest.mark.parametrize("taken", ["whole", "slice"])
def test_what_a_fusion_within_a_fusion_sees_otherwise_is_read(taken: str) -> None:
    """As a TPU reads a matrix where it multiplies: in a shape that an inner fusion gives it."""
    use = {
        "whole": "%big = f32[64,32,1] multiply(%same, %same)",
        "slice": "%big = f32[2,32,1] slice(%same), slice={[0:2], [0:32], [0:1]}",
    }[taken]
    out = use.split()[2]
    program = f"""HloModule jit_f, is_scheduled=true

%seen (x: f32[64,32]) -> f32[64,32,1] {{
  %x = f32[64,32]{{1,0}} parameter(0)
  ROOT %b = f32[64,32,1]{{1,0,2}} bitcast(%x)
}}

%use (w: f32[64,32]) -> {out} {{
  %w = f32[64,32]{{1,0}} parameter(0)
  %same = f32[64,32,1]{{1,0,2}} fusion(%w), kind=kLoop, calls=%seen
  ROOT {use}
}}

ENTRY %main (w.1: f32[64,32]) -> {out} {{
  %w.1 = f32[64,32]{{1,0}} parameter(0)
  ROOT %out = {out} fusion(%w.1), kind=kOutput, calls=%use
}}
"""
    rows = {"whole": 64, "slice": 2}[taken]
    assert hlo.work(program).hbm == 2 * rows * 32 * 4


def test_what_is_made_to_be_updated_is_written_as_a_whole() -> None:
    program = """HloModule jit_f, is_scheduled=true

%write (at: s32[4,1], new: f32[4,32,128]) -> f32[64,32,128] {
  %at = s32[4,1]{1,0} parameter(0)
  %new = f32[4,32,128]{2,1,0} parameter(1)
  %zero = f32[] constant(0)
  %zeros = f32[64,32,128]{2,1,0} broadcast(%zero), dimensions={}
  ROOT %kept = f32[64,32,128]{2,1,0} scatter(%zeros, %at, %new), update_window_dims={1,2}, to_apply=%add
}

ENTRY %main (at.1: s32[4,1], new.1: f32[4,32,128]) -> f32[64,32,128] {
  %at.1 = s32[4,1]{1,0} parameter(0)
  %new.1 = f32[4,32,128]{2,1,0} parameter(1)
  ROOT %out = f32[64,32,128]{2,1,0} fusion(%at.1, %new.1), kind=kCustom, calls=%write
}
"""  # noqa: E501
    assert hlo.work(program).hbm == 4 * 4 + (4 + 64) * 32 * 128 * 4


def dense(tokens: int) -> int:
    """FLOPs of the layers' matrices, forward, written out."""
    attention = 4 * WIDTH * HEADS * SIZE
    return 2 * tokens * LAYERS * (attention + 2 * WIDTH * MLP)


def attention(tokens: int) -> int:
    """FLOPs of the two products with all keys of a row, forward; a row is one block."""
    return 2 * 2 * tokens * LAYERS * HEADS * SIZE * T


@pytest.mark.parametrize("word", ["auto", "jax"])
def test_every_program_does_what_was_counted_by_hand(word: str, mesh: Mesh) -> None:
    by_kernel = word == "auto" and cpu_kernels.available()
    programs = Programs(tiny(**{"model.attention": word}), mesh)
    score = plan.compile_(programs.score())
    assert score.work.flops == pytest.approx(dense(B * T) + attention(B * T), rel=0.01)

    step = plan.compile_(programs.train("finetune"))
    tokens, logits = 2 * B * T, 2 * 2 * B * T * WIDTH * V  # of 2 microbatches
    # Attention is computed anew in the backward pass, by the kernel but for its second product.
    by_hand = 3 * dense(tokens) + 3 * logits + (3.5 if by_kernel else 4) * attention(tokens)
    assert step.work.flops == pytest.approx(by_hand, rel=0.001)
    parameters = 4 * (programs.score().useful / (2 * B * T) + WIDTH * (V + 1024))
    assert 4 * parameters < step.memory < 13 * parameters  # and moments, gradients, activations

    prefill, decoded = (plan.compile_(p) for p in programs.sample())
    slots, S, W = 2 * 4, 224, 16
    looks = slots if by_kernel else 2 * slots  # at each of 2 prompts, in JAX, as by all slots
    kv = LAYERS * 4 * HEADS * SIZE * (looks * S + slots * W)
    head = 2 * slots * WIDTH * V
    assert decoded.work.flops == pytest.approx(5 * (dense(slots) + head + kv), rel=0.01)
    # Of the last layer only keys and values are wanted; blocks of 32 queries see 1..7 blocks.
    kv_only = 2 * S * 2 * WIDTH * HEADS * SIZE
    blocks = sum(range(1, 8)) if not by_kernel else 7 * 7  # the most that it computes
    causal = 2 * 2 * HEADS * SIZE * 32 * 32 * blocks
    by_hand = (LAYERS - 1) * (dense(S) // LAYERS + causal) + kv_only
    assert prefill.work.flops == pytest.approx(by_hand, rel=0.001)
    asked = programs.sample()[0]
    assert asked.useful == (LAYERS - 1) * (dense(S) // LAYERS) + kv_only < prefill.work.flops


def test_what_must_move_is_counted_by_hand(make_mesh: MakeMesh) -> None:
    config = tiny(**{"mesh.sampling": "tensor"})
    programs = Programs(config, make_mesh(fsdp=4))
    matrices = dense(1) // 2 + V * WIDTH
    kv = LAYERS * 2 * HEADS * SIZE * 4 * (2 * plan.QUESTION + 8 * plan.FILLED)
    prefill, decoded = programs.sample()
    assert decoded.moves == 5 * (4 * matrices + kv) / 4
    last = LAYERS * (4 * WIDTH * HEADS * SIZE + 2 * WIDTH * MLP) // LAYERS
    assert prefill.moves == (matrices - V * WIDTH - last + 2 * WIDTH * HEADS * SIZE) * 4 / 4
    # Weights, which positions have too, and two moments are read and written.
    trained = matrices + 1024 * WIDTH
    assert programs.train("finetune").moves == pytest.approx(
        24 * trained / 4, rel=0.05
    )  # and biases
    assert programs.score().moves == 4 * dense(1) // 2 / 4


def test_what_devices_share_they_halve(make_mesh: MakeMesh) -> None:
    one, more = make_mesh(), make_mesh(fsdp=2, tensor=2)
    for kind in ("train", "score"):
        programs = [Programs(tiny(), mesh) for mesh in (one, more)]
        made = [p.score() if kind == "score" else p.train("finetune") for p in programs]
        alone, shared = map(plan.compile_, made)
        # Logits are computed anew on a mesh only.
        assert alone.work.flops <= 4 * shared.work.flops < 1.05 * alone.work.flops
        assert not alone.work.sent.total()
        assert shared.work.sent.total() > 0


def sent(mesh: Mesh, steps: int, **changes: Any) -> dict[str, float]:
    """What a device sends in so many steps of the sampler, of 16 slots."""
    program = Programs(tiny(**{"sample.prompts": 4} | changes), mesh).sample()[1]
    return plan.compile_(dataclasses.replace(program, steps=steps)).work.sent


def test_sampling_sends_no_vocabulary_of_weights(make_mesh: MakeMesh) -> None:
    weights = 16 * V * 4 * 3 / 4  # from the three other devices, of every slot
    assert sent(make_mesh(tensor=4), steps=1)["all-gather"] < weights / 2


def test_sampling_on_a_mesh_of_its_own_gathers_no_weights(make_mesh: MakeMesh) -> None:
    gathered = {}
    for word in ("same", "tensor"):
        programs = Programs(tiny(**{"mesh.sampling": word}), make_mesh(fsdp=4))
        assert programs.sampling_mesh.shape["tensor"] == (4 if word == "tensor" else 1)
        decoded = programs.sample()[1]
        assert decoded.mesh == programs.sampling_mesh
        work = plan.compile_(decoded).work
        assert work is not None
        gathered[word] = work.sent["all-gather"]
    assert gathered["tensor"] < gathered["same"] / 4


def test_what_can_not_be_loaded_does_not_fit(make_mesh: MakeMesh) -> None:
    """Weights that one key/value head keeps whole on every device of sampling's mesh."""
    config = tiny(**{"model.kv_heads": 1, "mesh.sampling": "tensor", "model.dtype": "bfloat16"})
    programs = Programs(config, make_mesh(fsdp=4))
    model = plan.model_of(config, "cpu")
    decoded = programs.sample()[1]
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(transformer.shapes(model))]
    assert decoded.loads == (4 + 2) * sum(sizes)
    cost = plan.Cost(decoded.loads, hlo.Work())
    chip = plan.Chip("cpu", decoded.loads - 1, 1e12, 1e12, 1e12, "4")
    assert not cost.fits(chip)
    assert cost.fits(dataclasses.replace(chip, memory=decoded.loads))


def test_a_search_takes_the_word_that_decodes_faster(
    make_mesh: MakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says it, and leaves its caller's config alone."""
    devices = list(make_mesh(fsdp=4).devices.flat)
    chip = plan.Chip("cpu", 2**30, 1e12, 1e12, 1e6, "4")  # slow links
    monkeypatch.setitem(plan.CHIPS, "v9", chip)
    monkeypatch.setattr(plan, "slice_devices", lambda _: devices)
    config = tiny()
    first = next(plan.lines(config, "v9"))
    assert first == (
        "v9:4, 4 chips: data=1 fsdp=4 tensor=1; mesh.sampling=tensor: data=1 fsdp=1 tensor=4"
    )
    assert config.mesh.sampling == "same"


def test_what_does_not_fit_the_devices_at_hand_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.CHIPS, "v9", plan.Chip("cpu", 1, 1e12, 1e12, 1e12, "8"))
    found = list(plan.lines(tiny(), None))
    told = "Its weights, and Adam's moments where it trains, need"
    assert found[-1] == f"It doesn't fit. {told} more than any slice of v9."


@pytest.mark.parametrize("stages", [["sample"], ["finetune"]])
def test_the_smallest_slice_that_may_do_is_always_told(
    stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    model = plan.model_of(config, "cpu")
    weights = model.parameters + model.vocab_size * model.width
    # Two chips hold what it samples with, and eight what it trains with.
    chip = plan.Chip("cpu", 2.1 * weights, 1e12, 1e12, 1e12, "1x1 1x2 2x2 2x4")
    monkeypatch.setitem(plan.CHIPS, "v9", chip)
    found = list(plan.lines(config, None, stages))
    slice_, count = {"sample": ("1x2", 2), "finetune": ("2x4", 8)}[stages[0]]
    assert f"need at least v9:{slice_}, with mesh.fsdp={count}; --topology=v9 " in found[-1]


def rows(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:] if "|" in line]


def test_a_plan_of_some_stages(capsys: pytest.CaptureFixture[str]) -> None:
    """Of no others; a bar says what is compiled. finetune trains the baseline too."""
    assert {row[0] for row in rows(list(plan.lines(tiny(), None, ["score"])))} == {"score"}
    assert "compiling score: values of 8 rows" in capsys.readouterr().err
    found = rows(list(plan.lines(tiny(), None, ["label", "finetune"])))
    assert [row[0] for row in found] == ["finetune", "baseline"]
    assert "1/1" in capsys.readouterr().err  # one program, compiled once
    with pytest.raises(ValueError, match="no stage 'train': use prepare, pretrain"):
        next(plan.lines(tiny(), None, ["train"]))


def test_a_gpus_rates_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = dataclasses.replace(plan.CHIPS["h100"], kind="cpu")
    monkeypatch.setitem(plan.CHIPS, "h100", chip)
    found = list(plan.lines(tiny(), None, ["score"]))
    assert all(row[2].endswith("of 75: fits") and float(row[6]) > 0 for row in rows(found))
    assert found[-1] == "It fits."  # no slice to look for


class Gpu:
    """As JAX shows one."""

    device_kind = "NVIDIA A100-SXM4-40GB"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 30 * 10**9}


def test_a_device_at_hand_has_what_jax_may_take() -> None:
    assert plan._chip(Gpu(), at_hand=False) == ("a100-40gb", plan.CHIPS["a100-40gb"])
    name, chip = plan._chip(Gpu(), at_hand=True)
    assert (name, chip.memory, chip.flops) == ("a100-40gb", 30e9, 312e12)


def test_a_plan_of_the_devices_at_hand() -> None:
    found = list(plan.lines(tiny(**{"mesh.fsdp": 2, "mesh.tensor": 2}), None))
    mesh = "data=2 fsdp=2 tensor=2"
    assert found[0] == f"8 x cpu: {mesh}; mesh.sampling=same: {mesh}"
    told = rows(found)
    assert all(len(row) == len(plan.COLUMNS) for row in told)
    stages = ["finetune", "baseline", "sample", "sample", "verify", "score", "score", "score"]
    assert [row[0] for row in told] == stages
    finetune, baseline = told[:2]
    assert finetune[2:-2] == baseline[2:-2]  # compiled once
    heldout = round(7473 * 0.02)
    tokens = (7473 - heldout) * (plan.QUESTION + plan.SOLUTION)
    assert finetune[-2] == f"{-(-2 * tokens // (2 * B * T)):,}"
    assert found[-1] == "No times: the rates of a cpu aren't known."


NO_ROOM = [
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 17.16G of 15.75G hbm. Exceeded",
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(17.16G) exceeds available HBM (15.75G).",
]


@pytest.mark.parametrize("told", NO_ROOM)
def test_what_finds_no_room_is_too_much(mesh: Mesh, told: str) -> None:
    class Jitted:
        def lower(self) -> "Jitted":
            return self

        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError(told)

    program = plan.Program("step", 100, (), Jitted(), (), useful=1.0, mesh=mesh)
    cost = plan.compile_(program)
    row, hours = plan._row("finetune", program, 1001, cost, plan.CHIPS["v5e"])
    assert row[2] == "17.2 of 16: TOO MUCH"
    assert math.isnan(hours)


def test_times_are_those_of_the_slowest(make_mesh: MakeMesh) -> None:
    chip = plan.CHIPS["v5e"]
    work = hlo.Work(flops=197e12, hbm=2 * 819e9)
    work.sent["all-gather"] = 100e9
    limit, seconds = plan.Cost(1.0, work).limit(chip)
    assert (limit, seconds) == ("memory", pytest.approx(2.0))
    mesh = make_mesh(fsdp=4)
    program = plan.Program("step", 100, (), None, (), useful=4 * 197e12, mesh=mesh)
    row, hours = plan._row("finetune", program, 1001, plan.Cost(2**30, work), chip)
    assert hours == pytest.approx(11 * 2 * 4 / 3600)
    assert row[2] == "1.0 of 16: fits"
    assert row[-4:] == ["2.00", "50%", "11", "0.0244"]
    slow = dataclasses.replace(program, moves=1.25 * 819e9)  # more than its FLOPs take
    assert plan._row("finetune", slow, 1001, plan.Cost(2**30, work), chip)[0][-4] == "1.60"


def test_amounts_follow_the_config(mesh: Mesh) -> None:
    config = tiny(**{"data.train_size": 3, "verify.branches": 2, "sample.completions": 5})
    config.sample.heldout_completions = 0
    config.verify.row_tokens = 1024

    def amounts() -> dict[tuple[str, int], float]:
        work = Programs(config, mesh).work()
        return {(stage, i): amount for i, (stage, _, amount) in enumerate(work)}

    found = amounts()
    assert found["finetune", 0] == 2 * 3 * (plan.QUESTION + plan.SOLUTION)
    assert found["sample", 3] == 3 * 5 * plan.SOLUTION
    # Trees of 2, 2 and 1 completions and a gold one, whose last token isn't computed.
    branches = 5 * plan.SOLUTION + 3 * (plan.SOLUTION - 1)
    assert found["verify", 4] == 3 * (3 * plan.QUESTION + branches)
    each = plan.QUESTION + config.sample.test_completions * plan.SOLUTION
    assert found["score", max(i for _, i in found)] == plan.TEST * each
    config.sample.imported = "completions.jsonl"
    assert ("verify", 2) in amounts()


@pytest.mark.parametrize(
    "topology", ["v5e:", "v9:2x2", "h100", "h100:2x2", "v5p:2x2", "4x4", "v5e:4x4x4"]
)
def test_an_unknown_slice_is_one_line(topology: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match=r"--topology=.*: use .*v5e|--topology=.*2x2") as raised:
        plan.slice_devices(topology)
    assert "\n" not in str(raised.value)


def test_a_missing_libtpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs libtpu: pip install -e '\.\[tpu\]'"):
        next(plan.lines(tiny(), "v5e:2x2"))


def test_the_command_needs_no_workdir() -> None:
    command = [sys.executable, "-m", "gsm_verifier.main", "--config=configs/quickstart.py"]
    done = subprocess.run(
        [*command, "--plan", "--topology=v9:2x2"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("gsm_verifier: --topology=v9:2x2: use v5e")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode
    assert "--workdir is missing" in done.stderr


@WITH_LIBTPU
def test_a_tpus_compiler_says_the_same() -> None:
    config = tiny(**{"model.dtype": "bfloat16", "mesh.fsdp": 4})
    devices = plan.slice_devices("v5e:2x2")
    mesh = sharding.make_mesh(1, 4, 1, devices=devices)
    cost = plan.compile_(Programs(config, mesh).score())
    assert cost.work.flops == pytest.approx((dense(B * T) + attention(B * T)) / 4, rel=0.01)
    assert 0 < cost.memory < 2**30
    slots = Programs(config, mesh).sample()[1].arguments[1]
    assert slots.caches[0].prompt_k_UPKSH.dtype == "bfloat16"  # which a CPU would keep in float32


@WITH_LIBTPU
def test_a_tpu_gathers_the_table_once_a_chunk() -> None:
    """A CPU gathers everything before the loop."""
    mesh = sharding.make_mesh(1, 4, 1, devices=plan.slice_devices("v5e:2x2"))
    few, more = (sent(mesh, steps, **{"model.dtype": "bfloat16"})["all-gather"] for steps in (5, 6))
    share = 2 * 3 / 4  # bytes of a number, of which three quarters come from elsewhere
    layers = share * LAYERS * (4 * WIDTH * HEADS * SIZE + 2 * WIDTH * MLP)
    table = share * V * WIDTH
    assert layers <= more - few < layers + table / 2
    assert few - 5 * (more - few) == pytest.approx(table)


@WITH_LIBTPU
def test_a_tpu_decodes_near_its_floor_and_copies_no_keys_or_values() -> None:
    """Two layers of the paper's 6B."""
    config = runpy.run_path(str(REPOSITORY / "configs/paper/scale.py"))["get_config"]("6b")
    config.model.layers = 2
    mesh = sharding.make_mesh(1, 4, 1, devices=plan.slice_devices("v5e:2x2"))
    decoded = Programs(config, mesh).sample()[1]
    with jax.set_mesh(decoded.mesh):
        text = decoded.jitted.lower(*decoded.arguments).compile().as_text()
    few, more = (hlo.work(text, steps).hbm for steps in (5, 6))
    params, slots, *_ = decoded.arguments

    def held(tree: Any) -> int:
        arrays = jax.tree.leaves(tree)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)

    # Of weights, and keys and values that are filled; of all that are kept.
    assert more - few < 1.5 * decoded.moves / decoded.steps
    assert more - few < 1.05 * held((params, slots.caches))
    assert few - 5 * (more - few) < held(slots.caches)  # before the first step and after the last
    shapes = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(slots.caches)}
    copied = re.findall(r" = \w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\(", text)
    assert copied
    assert not shapes & {tuple(map(int, shape.split(","))) for shape in copied}


@WITH_LIBTPU
def test_a_mesh_that_a_run_refuses_is_refused() -> None:
    devices = plan.slice_devices("v5e:2x4")
    first, second = ([d for d in devices if d.process_index == i] for i in range(2))
    # The rows of two pairs lie on one host, those of the other two on both.
    order = [*first[:2], first[2], second[0], second[1], first[3], *second[2:]]
    mesh = Mesh(np.array(order).reshape(1, 4, 2), sharding.AXES)
    with pytest.raises(ValueError, match="cuts rows across 2 processes unevenly"):
        Programs(tiny(), mesh)
    with pytest.raises(ValueError, match=r"mesh data=2 fsdp=2 tensor=4: .* can't be cut so"):
        next(plan.lines(tiny(**{"mesh.fsdp": 2, "mesh.tensor": 4}), "v5p:2x2x4"))


@WITH_LIBTPU
def test_no_program_for_absent_devices_is_kept(tmp_path: Path) -> None:
    """It can't be read back."""
    command = [sys.executable, "-m", "gsm_verifier.main", "--config=configs/quickstart.py:tiny"]
    done = subprocess.run(
        [*command, "--plan", "--topology=v5e:2x2", "--stages=score"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "values of" in done.stdout
    assert not list(tmp_path.rglob("jit_values*"))


LAUNCH = REPOSITORY / "launch"
PLANS = sorted((LAUNCH / "plans").glob("*.txt"))


def quoted(path: Path) -> str:
    """The row of launch/README.md's table that a plan, kept with its command, stands in."""
    lines = path.read_text().splitlines()[2:]
    slice_, *meshes = re.match(r"(\S+), .*?: (.*); .*?: (.*)", lines[0]).groups()
    short = [" ".join(word for word in mesh.split() if not word.endswith("=1")) for mesh in meshes]
    found = {row[0] + re.sub(r"[\d,]+", "#", row[1]): row for row in rows(lines)}
    memory = max((row[2] for row in found.values()), key=lambda cell: float(cell.split()[0]))
    assert memory.endswith(": fits")

    def told(name: str) -> str:
        at_best, limit, floor, mfu = found[name][6:10]
        return f"{at_best} ms, {limit}, {floor}, {mfu}"

    decode = "sample# steps of # slots"
    slots = found[decode][1].removeprefix("16 steps of ")
    hours = next(line for line in lines if line.startswith("Chip-hours"))
    cells = [
        f"[{path.name.split('-')[0].upper()}](plans/{path.name})",
        slice_,
        "; ".join(short),
        memory.removesuffix(": fits"),
        told("finetunestep of # tokens"),
        f"{slots}: {told(decode)}",
        told("scorevalues of # rows"),
        *re.findall(r"[a-z] ([\d.,]*\d)", hours),
    ]
    return f"| {' | '.join(cells)} |"


def test_the_readmes_table_is_what_the_command_said() -> None:
    readme = (LAUNCH / "README.md").read_text()
    whole = [path for path in PLANS if "--stages" not in path.read_text()]
    table = re.findall(r"^\| \[.*\]\(plans/.*$", readme, re.MULTILINE)
    assert sorted(table) == sorted(map(quoted, whole))
    assert len(table) == 6
    for path in PLANS:
        assert f"(plans/{path.name})" in readme


@WITH_LIBTPU
@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_run_takes_the_meshes_of_the_readmes_table(path: Path) -> None:
    """On the slice itself, whose hosts and shape may not suit a mesh."""
    command, _, head, *_ = path.read_text().splitlines()
    flags = dict(word[2:].partition("=")[::2] for word in command.split()[3:])
    file, _, size = flags["config"].partition(":")
    config = runpy.run_path(str(REPOSITORY / file))["get_config"](size)
    for key, value in flags.items():
        if key.startswith("config."):
            config.update_from_flattened_dict({key.removeprefix("config."): int(value)})
    sizes = [config.mesh[axis] for axis in sharding.AXES]
    mesh = sharding.make_mesh(*sizes, devices=plan.slice_devices(flags["topology"]))
    sampling = Programs(config, mesh).sampling_mesh
    meshes = f"{plan._axes(mesh)}; mesh.sampling={config.mesh.sampling}: {plan._axes(sampling)}"
    assert head == f"{flags['topology']}, {mesh.size} chips: {meshes}"
