"""`router-tuning fit`: layers, routers, thresholds and patches in closed form, by forward passes alone."""

from __future__ import annotations

import contextlib
from pathlib import Path

from vllm_mod.checkpoint import write_checkpoint
from vllm_mod.config import ConfigError
from vllm_mod.granularity import POLICIES

from . import card
from .arguments import check_output, make_mod_config
from .choice import Choice, best, choices
from .cost_routers import saving
from .costs_file import CostsFile, fingerprint
from .data import calibration_samples, check_sources
from .export import base_shape
from .fit_arguments import FitArguments
from .flag_words import parse_window
from .hub import local_model
from .interrupt import deferred
from .loading import fitting_dtype, on_best_device
from .model import load_base
from .patch_record import PATCHES_FILE
from .patched_choice import Patching, nearest
from .patches import check_rank
from .patching import beside
from .preflight import check_vocabulary, check_writable
from .selection import Measured, every_layer, measure, report
from .unfinished import Unfinished

#: Fewer say nothing about how requests differ.
_FEWEST = 16
#: Kept ratio where none is asked for.
_DEFAULT_KEPT = 0.5


def fit(args: FitArguments, records: dict[str, str]) -> Path:
    """Measure, fit, write `args.output`; raises ConfigError, with nothing written, on anything that cannot be."""
    check_output(args.output)
    target, window = _checked(args)
    base = local_model(args.model)
    shape = base_shape(base)
    named = None if args.layers is None else list(make_mod_config(args, shape).layers)
    check_rank(args.patch_rank, every_layer(shape, target, window), shape.hidden_size, "--patch-rank")
    check_sources(args.data)
    samples, counts = calibration_samples(args, base, args.seed)
    check_vocabulary(base, samples)
    if len(samples) < _FEWEST:
        raise ConfigError(f"{', '.join(args.data)}: {len(samples)} usable samples; {_FEWEST} are needed")
    if args.measured_samples < _FEWEST:
        raise ConfigError(f"--measured-samples {args.measured_samples}: {_FEWEST} or more are needed")
    if args.skip is not None and not 0 < args.skip < shape.num_layers:
        raise ConfigError(
            f"--skip {args.skip:g}: the model has {shape.num_layers} layers; a number above 0 and below that is needed"
        )
    dtype = fitting_dtype(base, args.bf16)
    place = check_writable(Path(args.output), Path(args.output).absolute().parent)
    check_writable(_costs_path(args), _costs_path(args).absolute().parent)
    model = on_best_device(load_base(base, dtype).eval())
    belongs_to = fingerprint(model, samples, target, window, args.patch_rank)
    costs = CostsFile(_costs_path(args), belongs_to)
    # Of the choice that was best, and of the static drop that is compared with it.
    output = Path(args.output)
    paths = [beside(output), beside(output.with_name(f"{output.name}.static"))]
    unfinished = [Unfinished(path, belongs_to | {"flags": _flags(args)}) for path in paths]
    with contextlib.ExitStack() as interruptible:
        for file in (costs, *unfinished):
            interruptible.enter_context(file.named_on_interrupt())
        number, rank = args.measured_samples, args.patch_rank
        measured = measure(model, samples, shape, target, window, rank, place, number, file=costs)
        kept = _DEFAULT_KEPT if args.target_capacity is None else args.target_capacity
        found = choices(measured, args.static, named, args.skip, kept)
        known = [choice for choice in found if str(choice) == unfinished[0].choice]
        choice = known[0] if known else best(model, samples, measured, found)
        del model
        report(measured.costs(), choice.layers)
        _report_routers(measured, choice)

        command = next(iter(records["train_command.txt"].splitlines()))
        patching = Patching(args, base, dtype, window, measured, samples, place, command, counts.to_dict())
        static = [other for other in found if other.share is None and other is not choice]
        static = static if args.compare_static and args.distilled_samples else []
        made = [patching.of(choice, unfinished[0], compared=bool(static))]
        made[0].record.report()
        for other in static:
            print(f"{other}, with patches made in the same way: layers {', '.join(map(str, other.layers))}")
            made.append(patching.of(other, unfinished[1], compared=True))
        taken = nearest(made)
        with deferred():
            written = write_checkpoint(
                base,
                args.output,
                taken.config,
                taken.weights,
                records | {PATCHES_FILE: taken.record.to_text()},
                patches=taken.patches,
            )
            card.write(written)
            for file in unfinished:
                file.remove()
            if args.costs is None:
                costs.remove()
    return written


def _costs_path(args: FitArguments) -> Path:
    """Beside the output, unless it was named."""
    output = Path(args.output)
    return output.with_name(f"{output.name}.costs.safetensors") if args.costs is None else Path(args.costs)


def _flags(args: FitArguments) -> str:
    """Those on which patches depend, and costs do not."""
    names = ("layers", "target_capacity", "skip", "static", "measured_samples", "distilled_samples", "distilled_passes")
    return repr([getattr(args, name) for name in names])


def _checked(args: FitArguments) -> tuple[str, int]:
    """Target and window; raises ConfigError."""
    window = parse_window(args.window)
    if window is None:
        raise ConfigError("--window: fit needs one; only the tokens of a window look the same whatever is skipped")
    if args.skip is not None and (args.layers is not None or args.target_capacity is not None):
        raise ConfigError("--skip chooses layers and kept ratio; --layers and --target-capacity are its alternative")
    if args.target_capacity is not None and not 0 < args.target_capacity < 1:
        raise ConfigError(f"--target-capacity {args.target_capacity:g}: a number above 0 and below 1 is needed")
    return POLICIES[args.granularity].target, window


def _report_routers(measured: Measured, choice: Choice) -> None:
    """What they are worth."""
    found, places = [choice.routers[layer] for layer in choice.layers], [*map(measured.layers.index, choice.layers)]
    worth = saving(measured, found, places, choice.log_price)
    for layer, router in zip(choice.layers, found, strict=True):
        share = float((router.predicted >= choice.log_price).double().mean())
        print(f"layer {layer:3}: kept by {share:.2f} of the requests, explains {router.explained:.2f} of its costs")
    print(
        f"nats per token skipped, layers by themselves: {worth.routed:.4f} routed, {worth.static:.4f} the same layers "
        f"for everyone, {worth.oracle:.4f} each request's best"
    )
