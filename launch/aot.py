"""Compile a run's train step for a TPU slice that need not be there: does it fit, what moves, how fast at best.

python -m launch.aot --config=configs/paper.py:1.3B,interdomain --topology=v5p:2x2x2 --config.mesh.fsdp=8

The program is the one that `launch.train` would run, kernels included, compiled by the TPU's own compiler. What is
printed of it, each chip and step:

  memory       arguments by kind, and temporaries as the compiler allocated them, beside the chip's HBM
  collectives  bytes that a chip sends, by kind, from the compiled program, loops multiplied out (a ring's share: an
               all-gather of n shards sends (n - 1)/n of its result, an all-reduce twice that)
  FLOPs        of the model's mathematics, and what rematerialisation adds
  roofline     the longest of three times at published peaks, were they reached and all overlapped: products, HBM (an
               estimate: weights, optimiser, inputs and outputs of products), links. A bound, not a prediction.
"""

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags
from ml_collections import config_flags

from idattn.config import Config, from_config_dict
from idattn.costs import count_parameters, forward_flops_per_token, training_flops_per_token
from launch.tpu_compiler import load_compiler

FLAGS = flags.FLAGS


class Chip(NamedTuple):
    """Published figures of a chip (cloud.google.com/tpu/docs/{v5e,v5p,v6e}); links one way, all of them together."""

    hbm_gib: float
    flops: float
    hbm_bytes: float
    link_bytes: float


CHIPS = {
    "v5e": Chip(16, 197e12, 819e9, 200e9),
    "v5p": Chip(95, 459e12, 2765e9, 600e9),
    "v6e": Chip(32, 918e12, 1600e9, 400e9),
}
_COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def compile_step(config: Config, topology: str) -> dict[str, Any]:
    """The figures of the module's docstring for a run on a slice; `fits` is False where the compiler ran out of HBM.

    Raises:
      ValueError: the mesh does not fit the slice, or does not divide what it splits.
    """
    from jax.experimental import topologies

    from idattn.sharding import make_mesh
    from idattn.train.step import Trainer

    name = topology.split(":")[0]
    if name not in CHIPS:
        raise ValueError(f"{topology=} must start with one of {', '.join(CHIPS)}.")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    trainer = Trainer(config, make_mesh(config.mesh, devices))
    state = trainer.abstract_state()
    figures = {
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(trainer.mesh.shape),
        "hbm_gib": CHIPS[name].hbm_gib,
        "parameter_bytes": _shard_bytes(state["params"]),
        "optimiser_bytes": _shard_bytes(state["opt_state"]),
    } | _times(config, dict(trainer.mesh.shape), CHIPS[name])
    with tempfile.TemporaryDirectory() as dump:
        try:
            compiled = trainer.lower_step().compile(
                compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
            )
        except jax.errors.JaxRuntimeError as error:
            # "... temporaries (29.86G) exceeds available HBM (15.75G)", or "Used 17.2G of 15.75G hbm".
            used = re.search(r"([\d.]+)G\)? (?:of|exceeds available HBM) \(?([\d.]+)G", str(error))
            if "RESOURCE_EXHAUSTED" not in str(error) or not used:
                raise
            return figures | {"fits": False, "needed_gib": float(used[1]), "usable_gib": float(used[2])}
        (file,) = Path(dump).glob("*.after_optimizations.txt")
        sent = count_collectives(file.read_text())
    memory = compiled.memory_analysis()
    figures |= {
        "fits": True,
        # At the peak; temp_size_in_bytes also counts what is never there at the same time.
        "temporary_bytes": memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
        "peak_gib": (memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes) / 2**30,
        "sent_bytes": sent,
    }
    seconds = figures["seconds"]
    seconds["links"] = sum(sent.values()) / CHIPS[name].link_bytes
    figures["bound"] = max(seconds, key=seconds.get)
    figures["mfu_at_most"] = figures["flops"] / CHIPS[name].flops / max(seconds.values())
    return figures


