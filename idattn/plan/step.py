"""A run's train step compiled for TPUs or GPUs: memory, bytes between chips, FLOPs, and how fast it could be."""

import math
import multiprocessing
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax

from idattn.chips import Chip, chip_of
from idattn.config import Config
from idattn.costs import count_parameters, forward_flops_per_token, training_flops_per_token
from idattn.plan.compiler import devices_of, is_out_of_memory, load_compiler, tpu_devices
from idattn.plan.cycles import PARTS, estimate
from idattn.plan.gpus import GPUS, gpu_of, pool_fraction
from idattn.plan.hlo import Instruction, count_collectives, parse
from idattn.plan.roofline import GPU_PARTS, bound
from idattn.plan.schedules import find_kernels, schedule_kernels, scheduled_cycles
from idattn.sharding import make_mesh
from idattn.train.step import Trainer


def compile_step(config: Config, topology: str) -> dict[str, Any]:
    """What the compiler says of a run on a slice or host; the compiler must be loaded.

    Args:
      config: of the run.
      topology: as v5e:4x4, 2xv5e:4x4 for two slices, or h100:8.

    Returns:
      Figures of one chip and step, JSON-ready: `fits`, False where the TPU's compiler ran out of HBM, or where a GPU's
      program needs more than `usable_gib`; memory; `sent_bytes` by kind of collective, `dcn_bytes` of those between
      slices; FLOPs; `seconds`, how long products, HBM, links and the network between slices need at published peaks, of
      which the longest is a bound; `predicted`, the step of this program: `seconds`, `mfu`, `cycles`, `parts` (cycles
      by name of `idattn.plan.cycles.PARTS`), and what has no estimate, `uncounted` and `uncounted_bytes`. For TPUs it
      is what the compiler's own estimates add up to. For GPUs it is a bound, of every launch at published peaks, with
      nanoseconds as cycles, and `launches` and `moved_bytes` by part.

    Raises:
      ValueError: the mesh does not fit the devices, or does not divide what it splits; the GPU has no bfloat16; the
        compiler has no cost model for the topology, or the program cannot be counted.
    """
    chip, gpu = chip_of(topology), gpu_of(topology)
    if gpu and config.compute.dtype == "bfloat16" and GPUS[gpu].capability < (8, 0):
        raise ValueError(f"{topology=} has no units for bfloat16; plan with --config.compute.dtype=float32.")
    devices = devices_of(topology)
    trainer = Trainer(config, make_mesh(config.mesh, devices))
    state = trainer.abstract_state()
    figures = {
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(trainer.mesh.shape),
        "hbm_gib": chip.hbm_gib,
        "parameter_bytes": _shard_bytes(state["params"]),
        "optimiser_bytes": _shard_bytes(state["opt_state"]),
    } | _times(config, dict(trainer.mesh.shape), chip)
    try:
        traced = trainer.trace_step()
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        # "... temporaries (29.86G) exceeds available HBM (15.75G)", or "Used 17.2G of 15.75G hbm".
        used = re.search(r"([\d.]+)G\)? (?:of|exceeds available HBM) \(?([\d.]+)G", str(error))
        if not (is_out_of_memory(error) and used):
            raise
        return figures | {"fits": False, "needed_gib": float(used[1]), "usable_gib": float(used[2])}
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None, "both compilers have both"
    module = parse(text)
    sent, between = count_collectives(module), count_collectives(module, "DCN")
    if gpu:  # all temporaries are one allocation, as large as the most that is there at the same time
        temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    else:  # at the peak; temp_size_in_bytes also counts what is never there at the same time
        temporary = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    needed = memory.argument_size_in_bytes + temporary + memory.generated_code_size_in_bytes
    figures |= {
        "fits": True,
        "temporary_bytes": temporary,
        "program_bytes": memory.generated_code_size_in_bytes,
        "peak_gib": needed / 2**30,
        "usable_gib": chip.hbm_gib * (pool_fraction() if gpu else 1),
        "sent_bytes": sent,
        "dcn_bytes": between,
    }
    if gpu and figures["peak_gib"] > figures["usable_gib"]:  # the GPUs' compiler refuses nothing
        figures |= {"fits": False, "needed_gib": figures["peak_gib"]}
    seconds = figures["seconds"]
    seconds["links"] = sum(sent.values()) / chip.link_bytes
    if between:
        seconds["DCN"] = sum(between.values()) / chip.dcn_bytes
    figures["bound"] = max(seconds, key=seconds.get)
    figures["mfu_at_most"] = figures["flops"] / chip.peak(config.compute.dtype) / max(seconds.values())
    if gpu:
        total = bound(module, chip)
    else:
        total = estimate(module, chip, _kernel_costs(config, topology, any(find_kernels(traced.jaxpr.jaxpr))))
    predicted = total.cycles / chip.clock
    figures["predicted"] = {
        "seconds": predicted,
        "mfu": figures["flops"] / chip.peak(config.compute.dtype) / predicted,
        "cycles": total.cycles,
        "parts": {name: total.parts[name] for name in PARTS},
        "uncounted": total.runs["uncounted"],
        "uncounted_bytes": total.moved_bytes["uncounted"],
    }
    if gpu:
        figures["predicted"] |= {"launches": dict(total.runs), "moved_bytes": dict(total.moved_bytes)}
    return figures