def _shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays given by shape and sharding."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _times(config: Config, mesh: dict[str, int], chip: Chip) -> dict[str, Any]:
    """FLOPs and seconds of a step on each chip, without what crosses between chips."""
    model, compute = config.model, config.compute
    chips, tokens = math.prod(mesh.values()), config.train.batch_size * config.data.seq_len
    forward = forward_flops_per_token(model, config.data.seq_len) - 2 * model.model_dim * model.vocab_size
    again = {"none": 0.0, "dots": 0.0, "mixer": forward, "block": forward}[compute.remat]  # of the blocks
    flops = training_flops_per_token(model, config.data.seq_len) * tokens / chips
    recomputed = (again + 2 * model.model_dim * model.vocab_size) * tokens / chips  # logits are always
    # Every product reads and writes its activations about once a pass, a layer's weights once a pass and part.
    passes = 3 if again == 0 else 4
    parameters = count_parameters(model)["total"]
    width = jax.numpy.dtype(compute.dtype).itemsize
    activations = model.num_layers * (10 * model.model_dim + 4 * model.mlp_dim) + model.vocab_size
    weights = parameters / mesh["tensor"] * width * config.train.accumulation
    state = 32 * parameters / (mesh["fsdp"] * mesh["tensor"])  # gradient, parameter, moments: read and written, float32
    hbm = passes * (weights + activations * width * tokens / (chips / mesh["tensor"]) / mesh["tensor"]) + state
    seconds = {"products": (flops + recomputed) / chip.flops, "HBM": hbm / chip.hbm_bytes}
    return {"flops": flops, "recomputed_flops": recomputed, "hbm_bytes": hbm, "seconds": seconds}


def count_collectives(text: str) -> dict[str, int]:
    """Bytes that a chip sends in a run of the HLO module `text`, by kind of collective, loops multiplied out.

    Raises:
      ValueError: a loop around a collective does not say how often it runs.
    """
    bodies, current = {}, []
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = bodies["ENTRY" if match[1] else match[2]] = []
        else:
            current.append(line)
    sent: dict[str, int] = {}
    seen = set()

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                walk(loop[2], times * _trips(bodies[loop[1]], bodies[loop[2]]))
            elif match := _COLLECTIVE.search(line.split(", metadata=")[0]):
                # The parts of one collective, started and finished in several fusions, share a channel.
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel and channel[1] != "1" else (name, line.split(" = ")[0])
                # A fusion that keeps only its shard of a sum.
                kind, part = ("reduce-scatter", 0.5) if name.startswith("all-reduce-scatter") else (match[1], 1)
                if key not in seen:
                    seen.add(key)
                    sent[kind] = sent.get(kind, 0) + round(times * part * _sent(match[1], line))
            else:
                for called in re.findall(r"(?:calls|to_apply|branch_computations)=\{?([%\w.\-, ]+)", line):
                    for part in called.split(","):
                        if part.strip().startswith("%"):
                            walk(part.strip()[1:], times)

    walk("ENTRY", 1)
    return sent


def _trips(condition: list[str], body: list[str]) -> int:
    """How often a loop runs that counts from 0 by a constant to the constant of its condition."""

    def operands(rows, pattern):
        match = re.search(rf"{pattern}\((.*?)\)", "\n".join(rows))
        return re.findall(r"%([\w.\-#]+)", match[1]) if match else []

    def constant(rows, name):
        match = re.search(rf"%{re.escape(name)} = [su]32\[\]\S* constant\((\d+)\)", "\n".join(rows))
        return int(match[1]) if match else 0

    counter, limit = operands(condition, r"ROOT .* compare") or ("", "")
    # An element of the loop's tuple is %tuple#3 to newer compilers, an instruction of its own to older ones.
    index = re.search(r"#(\d+)$", counter) or re.search(
        rf"%{re.escape(counter)} = .* get-tuple-element\(.*?\), index=(\d+)", "\n".join(condition)
    )
    results = operands(body, r"ROOT .* tuple")
    after = results[int(index[1])] if index and results else ""
    while copied := operands(body, rf"%{re.escape(after)} = .* copy"):
        (after,) = copied
    added = operands(body, rf"%{re.escape(after)} = .* add")
    limit, step = constant(condition, limit), max((constant(body, name) for name in added), default=0)
    if not limit or not step:
        raise ValueError(f"cannot tell how often a loop runs whose condition is {condition}.")
    return -(-limit // step)


def _sent(kind: str, line: str) -> int:
    """Bytes that a chip sends in one run of a collective instruction."""
    result = line.split(" = ", 1)[1]
    result = result[: _COLLECTIVE.search(result).start()]
    arrays = [
        _BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)
        if dtype in _BYTES
    ]
    if "-start(" in line and kind in ("all-gather", "collective-permute"):
        arrays = [max(arrays)]  # beside its operand and flags
    size = sum(arrays)
    if kind == "collective-permute":
        return size
    n = _group_size(line)
    return round({"all-gather": 1, "all-to-all": 1, "reduce-scatter": n, "all-reduce": 2}[kind] * size * (n - 1) / n)


def _group_size(line: str) -> int:
    groups = line.split("replica_groups=", 1)[1]
    if groups.startswith("mesh["):  # mesh['a'=2,'b'=4] {'b'}: the axes within a group
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", groups.split("]")[0])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", groups.split("{", 1)[1].split("}")[0]))
    if match := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(match[1])
    return groups.split("}")[0].count(",") + 1


def advice(figures: dict[str, Any], config: Config) -> str:
    """What makes a run that does not fit smaller."""
    part = config.train.batch_size // config.train.accumulation
    rows = part // (figures["mesh"]["data"] * figures["mesh"]["fsdp"])
    options = []
    if config.compute.remat != "block":
        options.append("--config.compute.remat=block")
    if rows > 1:
        options.append(f"--config.train.accumulation={2 * config.train.accumulation} ({rows} rows a chip now)")
    if figures["mesh"]["data"] > 1:
        options.append(f"--config.mesh.fsdp={figures['mesh']['fsdp'] * figures['mesh']['data']}")
    options.append("--config.mesh.sequence or --config.mesh.tensor greater, or more chips")
    return "; ".join(options)


def describe(figures: dict[str, Any], config: Config) -> str:
    """The figures as text."""
    gib = 2**30
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1)
    lines = [f"{'+'.join(config.model.mixers)} on {figures['topology']}, {figures['chips']} chips ({mesh}), each:"]
    for name in ("parameter", "optimiser", "temporary", "program"):
        if f"{name}_bytes" in figures:
            lines.append(f"  {name + ' memory':<26}{figures[f'{name}_bytes'] / gib:>10.2f} GiB")
    if not figures["fits"]:
        lines.append(
            f"DOES NOT FIT: {figures['needed_gib']:.2f} GiB needed, {figures['usable_gib']:.2f} GiB there. "
            f"Try {advice(figures, config)}."
        )
        return "\n".join(lines)
    spare = figures["hbm_gib"] - figures["peak_gib"]
    lines.append(
        f"  {'in all':<26}{figures['peak_gib']:>10.2f} GiB of {figures['hbm_gib']}: fits, {spare:.2f} GiB spare"
    )
    for kind, size in sorted(figures["sent_bytes"].items()):
        lines.append(f"  {kind + ' sends':<26}{size / 1e9:>10.3f} GB a step")
    lines.append(
        f"  {'FLOPs':<26}{figures['flops'] / 1e12:>10.1f} T a step, {figures['recomputed_flops'] / 1e12:.1f} T again"
    )
    times = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in figures["seconds"].items())
    lines.append(f"  roofline: {times}; bound by {figures['bound']}, MFU at most {figures['mfu_at_most']:.0%}")
    return "\n".join(lines)


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", help_string="FILE[:ARGUMENTS] of the run.")
    flags.DEFINE_string("topology", "v5e:4x4", "TPU slice, as v5e:4x4, v5p:2x2x2, v6e:16x16.")
    flags.DEFINE_string("json", None, "File to write the figures to.")
    flags.mark_flag_as_required("config")


def main(_):
    load_compiler(dump=False)
    config = from_config_dict(FLAGS.config)
    figures = compile_step(config, FLAGS.topology)
    print(describe(figures, config))
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    define_flags()
    app.run(main)