def _kernel_costs(config: Config, topology: str, has_kernels: bool) -> Callable[[Instruction], float]:
    """The cycles of a kernel's call in a run's step.

    The schedules come from another process, since the compiler writes the schedules of all that it compiles, or none.
    """
    costs = {}
    if has_kernels:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            costs = pool.submit(_schedule_kernels, config, topology).result()
    return scheduled_cycles(costs)


def _schedule_kernels(config: Config, topology: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """The cycles of each kernel of a run's step, by its name and the shapes of its operands."""
    with tempfile.TemporaryDirectory() as dump:
        load_compiler(dump_to=dump)
        traced = Trainer(config, make_mesh(config.mesh, tpu_devices(topology))).trace_step()
        return schedule_kernels(traced.jaxpr.jaxpr, topology, dump)


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
    recomputed = again * tokens / chips
    # Every product reads and writes its activations about once a pass, a layer's weights once a pass and part.
    passes = 3 if again == 0 else 4
    parameters = count_parameters(model)["total"]
    width = jax.numpy.dtype(compute.dtype).itemsize
    activations = model.num_layers * (10 * model.model_dim + 4 * model.mlp_dim) + model.vocab_size
    weights = parameters / mesh["tensor"] * width * config.train.accumulation
    state = 32 * parameters / (mesh["fsdp"] * mesh["tensor"])  # gradient, parameter, moments: read and written, float32
    hbm = passes * (weights + activations * width * tokens / (chips / mesh["tensor"]) / mesh["tensor"]) + state
    seconds = {"products": (flops + recomputed) / chip.peak(compute.dtype), "HBM": hbm / chip.hbm_bytes}
    return {"flops": flops, "recomputed_flops": recomputed, "hbm_bytes": hbm, "seconds": seconds}


def advice(figures: dict[str, Any], config: Config) -> str:
    """What makes a run that does not fit smaller."""
    parts = config.train.accumulation
    rows = config.train.batch_size // (figures["mesh"]["data"] * figures["mesh"]["fsdp"])
    options = []
    if config.compute.remat != "block":
        options.append("--config.compute.remat=block")
    if rows > parts:
        fewest = fewest_parts(figures, rows, parts) or rows
        options.append(f"--config.train.accumulation={fewest} ({rows // parts} rows a chip now)")
    if figures["mesh"]["data"] > 1:
        options.append(f"--config.mesh.fsdp={figures['mesh']['fsdp'] * figures['mesh']['data']}")
    if gpu_of(figures["topology"]) and figures["needed_gib"] < 0.9 * figures["hbm_gib"]:
        options.append("XLA_CLIENT_MEM_FRACTION=0.9 in the environment")
    options.append("--config.mesh.sequence or --config.mesh.tensor greater, or more chips")
    return "; ".join(options)


def fewest_parts(figures: dict[str, Any], rows: int, parts: int) -> int | None:
    """The fewest equal parts of the `rows` of a chip that could fit where `parts` do not; None if no number could.

    What a part needs is at best in proportion to its rows.
    """
    least = parts * figures["needed_gib"] / figures["usable_gib"]
    return next((n for n in range(parts + 1, rows + 1) if rows % n == 0 and n >= least), None)


def describe(figures: dict[str, Any], config: Config) -> str:
    """The figures as text."""
    gib, gpu = 2**30, gpu_of(figures["topology"])
    of_card = f", the part that JAX takes of the card's {figures['hbm_gib']}" if gpu else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1)
    chips = f"{figures['chips']} chips ({mesh}), each" if mesh else "one chip"
    lines = [f"{'+'.join(config.model.mixers)} on {figures['topology']}, {chips}:"]
    for name in ("parameter", "optimiser", "temporary", "program"):
        if figures.get(f"{name}_bytes"):
            lines.append(f"  {name + ' memory':<26}{figures[f'{name}_bytes'] / gib:>10.2f} GiB")
    if not figures["fits"]:
        lines.append(
            f"DOES NOT FIT: {figures['needed_gib']:.2f} GiB needed, {figures['usable_gib']:.2f} GiB there{of_card}. "
            f"Try {advice(figures, config)}."
        )
        return "\n".join(lines)
    spare = (figures["usable_gib"] if gpu else figures["hbm_gib"]) - figures["peak_gib"]
    room = f"{figures['usable_gib']:.1f}{of_card}" if gpu else figures["hbm_gib"]
    lines.append(f"  {'in all':<26}{figures['peak_gib']:>10.2f} GiB of {room}: fits, {spare:.2f} GiB spare")
    for kind, size in sorted(figures["sent_bytes"].items()):
        lines.append(f"  {kind + ' sends':<26}{size / 1e9:>10.3f} GB a step")
    for kind, size in sorted(figures["dcn_bytes"].items()):
        lines.append(f"  {kind + ' over DCN':<26}{size / 1e9:>10.3f} GB a step")
    lines.append(
        f"  {'FLOPs':<26}{figures['flops'] / 1e12:>10.1f} T a step, {figures['recomputed_flops'] / 1e12:.1f} T again"
    )
    lines += _describe_program(figures["predicted"])
    times = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in figures["seconds"].items())
    lines.append(f"  bound: {times}; by {figures['bound']}, MFU at most {figures['mfu_at_most']:.0%}")
    return "\n".join(lines)


def _describe_program(predicted: dict[str, Any]) -> list[str]:
    """The step of the compiled program, by part."""
    milliseconds = f"{predicted['seconds'] * 1e3:,.1f} ms"
    if "launches" in predicted:
        launches, moved = predicted["launches"], predicted["moved_bytes"]
        lines = [
            f"  program: at least {milliseconds}, MFU at most {predicted['mfu']:.0%}, every launch at published peaks:"
        ]
        for name, ns in predicted["parts"].items():
            row = f"{ns / 1e6:>10,.1f} ms {ns / predicted['cycles']:>6.1%}{launches.get(name, 0):>8,} launches"
            lines.append(f"    {GPU_PARTS[name]:<46}{row}{moved.get(name, 0) / 1e9:>10,.1f} GB")
        return [
            *lines,
            f"    {sum(launches.values()):,} launches move {sum(moved.values()) / 1e9:,.1f} GB; without the time to "
            "start them, links slower than their peak, and kernels that a GPU would choose by trial",
        ]
    lines = [f"  predicted: {milliseconds}, MFU {predicted['mfu']:.0%}, by the compiler's estimates:"]
    for name, cycles in predicted["parts"].items():
        lines.append(f"    {PARTS[name]:<38}{cycles / 1e6:>10,.1f} M cycles {cycles / predicted['cycles']:>6.1%}")
    return [
        *lines,
        f"    without {predicted['uncounted']:,} instructions that have no estimate and move "
        f"{predicted['uncounted_bytes'] / 1e9:.1f} GB, waits of kernels for HBM, and links slower than their peak",
    ]


def compare(first: dict[str, Any], second: dict[str, Any]) -> str:
    """The predicted steps of two runs that fit, by part, as text."""
    one, other = first["predicted"], second["predicted"]
    rows = [(PARTS[name], one["parts"][name], other["parts"][name]) for name in PARTS]
    rows.append(("step", one["cycles"], other["cycles"]))
    unit = "ms, at least" if "launches" in one else "M cycles"
    lines = [f"  {unit:<40}{'config':>10}{'compare':>10}{'ratio':>8}"]
    for name, x, y in rows:
        lines.append(f"  {name:<40}{x / 1e6:>10,.1f}{y / 1e6:>10,.1f}" + (f"{y / x:>8.2f}" if x else ""))
    return "\n".join(lines)
